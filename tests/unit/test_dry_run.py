"""`export --dry-run`: what it says holds for the export, and it reads no weight and writes no file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from builders import CLOSED_FORM, calibrated, chat_batches, tiny_loaded
from click.testing import CliRunner
from families import save_checkpoint

from splitq_edge import checkpoint as checkpoint_module
from splitq_edge.cli import main
from splitq_edge.config import CorrectionConfig, QuantConfig, SplitConfig, preset
from splitq_edge.convert import effective_bits
from splitq_edge.estimate import estimate, site_shapes
from splitq_edge.loading import load_model
from splitq_edge.methods.registry import method_config

CONFIGS: dict[str, QuantConfig] = {
    **{scheme: preset(scheme) for scheme in ("W4A8", "W3A3", "W3A2")},
    "rtn": method_config("rtn", preset("W4A4")),
    "groups": replace(preset("W4A8"), group_size=64),
    "eight_bit_extras": replace(
        preset("W3A3"), split=SplitConfig(ratio=0.1, bits=8), correction=CorrectionConfig(0.1, 0.05, bits=8)
    ),
    "identity": replace(preset("W4A8"), transform="identity"),
    "no_split": replace(preset("W4A8"), split=SplitConfig(ratio=0)),
}


def dry_run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["export", *map(str, arguments), "--dry-run"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", CONFIGS)
def test_effective_bits_are_those_of_the_calibrated_sites(name: str, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], learning=CLOSED_FORM)
    found = estimate(tiny_loaded(), config, tokens=100, samples=4, packed=False)
    quantized = calibrated(tiny_loaded(), config, chat_batches(2), tmp_path)
    assert found.effective_bits == pytest.approx(effective_bits(quantized.sites), abs=1e-12)


def test_sizes_are_those_of_the_model() -> None:
    loaded = tiny_loaded()
    found = estimate(loaded, preset("W4A8"), tokens=100, samples=4, packed=False)
    linears = 2 * sum(shape.inputs * shape.outputs for shape in site_shapes(loaded))
    assert found.float_bytes == 4 * (sum(p.numel() for p in loaded.model.parameters()) - linears)
    assert found.decoder_bytes > linears / 2  # 4 bits a weight, and what comes on top
    assert found.blocks == 2


def test_packed_three_bit_weights_are_smaller() -> None:
    sizes = [
        estimate(tiny_loaded(), preset("W3A3"), tokens=9, samples=1, packed=packed).decoder_bytes
        for packed in (False, True)
    ]
    assert sizes[1] < sizes[0]


def test_no_weight_is_read(checkpoint: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(checkpoint), lazy=True)
    estimate(loaded, preset("W4A8"), tokens=100, samples=4, packed=False)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())

    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(checkpoint_module.CheckpointWeights, "read", forbidden)
    dry_run(checkpoint, tmp_path / "out", "--calib", chats)


def test_output_says_bits_time_and_size_and_nothing_is_written(checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    output = dry_run(checkpoint, tmp_path / "out", "--calib", chats, "--scheme", "W3A3", "--method", "splitq")
    expected = estimate(tiny_loaded(), preset("W3A3"), tokens=1, samples=1, packed=False)
    rows = {line[1:28].strip(): line[28:].strip() for line in output.splitlines() if line.strip()}
    assert rows["method, scheme"] == "splitq, W3A3"
    assert rows["effective bits a weight"] == f"{expected.effective_bits:.2f}"
    assert rows["blocks"] == "2"
    assert re.fullmatch(r"2, about \d+", rows["samples, tokens"])
    assert rows["quantized linears"] == f"{expected.decoder_bytes / 1e6:.1f} MB"
    assert re.fullmatch(r"about \d+ s on this machine", rows["calibration, one block"])
    assert list(tmp_path.iterdir()) == []


def test_float_export_has_nothing_to_estimate(checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "--calib", str(chats), "--scheme", "none"]
    result = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert result.exit_code == 2
    assert "--dry-run: expected a scheme to calibrate, got none" in result.output


@pytest.mark.parametrize(
    ("family", "layout", "problem"),
    [
        ("paligemma", "genai", "--layout genai: expected a model type that onnxruntime-genai can run"),
        ("qwen2_5_vl", "onnx-community", "--layout onnx-community: expected a model type that transformers.js"),
        ("llama", None, "got model type 'llama', text only"),
    ],
)
def test_layout_is_checked_as_in_the_export(
    family: str, layout: str | None, problem: str, chats: Path, tmp_path: Path
) -> None:
    model = save_checkpoint(family, tmp_path / "model")
    words = ["export", model, tmp_path / "out", "--calib", chats, *([] if layout is None else ["--layout", layout])]
    result = CliRunner().invoke(main, [*map(str, words), "--dry-run"])
    assert result.exit_code == 2
    assert problem in result.stderr


def test_longer_learning_and_more_tokens_take_longer() -> None:
    def seconds(epochs: int, tokens: int) -> float:
        config = replace(preset("W4A8"), learning=replace(preset("W4A8").learning, epochs=epochs))
        return estimate(tiny_loaded(), config, tokens=tokens, samples=4, packed=False).block_seconds

    assert seconds(100, 1000) > seconds(0, 1000)
    assert seconds(0, 1_000_000) > seconds(0, 1000)


def test_output_projection_is_quantized_on_request(checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    output = dry_run(checkpoint, tmp_path / "out", "--calib", chats, "--scheme", "W4A8", "--lm-head", "W8A8")
    assert "lm_head, W8A8" in output


def test_a_float_export_has_no_quantized_output_projection(checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    words = [
        "export",
        checkpoint,
        tmp_path / "out",
        "--calib",
        chats,
        "--scheme",
        "none",
        "--lm-head",
        "W8A8",
        "--dry-run",
    ]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 2
    assert "expected --lm-head none with --scheme none" in result.stderr


def test_model_is_loaded_as_the_export_would(
    checkpoint: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitq_edge.commands import export

    asked: list[dict[str, object]] = []

    def load(source: str, **options: object) -> object:
        asked.append(options)
        return load_model(source, lazy=True)

    monkeypatch.setattr(export, "load_model", load)
    dry_run(checkpoint, tmp_path / "out", "--calib", chats, "--adapter", tmp_path, "--trust-remote-code")
    assert asked[0]["adapter"] == str(tmp_path)
    assert asked[0]["trust_remote_code"] is True
