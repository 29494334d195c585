"""Uniform quantization (eq. 1): numbers worked by hand from docs/ops.md, and its bounds."""

from __future__ import annotations

import pytest
import torch
from builders import rng

from splitq_edge.quant.affine import (
    SCALE_FLOOR,
    code_range,
    dequantize_weight,
    expand_scale,
    quantize_rows,
    quantize_symmetric,
    quantize_weight,
    symmetric_scale,
)

EPS = torch.finfo(torch.float32).eps
BITS = [2, 3, 4, 6, 8]


def test_code_range_is_twos_complement() -> None:
    assert [code_range(bits) for bits in BITS] == [(-2, 1), (-4, 3), (-8, 7), (-32, 31), (-128, 127)]


def test_symmetric_rows_by_hand() -> None:
    # 4 bits: codes -8..7, scale = max|a| / 7.
    # Row 0: max 14 -> scale 2; -14 -> -7, 7 -> 3.5 -> 4 (half to even), 5 -> 2.5 -> 2, 1 -> 0.5 -> 0.
    # Row 1: max 7 -> scale 1; -7, 3.4 -> 3, -2.6 -> -3, 0.
    x = torch.tensor([[-14.0, 7.0, 5.0, 1.0], [-7.0, 3.4, -2.6, 0.0]])
    codes, scale = quantize_rows(x, 4)
    assert scale.tolist() == [[2.0], [1.0]]
    assert codes.tolist() == [[-7, 4, 2, 0], [-7, 3, -3, 0]]


def test_clip_shrinks_the_scale_and_saturates_the_codes_by_hand() -> None:
    # max 14, clip 1/2 -> scale 14 * 0.5 / 7 = 1: 14 -> 7 (top), -14 -> -8 (bottom), 6.5 -> 6 (half to even), 3 -> 3.
    codes, scale = quantize_rows(torch.tensor([[14.0, -14.0, 6.5, 3.0]]), 4, clip=0.5)
    assert scale.item() == 1.0
    assert codes.tolist() == [[7, -8, 6, 3]]


def test_asymmetric_rows_by_hand() -> None:
    # 2 bits: levels 3. Row 0: hi 5, lo -1 -> scale 2, inv 1/2; zero = round(0.5) = 0 (half to even);
    #   round(a / 2) = [2 (2.5), 0 (-0.5), 2 (1.5), 0] + 0, clamped to 0..3, - 0.
    # Row 1: hi 3, lo -6 -> scale 3, zero = round(2) = 2; round(a / 3) = [1, -2, 0, 0] + 2 = [3, 0, 2, 2], - 2.
    # Row 2: all positive, lo = 0 -> scale 1, zero 0: codes are the values.
    # Row 3: all negative, hi = 0 -> scale 1, zero 3: codes -3..0.
    # Row 4: hi 1.25, lo -1.75 -> scale 1, zero = round(1.75) = 2; round(a) = [1, -2, 0, 1] + 2 = [3, 0, 2, 3], - 2.
    rows = [[5, -1, 3, 0], [3, -6, 1, -1], [1, 2, 3, 0], [-3, -2, -1, 0], [1.25, -1.75, 0.5, 0.75]]
    codes, scale = quantize_rows(torch.tensor(rows), 2, symmetric=False)
    assert scale.flatten().tolist() == [2.0, 3.0, 1.0, 1.0, 1.0]
    assert codes.tolist() == [[2, 0, 2, 0], [1, -2, 0, 0], [1, 2, 3, 0], [-3, -2, -1, 0], [1, -2, 0, 1]]


def test_asymmetric_clip_by_hand() -> None:
    # 3 bits: levels 7. hi 10 * 0.5 = 5, lo -4 * 0.5 = -2 -> scale 1, zero 2; 10 + 2 -> 7 - 2 = 5; -4 + 2 -> 0 - 2 = -2.
    codes, scale = quantize_rows(torch.tensor([[10.0, -4.0, 3.0, -1.0]]), 3, clip=0.5, symmetric=False)
    assert scale.item() == 1.0
    assert codes.tolist() == [[5, -2, 3, -1]]


def test_weight_per_output_channel_by_hand() -> None:
    # 3 bits: codes -4..3, scale = column max / 3: 6 -> 2, 3 -> 1.
    weight = torch.tensor([[6.0, 0.4], [-6.0, -3.0], [3.0, 1.6]])  # [K = 3, N = 2]
    codes, scale = quantize_weight(weight, 3)
    assert scale.tolist() == [2.0, 1.0]
    assert codes.tolist() == [[3, 0], [-3, -3], [2, 2]]  # 1.5 -> 2: half to even
    assert codes.dtype == torch.int8
    assert dequantize_weight(codes, scale).tolist() == [[6, 0], [-6, -3], [4, 2]]


def test_weight_groups_by_hand_with_a_shorter_last_group() -> None:
    # K = 5, groups of 2 -> 3 groups; 4 bits: scale = group max / 7.
    weight = torch.tensor([[7.0], [-3.2], [14.0], [5.0], [0.7]])
    codes, scale = quantize_weight(weight, 4, group_size=2)
    torch.testing.assert_close(scale, torch.tensor([[1.0], [2.0], [0.1]]))
    assert codes.flatten().tolist() == [7, -3, 7, 2, 7]  # 2.5 -> 2
    assert expand_scale(scale, 5, 2).shape == (5, 1)
    torch.testing.assert_close(dequantize_weight(codes, scale, 2).flatten(), torch.tensor([7.0, -3.0, 14.0, 4.0, 0.7]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_row_gives_zero_codes_and_the_smallest_scale(bits: int, symmetric: bool) -> None:
    codes, scale = quantize_rows(torch.zeros(2, 5), bits, symmetric=symmetric)
    assert not codes.any()
    assert scale.flatten().tolist() == [pytest.approx(SCALE_FLOOR)] * 2


def test_zero_output_channel_gives_zero_codes_and_leaves_the_others_alone() -> None:
    weight = torch.randn(8, 3, generator=rng())
    alone, alone_scale = quantize_weight(weight[:, [0, 2]], 4)
    weight[:, 1] = 0
    codes, scale = quantize_weight(weight, 4)
    assert not codes[:, 1].any()
    assert torch.isfinite(scale).all()
    assert torch.equal(codes[:, [0, 2]], alone)
    assert torch.equal(scale[[0, 2]], alone_scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_symmetric_codes_stay_in_range(bits: int, clip: float) -> None:
    x = torch.randn(64, 33, generator=rng(bits)) * 10 ** torch.randn(64, 1, generator=rng(1))
    codes, _ = quantize_rows(x, bits, clip=clip)
    low, high = code_range(bits)
    assert low <= codes.min()
    assert codes.max() <= high
    assert torch.equal(codes, codes.round())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_asymmetric_codes_fit_int8_and_span_at_most_the_levels(bits: int, clip: float) -> None:
    x = torch.randn(64, 33, generator=rng(bits)) + 2 * torch.randn(64, 1, generator=rng(1))
    codes, _ = quantize_rows(x, bits, clip=clip, symmetric=False)
    assert codes.abs().max() <= 2**bits - 1
    assert (codes.amax(-1) - codes.amin(-1)).max() <= 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_unclipped_symmetric_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(64, 33, generator=rng(bits))
    codes, scale = quantize_rows(x, bits)
    # x * (1 / scale) carries two roundings of eps relative to codes of up to 2^(bits-1).
    slack = 2 ** (bits - 1) * 4 * EPS
    assert ((codes * scale - x).abs() <= scale * (0.5 + slack)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unclipped_asymmetric_error_is_at_most_one_step(bits: int) -> None:
    # The rounded zero point shifts the grid by up to half a step, which may cost an end of the range another half.
    x = torch.randn(64, 33, generator=rng(bits)) + 1
    codes, scale = quantize_rows(x, bits, symmetric=False)
    assert ((codes * scale - x).abs() <= scale * (1 + 1e-5)).all()


def test_asymmetric_beats_symmetric_on_one_sided_rows() -> None:
    x = torch.rand(64, 33, generator=rng())
    errors = []
    for symmetric in (True, False):
        codes, scale = quantize_rows(x, 3, symmetric=symmetric)
        errors.append((codes * scale - x).square().mean())
    assert errors[1] < errors[0] / 3  # 7 steps over the range instead of 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("channels", "group_size"), [(64, 0), (64, 32), (80, 32), (33, 32), (31, 32), (1, 32)])
def test_weight_error_is_at_most_half_a_step_of_its_own_group(bits: int, channels: int, group_size: int) -> None:
    weight = torch.randn(channels, 5, generator=rng(bits)) * torch.arange(1, channels + 1)[:, None]
    codes, scale = quantize_weight(weight, bits, group_size=group_size)
    groups = -(-channels // group_size) if group_size else 0
    assert scale.shape == ((groups, 5) if group_size else (5,))
    low, high = code_range(bits)
    assert low <= codes.min()
    assert codes.max() <= high
    step = torch.stack([scale[row // group_size] if group_size else scale for row in range(channels)])
    slack = 2 ** (bits - 1) * 4 * EPS
    assert ((dequantize_weight(codes, scale, group_size) - weight).abs() <= step * (0.5 + slack)).all()


def test_groups_are_quantized_independently() -> None:
    weight = torch.randn(70, 3, generator=rng())
    codes, scale = quantize_weight(weight, 4, group_size=32)
    for index, part in enumerate(weight.split(32)):
        part_codes, part_scale = quantize_weight(part, 4)
        assert torch.equal(codes[32 * index : 32 * (index + 1)], part_codes)
        assert torch.equal(scale[index], part_scale)


def test_leading_axes_and_tokens_do_not_influence_each_other() -> None:
    x = torch.randn(2, 3, 16, generator=rng())
    codes, scale = quantize_rows(x, 4)
    assert codes.shape == (2, 3, 16)
    assert scale.shape == (2, 3, 1)
    for batch in range(2):
        for token in range(3):
            alone, alone_scale = quantize_rows(x[batch, token][None], 4)
            assert torch.equal(codes[batch, token], alone[0])
            assert torch.equal(scale[batch, token], alone_scale[0])


def test_arithmetic_is_that_of_the_contract() -> None:
    # docs/ops.md in plain Python floats rounded to float32 after every operation.
    x = torch.randn(20, 9, generator=rng()) * 3
    clip = 0.7
    codes, scale = quantize_rows(x, 4, clip=clip)

    def f32(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).item()

    for row, code, step in zip(x.tolist(), codes.tolist(), scale.flatten().tolist(), strict=True):
        expected = max(f32(f32(max(map(abs, row)) * f32(clip)) / 7), f32(1e-12))
        inverse = f32(1 / expected)
        assert step == expected
        assert code == [min(max(round(f32(value * inverse)), -8), 7) for value in row]


def test_scale_floor_keeps_tiny_rows_finite() -> None:
    x = torch.full((1, 4), 1e-30)
    codes, scale = quantize_rows(x, 4)
    assert scale.item() == pytest.approx(1e-12)
    assert not codes.any()
    assert torch.equal(quantize_symmetric(x, symmetric_scale(x.abs().amax(-1, keepdim=True), 4), 4), codes)
