"""`splitq-edge compile`: the static graphs of an export as files of an NPU. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from splitq_edge.artifacts import read_export, staged_folder
from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.compiled import COMPILED_FILE, write_compiled
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
    sources = {part: out / entry["file"] for part, entry in manifest["parts"].items() if part not in CPU_PARTS}
    with staged_folder(place, force=True, marker=COMPILED_FILE) as staging:
        for part, source in sources.items():
            begin = time.monotonic()
            qnn.compile_part(source, staging / f"{part}.onnx", target)
            size = (staging / f"{part}.onnx").stat().st_size
            yield f"{part:<16} {size / 1e6:8.2f} MB  {time.monotonic() - begin:6.1f} s"
        write_compiled(staging, target, sources, qnn.versions())
    yield f"{place}: compiled for {target.name}"
