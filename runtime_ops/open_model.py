"""An exported folder of any flavour as something that answers."""

from __future__ import annotations

from pathlib import Path

from splitq_edge.artifacts import read_export
from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.static_session import StaticModel
from splitq_edge.targets import Target


def open_model(
    folder: str | Path, *, native: bool | None = None, threads: int = 0, target: Target | None = None
) -> ExportedModel:
    """The model of a folder.

    Args:
        folder: what `splitq-edge export` wrote.
        native: see `ExportedModel`; static graphs have no native kernels and pay no heed to it.
        threads: see `ExportedModel`.
        target: an NPU that the folder was compiled for, None for the CPU.

    Raises:
        SplitQError: see `ExportedModel`; or a target is asked of a folder without static graphs.
    """
    if "static" in read_export(Path(folder)):
        return StaticModel(folder, threads=threads, target=target)
    if target is not None:
        raise SplitQError(f"{folder}: expected the flavour qdq for {target.name}; export it with --flavour qdq")
    return ExportedModel(folder, native=native, threads=threads)
