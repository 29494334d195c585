"""GPTQ: the vectorized rounding against the algorithm in plain loops, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import rng

from splitq_edge.quant import rounding
from splitq_edge.quant.affine import code_range, expand_scale, quantize_symmetric, weight_scale
from splitq_edge.quant.rounding import (
    DAMPING,
    OUTPUT_DAMPING,
    gptq_codes,
    inverse_factor,
    output_damping,
    weight_towards,
)


def problem(channels: int = 80, outputs: int = 6, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations [T, K] and a weight [K, N]."""
    generator = rng(seed)
    mixing = torch.randn(channels // 4, channels, generator=generator)
    noise = torch.randn(400, channels, generator=generator)
    activations = torch.randn(400, channels // 4, generator=generator) @ mixing + 0.3 * noise
    return activations, torch.randn(channels, outputs, generator=generator)


def all_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.full(weight.shape[:1], bits)


def full_scale(weight: torch.Tensor, bits: int, group_size: int = 0) -> torch.Tensor:
    scale = weight_scale(weight, bits, group_size=group_size)
    return expand_scale(scale, weight.shape[0], group_size).expand_as(weight)


def nearest(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return quantize_symmetric(weight, scale, bits).to(torch.int8)


def gptq_by_loops(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, bits: list[int]) -> np.ndarray:
    """Optimal brain quantization in channel order, one output and one channel at a time, in float64.

    After channel k is rounded, the others move by the error times H^-1[k, j] / H^-1[k, k], and k leaves the problem.
    """
    size = len(weight)
    damped = hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(size)
    inverse = np.linalg.inv(damped)
    rest, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, int)
    for k in range(size):
        low, high = code_range(bits[k])
        for n in range(weight.shape[1]):
            codes[k, n] = min(max(round(rest[k, n] / scale[k, n]), low), high)
            error = rest[k, n] - codes[k, n] * scale[k, n]
            for j in range(k + 1, size):
                rest[j, n] -= error * inverse[k, j] / inverse[k, k]
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]  # eliminate channel k
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_the_algorithm_in_plain_loops(bits: int) -> None:
    # 80 channels: more than one block of the lazy update.
    activations, weight = problem()
    hessian, scale = activations.T @ activations, full_scale(weight, bits)
    codes = gptq_codes(weight, hessian, scale, all_bits(weight, bits))
    reference = gptq_by_loops(weight.numpy(), hessian.double().numpy(), scale.double().numpy(), [bits] * 80)
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(codes.numpy(), reference)


@pytest.mark.parametrize("group_size", [0, 32])
def test_output_error_is_far_below_that_of_nearest_rounding(group_size: int) -> None:
    activations, weight = problem()
    scale = full_scale(weight, 3, group_size)
    codes = gptq_codes(weight, activations.T @ activations, scale, all_bits(weight, 3))

    def error(found: torch.Tensor) -> float:
        return float((activations @ (weight - found * scale)).square().sum())

    assert error(codes) < 0.5 * error(nearest(weight, scale, 3))


def test_slices_of_a_wide_weight_are_rounded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, rows = torch.randn(24, 50, generator=generator), torch.randn(200, 24, generator=generator)
    scale, bits = torch.full((24, 50), 0.5), torch.full((24,), 4)
    whole = gptq_codes(weight, rows.T @ rows, scale, bits)
    monkeypatch.setattr(rounding, "SLICE", 24 * 7)
    assert torch.equal(gptq_codes(weight, rows.T @ rows, scale, bits), whole)


def test_uncorrelated_channels_are_rounded_to_nearest() -> None:
    _, weight = problem()
    scale = full_scale(weight, 3)
    codes = gptq_codes(weight, torch.diag(torch.linspace(1, 9, 80)), scale, all_bits(weight, 3))
    assert torch.equal(codes, nearest(weight, scale, 3))


def test_without_activations_every_channel_is_rounded_to_nearest() -> None:
    _, weight = problem()
    scale = full_scale(weight, 4)
    assert torch.equal(inverse_factor(torch.zeros(80, 80)), torch.eye(80))
    codes = gptq_codes(weight, torch.zeros(80, 80), scale, all_bits(weight, 4))
    assert torch.equal(codes, nearest(weight, scale, 4))


def test_dead_channels_are_rounded_to_nearest_and_disturb_nobody() -> None:
    activations, weight = problem()
    dead = [0, 17, 63, 64, 79]
    activations[:, dead] = 0
    scale = full_scale(weight, 3)
    hessian = activations.T @ activations
    codes = gptq_codes(weight, hessian, scale, all_bits(weight, 3))
    assert torch.equal(codes[dead], nearest(weight, scale, 3)[dead])
    alive = [k for k in range(80) if k not in dead]
    other = weight.clone()
    other[dead] = 0
    assert torch.equal(gptq_codes(other, hessian, scale, all_bits(weight, 3))[alive], codes[alive])


def test_singular_matrix_of_one_token_gives_finite_codes() -> None:
    activations, weight = problem()
    token = activations[:1]
    codes = gptq_codes(weight, token.T @ token, full_scale(weight, 3), all_bits(weight, 3))
    assert codes.min() >= -4
    assert codes.max() <= 3


def test_every_channel_keeps_to_its_own_bit_width() -> None:
    activations, weight = problem()
    bits = torch.tensor([2] * 30 + [3] * 30 + [8] * 20)
    scale = torch.full_like(weight, 0.02)  # far too fine for the narrow ones, so they reach their bounds
    codes = gptq_codes(weight, activations.T @ activations, scale, bits)
    for width in (2, 3, 8):
        own, (low, high) = codes[bits == width], code_range(width)
        assert own.min() >= low
        assert own.max() <= high
        if width < 8:
            assert (own.min(), own.max()) == (low, high)
    assert codes[bits == 8].abs().max() > 8


def test_scales_of_groups_are_used_row_by_row() -> None:
    activations, weight = problem()
    weight[:32] *= 10
    scale = full_scale(weight, 4, 32)
    assert not torch.equal(scale[0], scale[40])
    hessian = activations.T @ activations
    codes = gptq_codes(weight, hessian, scale, all_bits(weight, 4))
    reference = gptq_by_loops(weight.numpy(), hessian.double().numpy(), scale.double().numpy(), [4] * 80)
    np.testing.assert_array_equal(codes.numpy(), reference)


@pytest.mark.parametrize("value", [-1e6, float("nan")])
def test_matrix_that_cannot_be_inverted_is_said_and_rounds_to_nearest(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    activations, weight = problem()
    hessian, scale = activations.T @ activations, full_scale(weight, 3)
    hessian[5, 7] = hessian[7, 5] = value
    codes = gptq_codes(weight, hessian, scale, all_bits(weight, 3), name="layers.1.mlp_in")
    assert torch.equal(codes, nearest(weight, scale, 3))
    assert "layers.1.mlp_in: GPTQ's matrix is not positive definite" in caplog.text


def test_weight_towards_outputs_solves_the_ridge_regression() -> None:
    activations, weight = problem()
    error = torch.randn(activations.shape[0], weight.shape[1], generator=rng(5))
    hessian = activations.T @ activations
    moved = weight_towards(weight, hessian, activations.T @ error, len(activations)) - weight
    # Ridge regression is least squares with K more rows, sqrt(damping * mean diagonal) times the identity.
    strength = float(OUTPUT_DAMPING * hessian.diagonal().mean()) ** 0.5
    rows = np.concatenate([activations.double().numpy(), strength * np.eye(weight.shape[0])])
    wanted = np.concatenate([error.double().numpy(), np.zeros(weight.shape)])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-5)
    assert (error - activations @ moved).square().sum() < 0.95 * error.square().sum()


def test_weight_stays_where_nothing_was_seen() -> None:
    _, weight = problem()
    assert torch.equal(weight_towards(weight, torch.zeros(80, 80), torch.zeros_like(weight), 0), weight)


def test_few_rows_hold_the_weight_back() -> None:
    assert output_damping(500, 2000) == OUTPUT_DAMPING
    assert output_damping(500, 500) == pytest.approx(4 * OUTPUT_DAMPING)
    # Where there is nothing to learn, no more rows than channels bring it nearer to the weight that made the outputs.
    few = torch.randn(40, 80, generator=rng(2))
    weight, noise = torch.randn(80, 6, generator=rng(3)), torch.randn(40, 6, generator=rng(4))
    moved = [weight_towards(weight, few.T @ few, few.T @ noise, rows) - weight for rows in (40, 4000)]
    assert moved[0].square().sum() < 0.2 * moved[1].square().sum()
