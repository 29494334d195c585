"""Recipes: presets, ranges, unknown and missing keys, YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitq_edge.config import (
    PRESETS,
    ClipConfig,
    CorrectionConfig,
    LearningConfig,
    QuantConfig,
    SplitConfig,
    load_recipe,
    preset,
)
from splitq_edge.errors import SplitQError

KINDS = {
    "": QuantConfig,
    "clip.": ClipConfig,
    "split.": SplitConfig,
    "correction.": CorrectionConfig,
    "learning.": LearningConfig,
}
BASE = {"scheme": "test", "bits": 4, "activation_bits": 8}

ALLOWED = [
    ("", "bits", [2, 3, 4, 6, 8], [0, 1, 5, 7, 9, 16, -4]),
    ("", "activation_bits", [2, 3, 4, 6, 8], [1, 5, 7, 16]),
    ("", "group_size", [0, 32, 64, 128], [-1, 1, 16, 48, 96, 256]),
    ("", "transform", ["hadamard", "identity"], ["", "Hadamard", "random", None]),
    ("", "transform_width", [0, 16, 2048], [-1, 1, 15]),
    ("", "scale", ["none", "smoothquant", "awq", "mbq"], ["", "AWQ", None]),
    ("", "rounding", ["nearest", "gptq", "gptaq"], ["", "rtn", None]),
    ("", "vision", ["none", "W8A8", "W4A8", "W4A4"], ["", "W3A3", "w4a8", None]),
    ("", "lm_head", ["none", "W8A8", "W6A8", "W4A8"], ["", "W4A4", None]),
    ("", "embedding", ["none", "W8", "W4"], ["", "W3", "W8A8", 8]),
    ("", "kv_cache_bits", [0, 4, 8, 16], [-1, 1, 2, 32]),
    ("clip.", "weight", ["none", "search"], ["", "learned", None]),
    ("clip.", "activation", ["none", "search"], ["", "learned", None]),
    ("clip.", "activation_max", [0.1, 0.9, 1], [0, -0.1, 1.1, float("nan")]),
    ("split.", "rule", ["mocd", "random", "text-max", "vision-max", "all-max", "modality-max"], ["", "max", None]),
    ("split.", "ratio", [0, 0.02, 0.25], [-0.01, 0.2501, 1, float("nan")]),
    ("split.", "clusters", [1, 3, 16], [0, 17, -3]),
    ("split.", "bits", [4, 8], [2, 3, 5, 16]),
    ("split.", "activation_bits", [4, 8], [2, 3, 5, 16]),
    ("correction.", "cws_ratio", [0, 0.02, 0.5], [-0.01, 0.51, float("nan")]),
    ("correction.", "mac_ratio", [0, 0.03, 0.5], [-0.01, 0.51, float("nan")]),
    ("correction.", "bits", [4, 8], [2, 3, 5, 16]),
    ("correction.", "residual_bits", [4, 8], [2, 3, 5, 16]),
    ("correction.", "mac_rows", ["text", "all"], ["vision", "", None]),
    ("learning.", "epochs", [0, 1, 1000], [-1, 1001]),
    ("learning.", "batch", [1, 256], [0, 257]),
    ("learning.", "transform_lr", [0, 1], [-0.1, 1.1, float("nan")]),
    ("learning.", "clip_lr", [0, 1], [-0.1, 1.1, float("nan")]),
    ("learning.", "gate_lr", [0, 1], [-0.1, 1.1, float("nan")]),
    ("learning.", "balance", ["none", "mbq", "answers"], ["", "gradient", None]),
    ("learning.", "propagate", ["float", "quantized"], ["", "both", None]),
]
GOOD = [(prefix, name, value) for prefix, name, good, _ in ALLOWED for value in good]
BAD = [(prefix, name, value) for prefix, name, _, bad in ALLOWED for value in bad]


def recipe(prefix: str, name: str, value: object) -> dict[str, Any]:
    """The smallest recipe with one setting changed."""
    return {**BASE, name: value} if not prefix else {**BASE, prefix.rstrip("."): {name: value}}


def setting(config: QuantConfig, prefix: str, name: str) -> object:
    return getattr(getattr(config, prefix.rstrip(".")) if prefix else config, name)


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W3A3", "W3A2"])
def test_preset_has_the_bits_of_its_label_and_auxiliary_paths_of_at_least_four(scheme: str) -> None:
    config = preset(scheme)
    assert config.scheme == scheme == f"W{config.bits}A{config.activation_bits}"
    auxiliary = (config.split.bits, config.split.activation_bits, config.correction.bits)
    assert min(*auxiliary, config.correction.residual_bits) >= 4


def test_presets_are_the_four_of_the_paper_with_its_ratios_and_ranks() -> None:
    assert list(PRESETS) == ["W4A8", "W4A4", "W3A3", "W3A2"]
    assert {config.split.ratio for config in PRESETS.values()} == {0.02}
    assert {config.split.clusters for config in PRESETS.values()} == {3}
    ranks = {name: (c.correction.cws_ratio, c.correction.mac_ratio) for name, c in PRESETS.items()}
    assert ranks == {"W4A8": (0.02, 0.03), "W4A4": (0.02, 0.03), "W3A3": (0.02, 0.03), "W3A2": (0.03, 0.05)}


def test_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(SplitQError, match=r"'W5A5'.*W4A8, W4A4, W3A3, W3A2, none"):
        preset("W5A5")


@pytest.mark.parametrize(("prefix", "name", "value"), GOOD)
def test_value_in_range_is_kept(prefix: str, name: str, value: object) -> None:
    assert setting(QuantConfig.from_dict(recipe(prefix, name, value)), prefix, name) == value


@pytest.mark.parametrize(("prefix", "name", "value"), BAD)
def test_value_out_of_range_is_refused_by_its_name(prefix: str, name: str, value: object) -> None:
    with pytest.raises(SplitQError, match=rf"recipe: {prefix}{name}: expected .*, got .*; change it"):
        QuantConfig.from_dict(recipe(prefix, name, value))


@pytest.mark.parametrize(
    ("prefix", "name", "value"),
    [
        ("", "bits", 4.0),
        ("", "activation_bits", "8"),
        ("", "activation_symmetric", "no"),
        ("", "scheme", 5),
        ("", "split", None),
        ("", "split", 0.02),
        ("", "correction", ["cws_ratio"]),
        ("split.", "ratio", "2%"),
        ("split.", "clusters", 2.5),
        ("correction.", "cws_ratio", None),
    ],
)
def test_value_of_another_type_is_refused_by_its_name(prefix: str, name: str, value: object) -> None:
    with pytest.raises(SplitQError, match=rf"recipe: {prefix}{name}: expected"):
        QuantConfig.from_dict(recipe(prefix, name, value))


def test_every_setting_with_a_range_is_in_the_table_above() -> None:
    checked = {f"{prefix}{name}" for prefix, name, _, _ in ALLOWED}
    fields = {f"{prefix}{item.name}" for prefix, kind in KINDS.items() for item in dataclasses.fields(kind)}
    assert fields - checked == {"scheme", "method", "activation_symmetric", "clip", "split", "correction", "learning"}


def test_asymmetric_activations_need_fewer_than_eight_bits() -> None:
    assert not QuantConfig.from_dict({**BASE, "activation_bits": 4, "activation_symmetric": False}).activation_symmetric
    with pytest.raises(SplitQError, match="activation_symmetric: expected true at 8 activation bits, got False"):
        QuantConfig.from_dict({**BASE, "activation_symmetric": False})


@pytest.mark.parametrize("prefix", KINDS)
def test_unknown_key_error_lists_the_known_keys(prefix: str) -> None:
    with pytest.raises(SplitQError) as raised:
        QuantConfig.from_dict(recipe(prefix, "bitz", 4))
    message = str(raised.value)
    assert f"unknown key '{prefix}bitz'" in message
    assert ", ".join(item.name for item in dataclasses.fields(KINDS[prefix])) in message


@pytest.mark.parametrize("key", ["scheme", "bits", "activation_bits"])
def test_missing_required_key_is_named(key: str) -> None:
    values = {name: value for name, value in BASE.items() if name != key}
    with pytest.raises(SplitQError, match=f"missing key '{key}'"):
        QuantConfig.from_dict(values)


def test_missing_optional_keys_take_their_defaults() -> None:
    config = QuantConfig.from_dict({**BASE, "split": {"ratio": 0.1}})
    assert config == QuantConfig("test", 4, 8, split=SplitConfig(ratio=0.1))
    assert config.split.clusters == 3


@pytest.mark.parametrize("scheme", list(PRESETS))
def test_preset_survives_a_yaml_round_trip(scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(preset(scheme).to_dict()), encoding="utf-8")
    assert load_recipe(path) == preset(scheme)


def test_from_dict_leaves_its_argument_alone() -> None:
    values = preset("W4A4").to_dict()
    before = preset("W4A4").to_dict()
    QuantConfig.from_dict(values)
    assert values == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- bits\n- 4\n", "expected a mapping of settings, got list"),
        (b"", "expected a mapping of settings, got NoneType"),
        (b"bits: [4\n", "expected a readable YAML file"),
        (b"bits: \xff\xfe\n", "expected a readable YAML file"),
    ],
)
def test_recipe_file_that_is_no_mapping_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(SplitQError, match=message) as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)
    assert "recipe.yaml" in str(raised.value)


def test_number_that_yaml_reads_as_a_text_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: mine\nbits: 4\nactivation_bits: 8\nlearning: {clip_lr: 5e-2}\n")
    with pytest.raises(SplitQError, match=r"learning\.clip_lr: expected a number with a dot .*, got '5e-2'"):
        load_recipe(path)
    path.write_text("scheme: mine\nbits: 4\nactivation_bits: 8\nlearning: {clip_lr: 5.0e-2}\n")
    assert load_recipe(path).learning.clip_lr == 0.05


def test_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SplitQError, match=r"absent\.yaml: expected a readable YAML file"):
        load_recipe(tmp_path / "absent.yaml")


def test_recipe_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("W4A8").bits = 5  # type: ignore[misc]
