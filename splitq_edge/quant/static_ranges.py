"""Ranges of static activations: measured over calibration samples, then fixed in the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitq_edge.config import RANGE_METHODS
from splitq_edge.errors import SplitQError

PERCENTILE = 99.99  # of all observed values, for "percentile"
BINS = 8192
TINY = 1e-6  # least width of a range
SHRINKS = np.linspace(1.0, 0.3, 71)  # tried by "mse"


@dataclass(frozen=True)
class Range:
    """Real numbers that an activation's codes cover; zero lies inside.

    Attributes:
        low: smallest value, 0 or less.
        high: largest value, 0 or more.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low <= 0.0 <= self.high):
            raise SplitQError(
                f"activation range: expected finite low <= 0 <= high, got {self.low} .. {self.high}; "
                "check the calibration samples"
            )

    @classmethod
    def of(cls, values: np.ndarray) -> Range:
        """The range of an array's values and zero."""
        return cls(min(float(values.min(initial=0)), 0.0), max(float(values.max(initial=0)), 0.0))

    def union(self, other: Range) -> Range:
        """The smallest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def quantizer(self, bits: int) -> tuple[np.float32, int]:
        """Scale and zero point of unsigned codes: value = (code - zero_point) * scale."""
        steps = 2**bits - 1
        scale = np.float32(max(self.high - self.low, TINY) / steps)
        return scale, int(np.clip(np.rint(-self.low / scale), 0, steps))


class Histogram:
    """How often values of one tensor fell where, between its extremes.

    Args:
        extent: all values and zero.
    """

    def __init__(self, extent: Range) -> None:
        self.extent = extent
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count the values of an array, any shape."""
        limits = (self.extent.low, max(self.extent.high, self.extent.low + TINY))
        self.counts += np.histogram(np.clip(values, *limits), BINS, limits)[0]

    @property
    def centres(self) -> np.ndarray:
        """[BINS] the values that the bins stand for."""
        edges = np.linspace(self.extent.low, max(self.extent.high, self.extent.low + TINY), BINS + 1)
        return (edges[1:] + edges[:-1]) / 2


def choose_range(histogram: Histogram, method: str, bits: int) -> Range:
    """The range that an activation is quantized in.

    Args:
        histogram: of its values.
        method: "minmax", all values; "percentile", the central `PERCENTILE` % of them; "mse", the extent shrunk by the
            factor with the least squared error of clipping and rounding.
        bits: of the codes, which weigh rounding against clipping.

    Raises:
        SplitQError: an unknown method.
    """
    if method not in RANGE_METHODS:
        raise SplitQError(f"activation ranges: expected one of {', '.join(RANGE_METHODS)}, got {method!r}")
    extent, total = histogram.extent, int(histogram.counts.sum())
    if method == "minmax" or not total:
        return extent
    centres = histogram.centres
    if method == "percentile":
        tail = total * (100 - PERCENTILE) / 200
        below = np.cumsum(histogram.counts)
        low = centres[np.searchsorted(below, tail, side="right")] if tail >= 1 else extent.low
        high = centres[np.searchsorted(below, total - tail)] if tail >= 1 else extent.high
        return Range(min(max(low, extent.low), 0.0), max(min(high, extent.high), 0.0))
    errors = []
    for shrink in SHRINKS:
        low, high = extent.low * shrink, extent.high * shrink
        clipped = ((centres - np.clip(centres, low, high)) ** 2 * histogram.counts).sum() / total
        errors.append(clipped + ((high - low) / (2**bits - 1)) ** 2 / 12)
    best = float(SHRINKS[int(np.argmin(errors))])
    return Range(extent.low * best, extent.high * best)
