"""The quality report of an export, `quality.json`: what quantization cost every site and each component gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitq_edge.errors import ArtifactError, SplitQError

REPORT_FILE = "quality.json"
REPORT_SCHEMA = 1
STAGES = ("rtn", "split", "transform", "cws", "mac", "final")
CHANNEL_FIELDS = ("text", "vision", "absmax_share", "absmax_over_median", "jaccard")  # of `site_quality.channel_report`


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
        if not isinstance(schema, int) or schema > REPORT_SCHEMA:
            raise ArtifactError(
                f"{path}: expected schema {REPORT_SCHEMA} or older, got {schema!r}; upgrade splitq-edge"
            )
        _check_parts(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: expected a quality report ({error!r}); export the model again") from error
    return dict(content)


def _check_parts(content: dict[str, Any]) -> None:
    """Check that all that `inspect` and the model card show is there.

    Raises:
        KeyError: a field is missing.
        TypeError: one is no mapping.
    """
    _check_fields(content, "recipe", "effective_bits", "blocks")
    _check_fields(content["recipe"], "method", "scheme")
    for block in content["blocks"]:
        _check_fields(block, "block", "relative_error", "sites")
        for site in block["sites"].values():
            _check_fields(site, "sqnr_db", "channels")
            _check_fields(site["sqnr_db"], *STAGES)
            _check_fields(site["channels"], *CHANNEL_FIELDS)


def _check_fields(found: Any, *names: str) -> None:
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} where a mapping should be")
    for name in names:
        if name not in found:
            raise KeyError(name)
