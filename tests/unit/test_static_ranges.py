"""Ranges of static activations."""

from __future__ import annotations

import numpy as np
import pytest

from splitq_edge.config import RANGE_METHODS
from splitq_edge.errors import SplitQError
from splitq_edge.quant.static_ranges import Histogram, Range, choose_range


def histogram(values: np.ndarray) -> Histogram:
    made = Histogram(Range.of(values))
    made.add(values)
    return made


def test_a_range_holds_zero() -> None:
    assert Range.of(np.array([2.0, 3.0])) == Range(0.0, 3.0)
    assert Range.of(np.array([-2.0, -1.0])) == Range(-2.0, 0.0)
    with pytest.raises(SplitQError, match="low <= 0 <= high"):
        Range(1.0, 2.0)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extent", [(-3.0, 5.0), (0.0, 1.0), (-7.0, 0.0)])
def test_a_quantizer_keeps_zero_and_both_ends(bits: int, extent: tuple[float, float]) -> None:
    scale, zero = Range(*extent).quantizer(bits)
    codes = np.clip(np.rint(np.array([*extent, 0.0]) / scale) + zero, 0, 2**bits - 1)
    values = (codes - zero) * scale
    assert values[2] == 0
    assert np.abs(values[:2] - extent).max() <= scale


def test_a_value_that_never_changes_has_a_usable_quantizer() -> None:
    scale, zero = Range(0.0, 0.0).quantizer(16)
    assert scale > 0
    assert zero == 0


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_an_empty_histogram_keeps_its_extent(method: str) -> None:
    assert choose_range(Histogram(Range(-1.0, 2.0)), method, 8) == Range(-1.0, 2.0)


def test_percentile_cuts_a_lone_outlier_and_minmax_does_not() -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(100_000), [1000.0]])
    assert choose_range(histogram(values), "minmax", 8).high == 1000.0
    assert choose_range(histogram(values), "percentile", 8).high < 10.0


def test_mse_has_the_least_error_of_the_tried_ranges() -> None:
    values = np.random.default_rng(0).laplace(size=50_000)

    def error(found: Range, bits: int) -> float:
        scale, zero = found.quantizer(bits)
        codes = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
        return float((((codes - zero) * scale - values) ** 2).mean())

    counted = histogram(values)
    found = {method: error(choose_range(counted, method, 8), 8) for method in RANGE_METHODS}
    assert found["mse"] < found["minmax"]
    assert found["mse"] <= found["percentile"] * 1.05  # a histogram of bins knows no better


def test_more_bits_clip_less() -> None:
    counted = histogram(np.random.default_rng(0).laplace(size=50_000))
    assert choose_range(counted, "mse", 16).high > choose_range(counted, "mse", 8).high


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(SplitQError, match="minmax, percentile, mse, got 'max'"):
        choose_range(Histogram(Range(0.0, 1.0)), "max", 8)
