"""Methods are recipes of one pipeline: their settings, their names, and a run of each."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from builders import CLOSED_FORM, calibrated, chat_batches, tiny_loaded

from splitq_edge.cli import METHOD_NAMES
from splitq_edge.config import PRESETS, ClipConfig, CorrectionConfig, LearningConfig, QuantConfig, SplitConfig, preset
from splitq_edge.convert import QuantizedModel
from splitq_edge.errors import SplitQError
from splitq_edge.methods.ablation import ablation_recipes
from splitq_edge.methods.registry import METHODS, method_config
from splitq_edge.modules.split_linear import SplitLinear

MODELS = Path(__file__).resolve().parents[2] / "models"
NO_SPLIT, NO_CORRECTION = SplitConfig(ratio=0), CorrectionConfig(cws_ratio=0, mac_ratio=0)
NEAREST = {
    "transform": "identity",
    "scale": "none",
    "rounding": "nearest",
    "clip": ClipConfig(),
    "split": NO_SPLIT,
    "correction": NO_CORRECTION,
    "learning": LearningConfig(epochs=0),
}
# What each method changes of round-to-nearest.
RECIPES = {
    "rtn": NEAREST,
    "smoothquant": NEAREST | {"scale": "smoothquant"},
    "awq": NEAREST | {"scale": "awq", "clip": ClipConfig(weight="search")},
    "gptq": NEAREST | {"rounding": "gptq"},
    "mbq": NEAREST | {"scale": "mbq"},
    "quarot": NEAREST
    | {
        "transform": "hadamard",
        "transform_width": 0,
        "rounding": "gptq",
        "clip": ClipConfig(weight="search", activation_max=0.9),
    },
    "flatquant": {"split": NO_SPLIT, "correction": NO_CORRECTION, "transform_width": 0},
    "splitq": {},
}


def test_command_line_offers_every_method_and_no_other() -> None:
    assert tuple(METHODS) == METHOD_NAMES
    assert all(name == method.name and method.summary for name, method in METHODS.items())


@pytest.mark.parametrize("scheme", PRESETS)
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_recipe_of_a_method_is_the_preset_with_its_own_settings(name: str, scheme: str) -> None:
    expected = replace(preset(scheme), method=name, **RECIPES[name])
    assert method_config(name, preset(scheme)) == expected
    assert QuantConfig.from_dict(asdict(expected)) == expected  # and a recipe file can say the same


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SplitQError, match=r"method 'magic': expected one of rtn, smoothquant, .*, splitq; choose one"):
        method_config("magic", preset("W4A8"))


def quantized_with(name: str, folder: Path) -> QuantizedModel:
    """The tiny LLaVA at W3A3; what would be learned keeps its start."""
    config = replace(method_config(name, preset("W3A3")), learning=CLOSED_FORM)
    return calibrated(tiny_loaded(), config, chat_batches(), folder)


def check_site(name: str, site: SplitLinear) -> None:
    config = method_config(name, preset("W3A3"))
    main = site.groups["main"]
    if name == "splitq":
        assert set(site.groups) == {"main", "text", "vision"}
        assert site.correction is not None
    else:
        assert set(site.groups) == {"main"}
        assert site.widths == (site.in_features, 0, 0)
        assert site.correction is None
    assert (main.bits, main.activation_bits) == (3, 3)
    assert (main.p1 is None) == (config.transform == "identity")
    if config.clip.activation == "search":
        assert 0.2 <= main.clip <= config.clip.activation_max
    else:
        assert main.clip == pytest.approx(config.clip.activation_max)
    if config.scale == "none":
        assert site.channel_scale is None


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_calibrates_the_same_pipeline(name: str, tmp_path: Path) -> None:
    quantized = quantized_with(name, tmp_path)
    assert len(quantized.sites) == 8
    for site in quantized.sites.values():
        check_site(name, site)
    assert [report["block"] for report in quantized.reports] == [0, 1]
    assert all(0 < report["relative_error"]["final"] < 5 for report in quantized.reports)


def test_methods_that_differ_give_different_integers(tmp_path: Path) -> None:
    codes = {}
    for name in ("rtn", "smoothquant", "awq", "gptq", "mbq", "quarot"):
        site = quantized_with(name, tmp_path / name).sites["layers.0.attn_in"]
        codes[name] = site.groups["main"].qweight.numpy().tobytes()
    assert len(set(codes.values())) == len(codes)


@pytest.mark.slow
def test_exported_peers_have_ops_without_outlier_groups_and_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitq_edge.exporters import export_folder
    from splitq_edge.exporters.export_folder import ExportRequest, write_export

    trace, graphs = export_folder.trace, {}

    def traced_once(module, inputs, **options):  # tracing knows nothing of the method
        key = (type(module).__name__, *options["input_names"])
        if key not in graphs:
            graphs[key] = trace(module, inputs, **options)
        return graphs[key].clone()

    monkeypatch.setattr(export_folder, "trace", traced_once)
    for name in METHOD_NAMES:
        quantized = quantized_with(name, tmp_path / name)
        folder = tmp_path / f"{name}-export"
        folder.mkdir()
        request = ExportRequest("portable", chat_batches(1)[0], {"source": "test"}, 0)
        write_export(quantized.loaded, quantized, request, folder)
        graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "SplitQLinear"]
        assert len(nodes) == 8, name
        for node in nodes:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            plain = values["group_widths"][1:] == [0, 0] and not values.get("cws_rank") and not values.get("mac_rank")
            assert plain == (name != "splitq"), name
        inputs = {value.name for value in graph.input}
        correction = quantized.config.correction
        assert ("modality" in inputs) == (correction.mac_ratio > 0 and correction.mac_rows == "text")


@pytest.mark.parametrize("scheme", list(PRESETS))
def test_option_rows_change_one_setting_each(scheme: str) -> None:
    config = preset(scheme)
    recipes = ablation_recipes(config, "options")
    assert recipes.pop("default") == config
    assert len(set(map(str, recipes.values()))) == len(recipes)
    for label, recipe in recipes.items():
        setting, _, value = label.partition("=")
        before, after = flat(config), flat(recipe)
        assert {name for name in before if before[name] != after[name]} == {setting}, label
        assert str(after[setting]) == value


@pytest.mark.parametrize("scheme", list(PRESETS))
def test_peers_of_equal_bits_have_no_fewer_than_splitq(scheme: str) -> None:
    recipes = ablation_recipes(preset(scheme), "bits")
    assert recipes.pop("splitq") == preset(scheme)
    assert len(recipes) == 3
    rows = json.loads((MODELS / "easyvqa-tiny" / "results.json").read_text(encoding="utf-8"))["rows"]
    (measured,) = (row["effective_bits"] for row in rows if (row["method"], row["scheme"]) == ("splitq", scheme))
    for label, recipe in recipes.items():
        assert recipe.split.ratio == recipe.correction.cws_ratio == recipe.correction.mac_ratio == 0, label
        assert measured <= recipe.bits + 32 / recipe.group_size <= measured + 0.3, label


def flat(config: QuantConfig) -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found
