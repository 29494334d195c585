"""What a folder layout decides: names of the files, what the graphs exchange, what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.config import KV_CACHES, QuantConfig
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel


@dataclass
class ExportParts:
    """An export before it is written; a layout changes it in place.

    Attributes:
        loaded: the model.
        graphs: by part, as `splitq_edge.exporters.export_folder` builds them.
        parity: inputs and torch's outputs of every part, see `docs/pipeline.md`.
        manifest: export.json without its list of files.
    """

    loaded: LoadedModel
    graphs: dict[str, ir.Model]
    parity: dict[str, np.ndarray]
    manifest: dict[str, Any]


class Layout(Protocol):
    """One way to lay out an exported folder."""

    name: str
    data_suffix: str  # behind the name of a graph's file: the file of its large tensors
    attention: str  # form of the attention unless another is asked for, see `ExportRequest`

    def check(self, adapter: ModelAdapter, config: QuantConfig | None, *, flavour: str, attention: str) -> None:
        """See that the layout's readers can run such an export; called before long work.

        Raises:
            SplitQError: they cannot.
        """
        ...

    def file(self, part: str, manifest: dict[str, Any]) -> str:
        """Where a part's graph lies, relative to the folder."""
        ...

    def adapt(self, parts: ExportParts) -> None:
        """Change graphs, parity samples and manifest to what the layout's readers expect."""
        ...

    def write_companions(self, parts: ExportParts, folder: Path) -> None:
        """Write the files that only this layout has; those of transformers lie in the folder already."""
        ...


class Flat:
    """Three graphs beside the files of transformers: what `splitq-edge` itself reads."""

    name = "flat"
    data_suffix = ".data"
    attention = "fused"

    def check(self, adapter: ModelAdapter, config: QuantConfig | None, *, flavour: str, attention: str) -> None:
        """Everything that is exported fits."""

    def file(self, part: str, _manifest: dict[str, Any]) -> str:
        """See `Layout.file`."""
        return f"{part}.onnx"

    def adapt(self, _parts: ExportParts) -> None:
        """Nothing to change."""

    def write_companions(self, _parts: ExportParts, _folder: Path) -> None:
        """Nothing to add."""


def check_cache(layout: str, config: QuantConfig | None, accepted: tuple[int, ...]) -> None:
    """See that a layout's readers pass on keys and values of the type that they are stored in.

    Args:
        layout: its name, for the message.
        config: recipe of the export.
        accepted: values of `kv_cache_bits`.

    Raises:
        SplitQError: they do not.
    """
    if config is not None and config.kv_cache_bits not in accepted:
        names = {bits: name for name, bits in KV_CACHES.items()}
        wanted = " or ".join(names[bits] for bits in accepted)
        raise SplitQError(
            f"--layout {layout}: expected a cache of {wanted} (--kv-cache, or the recipe's kv_cache_bits), because the "
            f"layout's readers pass no other on, got {names[config.kv_cache_bits]}; change it or use --layout flat"
        )
