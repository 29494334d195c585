"""`splitq-edge compile`: the static graphs of an export as files of an NPU. Needs no torch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from splitq_edge.artifacts import read_export
from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.compiled import write_compiled
from splitq_edge.targets import Target

CPU_PARTS = ("embed_tokens",)  # a look-up in a float table


def run_compile(out: Path, target: Target) -> Iterator[str]:
    """Compile every static part; lines of the report.

    Raises:
        SplitQError: the folder has no static graphs, the plugin is missing or rejects a node.
    """
    manifest = read_export(out)
    if "static" not in manifest:
        raise SplitQError(f"{out}: expected the flavour qdq, got {manifest['flavour']}; export it with --flavour qdq")
    from splitq_edge.runtime_ops import qnn

    place = out / target.folder
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    sources = {part: out / entry["file"] for part, entry in manifest["parts"].items() if part not in CPU_PARTS}
    for part, source in sources.items():
        begin = time.monotonic()
        qnn.compile_part(source, place / f"{part}.onnx", target)
        size = (place / f"{part}.onnx").stat().st_size
        yield f"{part:<16} {size / 1e6:8.2f} MB  {time.monotonic() - begin:6.1f} s"
    write_compiled(out, target, sources, qnn.versions())
    yield f"{place}: compiled for {target.name}"
