"""Which output projection, embedding and transform an export has when no recipe file says it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitq_edge.commands.export import ExportOptions, chosen_config

OPTIONS = ExportOptions("model", Path("out"), flavour="packed")


@pytest.mark.parametrize(
    ("changes", "lm_head", "embedding"),
    [
        ({}, "W6A8", "W8"),
        ({"scheme": "W4A4"}, "W6A8", "W8"),
        ({"scheme": "W3A3"}, "W4A8", "W4"),
        ({"scheme": "W3A2", "flavour": "portable"}, "W4A8", "W4"),
        ({"scheme": "W3A3", "method": "rtn"}, "W4A8", "W4"),
        ({"scheme": "W3A3", "lm_head": "W6A8"}, "W6A8", "W8"),
        ({"lm_head": "W4A8"}, "W4A8", "W4"),
        ({"lm_head": "W4A8", "embedding": "W8"}, "W4A8", "W8"),
        ({"lm_head": "none"}, "none", "W8"),
        ({"scheme": "W3A3", "flavour": "qdq"}, "none", "none"),
    ],
)
def test_both_follow_the_scheme_and_each_other(changes: dict[str, Any], lm_head: str, embedding: str) -> None:
    config = chosen_config(replace(OPTIONS, **changes))
    assert config is not None
    assert (config.lm_head, config.embedding) == (lm_head, embedding)


@pytest.mark.parametrize(("flavour", "width"), [("packed", 1536), ("portable", 1536), ("qdq", 0)])
def test_a_static_graph_has_no_zeros_beside_the_blocks_of_a_transform(flavour: str, width: int) -> None:
    config = chosen_config(replace(OPTIONS, flavour=flavour))
    assert config is not None
    assert config.transform_width == width


def test_a_recipe_file_says_it_itself(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W3A3\nbits: 3\nactivation_bits: 3\n")
    config = chosen_config(replace(OPTIONS, recipe=recipe))
    assert config is not None
    assert (config.lm_head, config.embedding) == ("none", "none")
