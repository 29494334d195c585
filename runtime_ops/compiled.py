"""What `splitq-edge compile` leaves in an exported folder: one file a part and a record of what it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitq_edge.artifacts import check_file, sha256_of, write_json
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.targets import Target

COMPILED_FILE = "compiled.json"
COMPILED_SCHEMA = 1


def write_compiled(place: Path, target: Target, sources: dict[str, Path], versions: dict[str, str]) -> None:
    """Record the compiled parts of an export.

    Args:
        place: folder of the parts, each `<part>.onnx`.
        target: what they were compiled for.
        sources: the graph of each part.
        versions: of the compiler.
    """
    parts = {
        part: {
            "file": f"{part}.onnx",
            "bytes": (place / f"{part}.onnx").stat().st_size,
            "sha256": sha256_of(place / f"{part}.onnx"),
            "source_sha256": sha256_of(source),
        }
        for part, source in sources.items()
    }
    content = {"schema": COMPILED_SCHEMA, "target": target.name, "versions": versions, "parts": parts}
    write_json(place / COMPILED_FILE, content)


def compiled_parts(folder: Path, target: Target) -> dict[str, Path]:
    """The compiled parts of an export.

    Raises:
        SplitQError: the export was not compiled for the target.
        ArtifactError: a file is missing or was made from another export.
    """
    place = folder / target.folder
    path = place / COMPILED_FILE
    if not path.is_file():
        raise SplitQError(
            f"{folder}: expected files compiled for {target.name}, found none; "
            f"run: splitq-edge compile {folder} --target {target.kind} --arch {target.arch}"
        )
    content = _read(path)
    found = {}
    for part, entry in content["parts"].items():
        check_file(place, entry["file"], int(entry["bytes"]))
        source = folder / f"{part}.onnx"
        if not source.is_file() or sha256_of(source) != entry["source_sha256"]:
            raise ArtifactError(f"{place / entry['file']}: was compiled from another {part}.onnx; compile it again")
        found[part] = place / entry["file"]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected the JSON of a compilation ({error!r}); compile again") from error
    if not isinstance(schema, int) or schema > COMPILED_SCHEMA:
        raise ArtifactError(f"{path}: expected schema {COMPILED_SCHEMA} or older, got {schema!r}; upgrade splitq-edge")
    return dict(content)
