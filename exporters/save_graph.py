"""Graphs to files: large tensors beside them, some of them in the data file of another graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie.

    Attributes:
        file: relative to the graph's folder.
        offset: of the first byte.
        length: bytes.
    """

    file: str
    offset: int
    length: int


def save_graph(model: ir.Model, path: Path, data: str, *, threshold: int, shared: dict[str, ir.ExternalTensor]) -> None:
    """Write a graph.

    Args:
        model: its initializers point to the files afterwards.
        path: of the graph.
        data: name of the file of its large tensors, beside it.
        threshold: bytes above which a tensor is large.
        shared: initializers by name that lie in a file already.
    """
    values = {name: model.graph.initializers[name] for name in shared}
    for value in values.values():
        value.const_value = None  # what has no value is not written
    ir.external_data.unload_from_model(model, path.parent, data, size_threshold_bytes=threshold)
    for name, value in values.items():
        value.const_value = shared[name]
    ir.save(model, path)


def external_places(path: Path) -> dict[str, Place]:
    """By name the initializers of a written graph that lie in another file."""
    found = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = Place(entries["location"], int(entries["offset"]), int(entries["length"]))
    return found
