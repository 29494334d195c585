"""The quality report of an export, `quality.json`: what quantization cost every site and each component gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitq_edge.errors import ArtifactError, SplitQError

REPORT_FILE = "quality.json"
REPORT_SCHEMA = 1
STAGES = ("rtn", "split", "transform", "cws", "mac", "final")


def build_report(
    config: dict[str, Any], effective_bits: float, blocks: list[dict[str, Any]], extras: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """JSON content: recipe, effective bits, and the reports of blocks and extra sites as calibration made them."""
    return {
        "schema": REPORT_SCHEMA,
        "recipe": config,
        "effective_bits": round(effective_bits, 4),
        "stages": list(STAGES),
        "blocks": blocks,
        "extras": extras,
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an exported folder.

    Raises:
        SplitQError: no folder, or a float export that has none.
        ArtifactError: damaged, or of a newer schema.
    """
    path = folder / REPORT_FILE
    if not folder.is_dir():
        raise SplitQError(f"exported model {folder}: expected a folder, found none; check the path")
    if not path.is_file():
        raise SplitQError(f"{path}: expected the report of a quantized export, found none; export with a scheme")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        [block["sites"] for block in content["blocks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected a quality report ({error!r}); export the model again") from error
    if not isinstance(schema, int) or schema > REPORT_SCHEMA:
        raise ArtifactError(f"{path}: expected schema {REPORT_SCHEMA} or older, got {schema!r}; upgrade splitq-edge")
    return dict(content)
