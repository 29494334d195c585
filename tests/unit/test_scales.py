"""Channel scales: SmoothQuant's closed form, AWQ's and MBQ's searches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import no_split, rng

from splitq_edge.methods.scales import ALPHAS, ScaleInputs, awq_scale, mbq_scale, smoothquant_scale, start_scale
from splitq_edge.quant.affine import dequantize_weight, quantize_rows, quantize_weight

CHANNELS = 32
CONFIG = no_split(bits=3, activation_bits=4)


def inputs_of(text: torch.Tensor, vision: torch.Tensor, sensitivity: tuple[float, float] = (1.0, 1.0)) -> ScaleInputs:
    weight = torch.randn(CHANNELS, 10, generator=rng(9))
    return ScaleInputs(weight, torch.cat([text, vision]).abs().amax(0), text, vision, sensitivity)


def two_modalities(sensitivity: tuple[float, float] = (1.0, 1.0)) -> ScaleInputs:
    """Text is flat; vision has three channels 30 times as large."""
    text, vision = torch.randn(50, CHANNELS, generator=rng(1)), torch.randn(60, CHANNELS, generator=rng(2))
    vision[:, [4, 9, 20]] *= 30
    return inputs_of(text, vision, sensitivity)


def rounded(inputs: ScaleInputs, log_scale: torch.Tensor) -> torch.Tensor:
    return dequantize_weight(*quantize_weight(inputs.weight * log_scale.exp()[:, None], CONFIG.bits))


def weight_only_error(inputs: ScaleInputs, log_scale: torch.Tensor) -> float:
    rows = torch.cat([inputs.text_rows, inputs.vision_rows])
    return float((rows / log_scale.exp() @ rounded(inputs, log_scale) - rows @ inputs.weight).square().mean())


def modality_error(inputs: ScaleInputs, rows: torch.Tensor, log_scale: torch.Tensor) -> float:
    codes, scale = quantize_rows(rows / log_scale.exp(), CONFIG.activation_bits)
    return float(((codes * scale) @ rounded(inputs, log_scale) - rows @ inputs.weight).abs().mean())


def candidates(inputs: ScaleInputs) -> list[torch.Tensor]:
    magnitude = torch.cat([inputs.text_rows, inputs.vision_rows]).abs().mean(0).log()
    return [alpha * (magnitude - magnitude.mean()) for alpha in ALPHAS]


def test_smoothquant_is_its_closed_form_with_geometric_mean_one() -> None:
    inputs = two_modalities()
    expected = torch.empty(CHANNELS)
    for c in range(CHANNELS):
        expected[c] = (inputs.absmax[c] / max(abs(w) for w in inputs.weight[c].tolist())) ** 0.5
    expected /= expected.log().mean().exp()
    torch.testing.assert_close(smoothquant_scale(inputs).exp(), expected)


def test_smoothquant_evens_out_activations_and_weights() -> None:
    inputs = two_modalities()
    s = smoothquant_scale(inputs).exp()
    ratio = (inputs.absmax / s) / (inputs.weight.abs().amax(1) * s)
    torch.testing.assert_close(ratio, ratio.mean().expand(CHANNELS), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", ["none", "smoothquant", "awq", "mbq"])
def test_dead_channels_and_dead_weights_give_finite_scales(scale: str) -> None:
    inputs = two_modalities()
    for values in (inputs.text_rows, inputs.vision_rows):
        values[:, 3] = 0
    inputs.absmax[3] = 0
    inputs.weight[5] = 0
    found = start_scale(inputs, replace(CONFIG, scale=scale))
    assert torch.isfinite(found.exp()).all()
    assert abs(float(found.mean())) < 1e-5
    assert scale != "none" or not found.any()


def test_awq_leaves_flat_activations_alone() -> None:
    flat = torch.randint(0, 2, (80, CHANNELS), generator=rng(3)) * 2.0 - 1
    found = awq_scale(inputs_of(flat[:40], flat[40:]), CONFIG)
    assert not found.any()


def test_awq_takes_the_exponent_with_the_smallest_weight_only_error() -> None:
    inputs = two_modalities()
    found = awq_scale(inputs, CONFIG)
    best = min(candidates(inputs), key=lambda scale: weight_only_error(inputs, scale))
    torch.testing.assert_close(found, best, atol=1e-5, rtol=1e-5)
    assert weight_only_error(inputs, found) < 0.8 * weight_only_error(inputs, torch.zeros(CHANNELS))


@pytest.mark.parametrize(("sensitivity", "modality"), [((1.0, 0.0), "text_rows"), ((0.0, 1.0), "vision_rows")])
def test_mbq_minimizes_the_error_of_the_only_sensitive_modality(
    sensitivity: tuple[float, float], modality: str
) -> None:
    inputs = two_modalities(sensitivity)
    found = mbq_scale(inputs, CONFIG)
    errors = [modality_error(inputs, getattr(inputs, modality), scale) for scale in candidates(inputs)]
    assert modality_error(inputs, getattr(inputs, modality), found) == pytest.approx(min(errors), rel=1e-4)


def test_mbq_chooses_otherwise_for_the_other_modality() -> None:
    scales = [mbq_scale(two_modalities(sensitivity), CONFIG) for sensitivity in ((1.0, 0.0), (0.0, 1.0))]
    assert not torch.allclose(*scales)


def test_mbq_does_not_depend_on_the_unit_of_the_gradients() -> None:
    scales = [mbq_scale(two_modalities((3 * unit, unit)), CONFIG) for unit in (1.0, 1e-6)]
    assert torch.equal(*scales)


def test_mbq_works_without_vision_rows() -> None:
    inputs = two_modalities()
    alone = replace(inputs, vision_rows=inputs.vision_rows[:0])
    assert torch.isfinite(mbq_scale(alone, CONFIG)).all()
