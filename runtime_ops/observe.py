"""Measures the ranges of a float graph's activations over calibration samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from splitq_edge.quant.static_ranges import Histogram, Range, choose_range
from splitq_edge.runtime_ops.session import ERROR_SEVERITY

Feeds = Mapping[str, np.ndarray]


class Observer:
    """A float graph whose observed values are outputs.

    Args:
        model: serialized graph.
        names: graph outputs and inputs to observe.
    """

    def __init__(self, model: bytes, names: Sequence[str]) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        # Weight-only int4 products would otherwise round activations to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._names = list(names)
        self._extents: dict[str, Range] = {}
        self._histograms: dict[str, Histogram] = {}

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs by name; nothing is counted."""
        return dict(zip(self._outputs, self.session.run(None, dict(feeds)), strict=True))

    def extend(self, values: Mapping[str, np.ndarray]) -> None:
        """First pass: widen the extents by one run's inputs and outputs."""
        for name in self._names:
            found = Range.of(values[name])
            known = self._extents.get(name)
            self._extents[name] = found if known is None else known.union(found)

    def count(self, values: Mapping[str, np.ndarray]) -> None:
        """Second pass, behind all of the first: count one run's values."""
        for name in self._names:
            histogram = self._histograms.setdefault(name, Histogram(self._extents[name]))
            histogram.add(values[name])

    def ranges(self, method: str, bits: int) -> dict[str, Range]:
        """The chosen range of every observed value, see `choose_range`."""
        if method == "minmax":
            return dict(self._extents)
        return {name: choose_range(histogram, method, bits) for name, histogram in self._histograms.items()}


def observe(observer: Observer, feeds: Iterable[Feeds], *, histograms: bool) -> None:
    """Both passes over feeds that can be gone through twice."""
    runs = list(feeds)
    for one in runs:
        observer.extend({**one, **observer.run(one)})
    if histograms:
        for one in runs:
            observer.count({**one, **observer.run(one)})
