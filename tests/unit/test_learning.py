"""Learned transforms, clips and gates: gradients, invertibility, and the step from training to integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import chat_batches, no_split, random_linears, random_plan, rng, tiny_loaded

from splitq_edge.calibration.runner import collect_stats
from splitq_edge.config import CorrectionConfig, LearningConfig, QuantConfig, preset
from splitq_edge.convert import quantize_model
from splitq_edge.learning.invertible import InvertibleMatrix
from splitq_edge.learning.prefix import first_block_batches, padded_batches
from splitq_edge.learning.reconstruct import BlockBatch, token_weights
from splitq_edge.learning.site import TrainableSite
from splitq_edge.modality import ModalityContext
from splitq_edge.quant.affine import dequantize_weight, quantize_rows, quantize_weight
from splitq_edge.quant.fake import fake_quantize_rows, fake_quantize_weight
from splitq_edge.quant.transforms import orthogonal_start

WIDTHS = (64, 8, 8)


def trainable(config: QuantConfig, *, seed: int = 0, outputs: tuple[int, ...] = (24, 12)) -> TrainableSite:
    channels = sum(WIDTHS)
    linears = random_linears(channels, outputs, bias=True, seed=seed)
    absmax = torch.rand(channels, generator=rng(seed)) + 0.5
    plan = random_plan(channels, *WIDTHS[1:], seed=seed)
    return TrainableSite("site", linears, plan, config, ModalityContext(), absmax)


def disturb(site: TrainableSite, amount: float = 0.05) -> None:
    """Moves every parameter, as training would."""
    with torch.no_grad():
        for number, parameter in enumerate(site.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(number)), alpha=amount)


@pytest.mark.parametrize("n", [1, 4, 5, 16, 31, 64])
def test_learned_matrix_times_its_inverse_is_the_identity(n: int) -> None:
    matrix = InvertibleMatrix(orthogonal_start(n))
    with torch.no_grad():
        for number, parameter in enumerate(matrix.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(number)))
        p, inverse = matrix()
    torch.testing.assert_close(p @ inverse, torch.eye(n), atol=1e-5, rtol=0)
    assert torch.linalg.cond(p) < 60


def test_learned_matrix_begins_at_its_start() -> None:
    start = orthogonal_start(16)
    torch.testing.assert_close(InvertibleMatrix(start)()[0], start)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fake_quantization_of_rows_is_quantize_then_dequantize(bits: int, symmetric: bool) -> None:
    x = torch.randn(7, 33, generator=rng(1))
    codes, scale = quantize_rows(x, bits, clip=0.9, symmetric=symmetric)
    torch.testing.assert_close(fake_quantize_rows(x, bits, clip=0.9, symmetric=symmetric), codes * scale)


@pytest.mark.parametrize("group_size", [0, 16])
def test_fake_quantization_of_weights_is_quantize_then_dequantize(group_size: int) -> None:
    weight = torch.randn(40, 9, generator=rng(2))
    qweight, scale = quantize_weight(weight, 3, group_size=group_size, clip=0.8)
    expected = dequantize_weight(qweight, scale, group_size)
    torch.testing.assert_close(fake_quantize_weight(weight, 3, group_size=group_size, clip=0.8), expected)


def test_gradient_passes_inside_the_range_and_not_outside() -> None:
    x = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    fake_quantize_rows(x, 4, clip=torch.tensor(0.5)).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 1
    assert x.grad[0, 1] == 1
    # The largest value is clipped: it only moves the scale, 0.5 / 7 per unit, times the sum of the codes.
    codes = torch.round(torch.tensor([0.3, -0.2]) * (7 / 0.5)).sum() + 7
    mantissa = codes - (torch.tensor([0.3, -0.2]) * (7 / 0.5)).sum()
    torch.testing.assert_close(x.grad[0, 2], mantissa * 0.5 / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mac_rows", ["all", "text"])
def test_gradients_reach_transforms_scales_clips_and_gates(mac_rows: str) -> None:
    config = no_split(bits=3, activation_bits=3, correction=CorrectionConfig(0.2, 0.4, mac_rows=mac_rows))
    site = trainable(config)
    disturb(site)
    x = torch.randn(2, 5, sum(WIDTHS), generator=rng(3))
    modality = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.int8)
    with site.context.using(modality):
        (site(x) - torch.randn(2, 5, 36, generator=rng(4))).square().sum().backward()
    for name, parameter in site.named_parameters():
        if parameter.numel() == 1 and not name.endswith("clip"):
            continue  # the rotation of a 1 x 1 factor has nothing to learn
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    kinds = site.parameter_groups()
    assert all(kinds.values())
    assert sum(len(group) for group in kinds.values()) == len(list(site.parameters()))


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W3A3", "W3A2"])
def test_frozen_site_answers_as_the_trained_one(scheme: str) -> None:
    site = trainable(preset(scheme))
    disturb(site)
    x = torch.randn(2, 5, sum(WIDTHS), generator=rng(5))
    modality = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.int8)
    frozen = site.freeze()
    with torch.no_grad(), site.context.using(modality):
        learned, integers = site(x), frozen(x)
    # Training leaves the 8-bit latent vector of the correction in float; a code on a boundary may tip too.
    error = (learned - integers).norm(dim=-1) / learned.norm(dim=-1)
    assert error.median() < 5e-3
    assert frozen.channel_scale is not None
    assert 0 < frozen.groups["main"].clip < 1


def test_everything_switched_off_is_the_float_linear() -> None:
    config = replace(no_split(bits=8, activation_bits=8), correction=CorrectionConfig(0, 0))
    site = trainable(config)
    disturb(site)
    x = torch.randn(3, sum(WIDTHS), generator=rng(6))
    expected = x @ site.weight + site.bias
    with torch.no_grad():
        site.float_only = True
        torch.testing.assert_close(site(x), expected)
        site.float_only = False
        error = (site(x) - expected).norm() / expected.norm()
    assert error < 0.03


def test_loss_caps_tokens_with_huge_updates_and_ignores_padding() -> None:
    hidden = torch.zeros(1, 5, 2)
    target = torch.tensor([[[9.0, 9.0], [100.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.5, 0.5]]])
    keep = torch.tensor([[False, True, True, True, True]])
    weights = token_weights(BlockBatch(hidden, {}, torch.zeros(1, 5, dtype=torch.int8), keep), target)
    # kept energies 5000, 1, 1, 0.25: the lower median is 1
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 1 / 5000, 1.0, 1.0, 1.0]))


def test_padded_batches_hold_every_token_once() -> None:
    samples = [
        {"input_ids": torch.arange(1, n + 1)[None], "attention_mask": torch.ones(1, n, dtype=torch.long)}
        for n in (5, 3, 4)
    ]
    batches = padded_batches(samples, 2, 0)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (1, 5)]
    assert batches[0]["input_ids"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert batches[0]["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_learning_lowers_the_error_of_every_block_and_repeats(propagate: str) -> None:
    errors = []
    for _ in range(2):
        loaded, batches = tiny_loaded(), chat_batches()
        learning = LearningConfig(epochs=3, batch=2, propagate=propagate)
        config = replace(preset("W3A3"), learning=learning)
        stats = collect_stats(loaded, batches)
        inputs = first_block_batches(loaded, padded_batches(batches, 2, 0))
        quantized = quantize_model(loaded, config, stats, inputs, seed=1)
        results = list(quantized.blocks.values())
        errors.append(results)
        assert results[0].after < 0.95 * results[0].before
        # Behind a quantized prefix a later block's error may already be the prefix's alone.
        worst = 1.0 if propagate == "quantized" else 0.95
        assert all(result.after <= worst * result.before for result in results)
    assert errors[0] == errors[1]
