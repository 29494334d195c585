"""Clip factors by search: the best of the grid, scale by scale."""

from __future__ import annotations

import pytest
import torch
from builders import rng

from splitq_edge.quant import clipping
from splitq_edge.quant.affine import dequantize_weight, quantize_rows, quantize_weight
from splitq_edge.quant.clipping import ACTIVATION_GRID, WEIGHT_GRID, search_activation_clip, search_weight_clip


def weight_with_outliers() -> torch.Tensor:
    """[70, 5]; one huge value in each of the columns 1 and 3."""
    weight = torch.randn(70, 5, generator=rng())
    weight[3, 1] = weight[66, 3] = 12
    return weight


def weight_error(weight: torch.Tensor, clip: float | torch.Tensor, group_size: int = 0) -> torch.Tensor:
    """Squared error, element by element."""
    qweight, scale = quantize_weight(weight, 3, group_size=group_size, clip=clip)
    return (dequantize_weight(qweight, scale, group_size) - weight).square()


def test_weight_clip_is_the_best_of_the_grid_in_every_column() -> None:
    weight = weight_with_outliers()
    found = search_weight_clip(weight, 3)
    errors = torch.stack([weight_error(weight, factor).sum(0) for factor in WEIGHT_GRID])
    assert found.shape == (5,)
    torch.testing.assert_close(found, torch.tensor(WEIGHT_GRID)[errors.argmin(0)])
    assert found.unique().numel() > 1


def test_weight_clip_has_one_factor_a_group_and_the_last_group_may_be_shorter() -> None:
    weight = weight_with_outliers()
    found = search_weight_clip(weight, 3, group_size=32)
    assert found.shape == (3, 5)
    for number, part in enumerate(weight.split(32)):
        torch.testing.assert_close(found[number], search_weight_clip(part, 3))


def test_slices_of_a_wide_weight_are_searched_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 50, generator=torch.Generator().manual_seed(3))
    whole = search_weight_clip(weight, 3, group_size=16)
    monkeypatch.setattr(clipping, "SLICE", 24 * 7)
    assert torch.equal(search_weight_clip(weight, 3, group_size=16), whole)


def test_important_channels_decide_the_weight_clip() -> None:
    weight = weight_with_outliers()
    importance = torch.full((70,), 1e-3)
    importance[3] = 1e3  # the huge value of column 1 must survive
    plain, weighted = search_weight_clip(weight, 3), search_weight_clip(weight, 3, importance=importance)
    assert plain[1] < 1
    assert weighted[1] == 1


def test_ties_keep_the_larger_weight_factor() -> None:
    assert search_weight_clip(torch.zeros(8, 3), 4).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_clip_is_the_best_of_the_grid(symmetric: bool) -> None:
    rows = torch.randn(30, 64, generator=rng(1))
    rows[:, 5] = 9
    found = search_activation_clip(rows, 3, symmetric=symmetric)

    def error(factor: float) -> float:
        codes, scale = quantize_rows(rows, 3, clip=factor, symmetric=symmetric)
        return float(((codes * scale - rows).square().sum(-1) / rows.square().sum(-1)).sum())

    assert found == min(ACTIVATION_GRID, key=error)
    assert found < 1


def test_scaling_a_token_does_not_change_the_activation_clip() -> None:
    rows = torch.randn(30, 64, generator=rng(2))
    scaled = rows * 2.0 ** torch.randint(-10, 11, (30, 1), generator=rng(3))
    clips = [search_activation_clip(x, 2, symmetric=True) for x in (rows, scaled)]
    assert clips[0] == clips[1]


def test_activation_clip_stays_below_the_largest_allowed() -> None:
    uniform = torch.linspace(-1, 1, 256).repeat(4, 1)
    assert search_activation_clip(uniform, 8, symmetric=True) == 1
    assert search_activation_clip(uniform, 8, symmetric=True, largest=0.9) == 0.9


def test_without_rows_or_signal_nothing_is_clipped() -> None:
    assert search_activation_clip(torch.zeros(0, 8), 4, symmetric=True) == 1
    assert search_activation_clip(torch.zeros(3, 8), 4, symmetric=True) == 1
