"""What an export keeps keys and values in when no recipe file says it, and `--kv-cache`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.commands.export import ExportOptions, chosen_config, with_default_cache
from splitq_edge.config import preset
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.layouts.registry import layout_named

OPTIONS = ExportOptions("model", Path("out"), flavour="packed")


@pytest.mark.parametrize(
    ("family", "layout", "changes", "bits"),
    [
        ("smolvlm", "flat", {}, 16),
        ("smolvlm", "genai", {}, 16),
        ("smolvlm", "flat", {"attention": "standard"}, 0),
        ("smolvlm", "flat", {"flavour": "portable"}, 0),
        ("gemma3", "flat", {}, 0),  # its attention stays in standard ops
        ("qwen2_5_vl", "genai", {}, 0),
        ("smolvlm", "flat", {"kv_cache": "float32"}, 0),
        ("smolvlm", "flat", {"recipe": Path("recipe.yaml")}, 0),
    ],
)
def test_float16_where_the_own_kernel_reads_it(family: str, layout: str, changes: dict[str, Any], bits: int) -> None:
    config = with_default_cache(replace(OPTIONS, **changes), preset("W4A8"), adapter_for(family), layout_named(layout))
    assert config.kv_cache_bits == bits


@pytest.mark.parametrize(("kind", "bits"), [("float32", 0), ("float16", 16), ("int8", 8), ("int4", 4)])
def test_the_option_changes_presets_and_recipes(kind: str, bits: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W4A8\nbits: 4\nactivation_bits: 8\nkv_cache_bits: 16\n")
    for options in (OPTIONS, replace(OPTIONS, recipe=recipe)):
        config = chosen_config(replace(options, kv_cache=kind))
        assert config is not None
        assert config.kv_cache_bits == bits


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scheme": "none"}, "expected --kv-cache float32 with --scheme none, got int8"),
        ({"flavour": "qdq"}, "expected no --kv-cache with --flavour qdq, whose cache has 16 bits, got int8"),
    ],
)
def test_where_there_is_no_choice(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SplitQError, match=problem):
        chosen_config(replace(OPTIONS, kv_cache="int8", **changes))


def test_a_state_that_counted_the_cache_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    config = preset("W4A8")
    older = CalibrationState(folder, {"recipe": replace(config, kv_cache_bits=8).to_dict(), "seed": 0})
    assert older.start(resume=False) == 0
    header = {"recipe": config.to_dict(), "seed": 0}
    assert CalibrationState(folder, header).start(resume=True) == 0
    with pytest.raises(SplitQError, match="seed changed"):
        CalibrationState(folder, header | {"seed": 1}).start(resume=True)
