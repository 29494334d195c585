"""Every mistake of a user: one line "error: ...", exit code 2, no traceback, nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write_chats, write_image
from click.testing import CliRunner

from splitq_edge.adapters.registry import ADAPTERS
from splitq_edge.artifacts import EXPORT_FILE, EXPORT_SCHEMA, file_table, write_json
from splitq_edge.cli import main
from splitq_edge.config import PRESETS
from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops import qnn

Check = Callable[..., str]


@pytest.fixture
def error_of(capfd: pytest.CaptureFixture[str]) -> Check:
    """Runs the command line, checks the form of the failure and returns the line."""

    def check(*arguments: object) -> str:
        capfd.readouterr()
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert isinstance(result.exception, SystemExit), f"{result.exception!r}\n{result.output}"
        assert result.exit_code == 2, result.output
        # What native code or an early-bound handler prints bypasses click's runner.
        stderr = result.stderr + capfd.readouterr().err
        lines = stderr.splitlines()
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: "), stderr
        assert "Traceback" not in result.output
        return lines[0]

    return check


@pytest.fixture
def nothing_written(tmp_path: Path) -> Callable[[], None]:
    """Call it after the command: the place where OUT would stand must be as it was."""
    place = tmp_path / "place"
    place.mkdir()

    def check() -> None:
        assert list(place.iterdir()) == []

    return check


@pytest.fixture
def out(tmp_path: Path, nothing_written: Callable[[], None]) -> Path:
    return tmp_path / "place" / "out"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that is enough for all checks that come before the weights are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return folder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder whose manifest fits its files; no graph in it can run."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for part in ("vision_encoder", "embed_tokens", "decoder"):
        (folder / f"{part}.onnx").write_bytes(b"graph of " + part.encode())
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes: object) -> None:
    parts = {part: {"file": f"{part}.onnx"} for part in ("vision_encoder", "embed_tokens", "decoder")}
    content = {"schema": EXPORT_SCHEMA, "parts": parts, "files": file_table(folder), **changes}
    write_json(folder / EXPORT_FILE, content)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# export: the model


def test_missing_model_folder(tmp_path: Path, chats: Path, out: Path, error_of: Check, nothing_written) -> None:
    line = error_of("export", tmp_path / "absent", out, "--calib", chats, "--calib-samples", 2)
    assert "expected a folder or a hub id" in line
    assert "absent" in line
    nothing_written()


def test_mistyped_relative_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, chats: Path, out: Path, error_of: Check, nothing_written, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    line = error_of("export", "models/absent", out, "--calib", chats, "--calib-samples", 2)
    assert "model models/absent: expected a folder or a hub id such as org/name, got neither" in line
    nothing_written()


def test_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, error_of: Check) -> None:
    def report() -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "folder/file")

    monkeypatch.setattr("splitq_edge.commands.doctor.report", report)
    line = error_of("doctor")
    assert "No space left on device (folder/file); check the place and its free space" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", "-1"), ("--seed", "20261126071000"), ("--memory-limit", "0"), ("--memory-limit", "9" * 400)],
)
def test_numbers_out_of_range_are_usage_errors(
    model: Path, out: Path, nothing_written, option: str, value: str
) -> None:
    result = CliRunner().invoke(main, ["export", str(model), str(out), option, value])
    assert result.exit_code == 2
    assert option in result.stderr
    assert "Traceback" not in result.output
    nothing_written()


def test_model_folder_without_config(tmp_path: Path, chats: Path, out: Path, error_of: Check, nothing_written) -> None:
    (tmp_path / "empty").mkdir()
    line = error_of("export", tmp_path / "empty", out, "--calib", chats, "--calib-samples", 2)
    assert "expected a folder with config.json, got none" in line
    nothing_written()


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "[]", '"llava"'])
def test_damaged_model_config(text: str, model: Path, chats: Path, out: Path, error_of: Check, nothing_written) -> None:
    (model / "config.json").write_text(text)
    line = error_of("export", model, out, "--calib", chats, "--calib-samples", 2)
    assert "expected JSON with model_type" in line
    assert line.endswith("fetch or save the checkpoint again")
    nothing_written()


@pytest.mark.parametrize("dry", [False, True])
def test_model_without_a_name(
    dry: bool, chats: Path, out: Path, error_of: Check, nothing_written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)  # which an empty path would be
    line = error_of("export", "", out, "--calib", chats, *(["--dry-run"] if dry else []))
    assert "MODEL: expected a folder or a hub id such as org/name, got an empty text" in line
    nothing_written()


def test_exported_folder_given_as_model(
    exported: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    (exported / "config.json").write_text('{"model_type": "llava"}')
    line = error_of("export", exported, out, "--calib", chats, "--calib-samples", 2)
    assert "expected a checkpoint, got a folder that splitq-edge exported (export.json); give the model" in line
    nothing_written()


def test_revision_of_a_local_folder(model: Path, chats: Path, out: Path, error_of: Check, nothing_written) -> None:
    line = error_of("export", model, out, "--calib", chats, "--calib-samples", 2, "--revision", "main")
    assert f"--revision: expected a hub id as MODEL beside it, got the folder {model}; leave --revision out" in line
    nothing_written()


def test_float_export_cannot_stop_after_blocks(
    model: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    line = error_of("export", model, out, "--calib", chats, "--scheme", "none", "--stop-after", 1)
    assert "expected no --stop-after with --scheme none, which calibrates no blocks, got 1; leave one out" in line
    nothing_written()


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copied")


@pytest.mark.parametrize(("value", "limit"), [("nan", ()), ("inf", ()), ("nan", ("--memory-limit", "8GB"))])
def test_float_export_of_weights_that_are_no_numbers(
    value: str, limit: tuple[str, ...], copied: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][3, 5] = float(value)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    line = error_of("export", copied, out, "--calib", chats, "--calib-samples", 2, "--scheme", "none", *limit)
    assert "layers.1.mlp.up_proj.weight, got NaN or infinity in 1 of" in line
    nothing_written()


@pytest.mark.parametrize("missing", [("preprocessor_config.json", "processor_config.json"), ("tokenizer.json",)])
def test_checkpoint_without_files_of_its_processor(
    missing: tuple[str, ...], copied: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    for name in missing:
        (copied / name).unlink(missing_ok=True)
    line = error_of("export", copied, out, "--calib", chats, "--calib-samples", 2)
    assert (
        "files of the image processor (preprocessor_config.json or processor_config.json) and of the tokenizer ("
        in line
    )
    assert line.endswith("copy the missing or damaged ones from the original checkpoint")
    nothing_written()


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "expected a chat template (chat_template.jinja, or chat_template in processor_config.json or "),
        ("{% for message in messages %}{{ message", "the model's own cannot be rendered (TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "the model's own cannot be rendered (UndefinedError"),
    ],
)
def test_a_chat_template_is_not_the_fault_of_the_data(
    template: str | None, problem: str, copied: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (copied / name).unlink(missing_ok=True)
    if template is not None:
        (copied / "chat_template.jinja").write_text(template)
    line = error_of("export", copied, out, "--calib", chats, "--calib-samples", 2)
    assert problem in line
    assert "calibration data" not in line
    assert line.endswith("copy it from the original checkpoint")
    nothing_written()


def test_unknown_model_type_lists_the_supported(
    model: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    (model / "config.json").write_text('{"model_type": "resnet"}')
    line = error_of("export", model, out, "--calib", chats, "--calib-samples", 2)
    assert f"'resnet': expected one of {', '.join(sorted(ADAPTERS))};" in line
    nothing_written()


def test_checkpoint_without_weights(model: Path, chats: Path, out: Path, error_of: Check, nothing_written) -> None:
    line = error_of("export", model, out, "--calib", chats, "--calib-samples", 2)
    assert "expected a loadable checkpoint" in line
    nothing_written()


def test_checkpoint_with_missing_weights(
    checkpoint: Path, tmp_path: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    lost = [name for name in weights if "down_proj" in name]
    save_file({n: t for n, t in weights.items() if n not in lost}, folder / "model.safetensors", {"format": "pt"})
    line = error_of("export", folder, out, "--calib", chats, "--calib-samples", 2)
    assert f"{len(lost)} are missing" in line
    assert "down_proj" in line
    nothing_written()


def test_truncated_checkpoint(
    checkpoint: Path, tmp_path: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    folder = tmp_path / "truncated"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    line = error_of("export", folder, out, "--calib", chats, "--calib-samples", 2)
    assert f"{weights}: expected a whole safetensors file, got 5000 bytes that are none" in line
    nothing_written()


@pytest.mark.parametrize("scheme", ["W4A8", "none"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "got an empty one; fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "got a Git LFS pointer, .*; run git lfs pull"),
        (b"<html>not found</html>", r"got 22 bytes that are none \(.*\); fetch it again"),
    ],
)
def test_weights_that_are_no_safetensors_file_are_named(
    content: bytes, problem: str, scheme: str, copied: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    (copied / "model.safetensors").write_bytes(content)
    line = error_of("export", copied, out, "--calib", chats, "--calib-samples", 2, "--scheme", scheme)
    assert re.search(f"{copied}/model.safetensors: expected a whole safetensors file, {problem}", line), line
    nothing_written()


# export: settings


def test_unknown_scheme_is_a_usage_error_that_lists_the_known(model: Path, out: Path, nothing_written) -> None:
    result = CliRunner().invoke(main, ["export", str(model), str(out), "--scheme", "W5A5"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert all(f"'{scheme}'" in result.stderr for scheme in [*PRESETS, "none"])
    nothing_written()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: mine\nbits: 4\n", "missing key 'activation_bits'"),
        ("scheme: mine\nbits: 4\nactivation_bits: 8\nbitz: 3\n", "unknown key 'bitz'; known keys: scheme, bits"),
        ("scheme: mine\nbits: 5\nactivation_bits: 8\n", "bits: expected one of (2, 3, 4, 6, 8), got 5"),
        ("scheme: W3A3\nbits: 4\nactivation_bits: 8\n", "scheme: expected W4A8, which bits and activation_bits say"),
        ("- 4\n", "expected a mapping"),
        ("a: [\n", "expected a readable YAML file"),
    ],
)
def test_bad_recipe(
    text: str, message: str, model: Path, chats: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert message in error_of("export", model, out, "--calib", chats, "--recipe", recipe)
    nothing_written()


def test_missing_recipe(model: Path, chats: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written) -> None:
    line = error_of("export", model, out, "--calib", chats, "--recipe", tmp_path / "none.yaml")
    assert "none.yaml" in line
    nothing_written()


# export: calibration data


@pytest.mark.parametrize("count", [0, -1])
def test_no_calibration_samples_asked(
    count: int, model: Path, chats: Path, out: Path, error_of: Check, nothing_written
) -> None:
    line = error_of("export", model, out, "--calib", chats, "--calib-samples", count)
    assert f"expected at least 1 sample, got --calib-samples {count}" in line
    nothing_written()


def test_calibration_folder_that_is_neither_folder_nor_task(
    model: Path, out: Path, error_of: Check, nothing_written
) -> None:
    line = error_of("export", model, out, "--calib", "nowhere")
    assert "expected a folder or built-in tasks (cifar10, counting, easyvqa," in line
    nothing_written()


@pytest.mark.parametrize("content", [{}, {"a.png": b"x"}, {"a.json": b"[]"}, {"a.jsonl": b"", "b.jsonl": b""}])
def test_calibration_folder_without_its_one_jsonl(
    content: dict[str, bytes], model: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    assert "expected one .jsonl file of chats, got" in error_of("export", model, out, "--calib", folder)
    nothing_written()


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_calibration_file_without_a_chat(
    text: str, model: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    (folder / "chats.jsonl").write_text(text)
    assert "expected at least one chat, got none" in error_of("export", model, out, "--calib", folder)
    nothing_written()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"messages": 5}',
        '{"messages": ["hello"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"content": "hello"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "user", "content": ["hello"]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
        '{"messages": [{"role": "user", "content": [{"type": "imgae", "text": "hello"}]}]}',
    ],
)
def test_line_that_is_no_chat_is_named_by_its_number(
    line: str, model: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = write_chats(tmp_path / "calibration", 2)
    with (folder / "chats.jsonl").open("a") as file:
        file.write(line + "\n")
    message = error_of("export", model, out, "--calib", folder)
    assert "calibration data chats.jsonl:3: expected" in message
    nothing_written()


def test_calibration_file_that_is_no_utf8(
    model: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = write_chats(tmp_path / "calibration", 1)
    (folder / "chats.jsonl").write_bytes(b'{"messages": "\xff\xfe"}\n')
    assert "chats.jsonl" in error_of("export", model, out, "--calib", folder)
    nothing_written()


def test_missing_image_of_a_chat_is_named_with_its_line(
    model: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = write_chats(tmp_path / "calibration", 2)
    (folder / "1.png").unlink()
    message = error_of("export", model, out, "--calib", folder)
    assert "chats.jsonl:2: expected image" in message
    assert "1.png" in message
    nothing_written()


def test_unreadable_image_of_a_chat_is_named_with_its_line(
    checkpoint: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = write_chats(tmp_path / "calibration", 2)
    (folder / "1.png").write_bytes(b"no picture")
    message = error_of("export", checkpoint, out, "--calib", folder, "--calib-samples", 2)
    assert "chats.jsonl:2: the processor refused the sample" in message
    nothing_written()


def test_calibration_without_an_image(
    checkpoint: Path, out: Path, tmp_path: Path, error_of: Check, nothing_written
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    message = error_of("export", checkpoint, out, "--calib", folder, "--calib-samples", 1)
    assert "expected at least one sample with an image" in message
    nothing_written()


# export: OUT


def test_existing_folder_with_files_needs_force(model: Path, chats: Path, tmp_path: Path, error_of: Check) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "use --force" in error_of("export", model, out, "--calib", chats)
    assert "no export.json" in error_of("export", model, out, "--calib", chats, "--force")
    assert listing(out) == {"mine.txt": b"mine"}


def test_failed_export_with_force_keeps_the_earlier_one(
    exported: Path, model: Path, chats: Path, error_of: Check
) -> None:
    before = listing(exported)
    error_of("export", model, exported, "--calib", chats, "--calib-samples", 2, "--force")
    assert listing(exported) == before
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


def test_out_that_is_a_file(model: Path, chats: Path, tmp_path: Path, error_of: Check) -> None:
    (tmp_path / "out").write_text("mine")
    assert "expected a folder, got a file" in error_of("export", model, tmp_path / "out", "--calib", chats)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("inside", ["out", "deep/out"])
def test_out_inside_the_model_folder(inside: str, checkpoint: Path, chats: Path, error_of: Check) -> None:
    before = sorted(checkpoint.rglob("*"))
    line = error_of("export", checkpoint, checkpoint / inside, "--calib", chats, "--calib-samples", 2)
    assert "expected a folder outside the model's" in line
    assert sorted(checkpoint.rglob("*")) == before


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("state", ["out", "out/state"])
def test_calibration_state_in_the_folder_of_the_export(
    state: str, dry: bool, model: Path, out: Path, tmp_path: Path, chats: Path, error_of: Check, nothing_written
) -> None:
    # The export takes OUT's name at the very end, and cannot while the state lies there.
    options = ["--calib", chats, "--calib-samples", 2, "--state", out.parent / state, *(["--dry-run"] if dry else [])]
    assert f"state {out.parent / state}: expected a folder outside {out}" in error_of("export", model, out, *options)
    nothing_written()


def test_current_folder_given_as_out(
    model: Path, chats: Path, tmp_path: Path, error_of: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "output .: expected the name of a folder" in error_of("export", model, ".", "--calib", chats)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (SplitQError, 2), ("SIGTERM", 143)])
@pytest.mark.parametrize("earlier", [False, True])
def test_stop_while_the_graphs_are_written_leaves_nothing_new(
    error: type[BaseException] | str,
    code: int,
    earlier: bool,
    checkpoint: Path,
    chats: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from splitq_edge.commands import export

    def stop(_loaded: object, _quantized: object, _request: object, folder: Path) -> None:
        (folder / "decoder.onnx").write_bytes(b"half of it")
        if isinstance(error, str):
            signal.raise_signal(signal.Signals[error])
        else:
            raise error("stop")

    monkeypatch.setattr(export, "write_export", stop)
    place = exported.parent
    before = listing(place)
    target = exported if earlier else place / "new"
    options = ["--calib", str(chats), "--calib-samples", "2", "--scheme", "none", "--force"]
    result = CliRunner().invoke(main, ["export", str(checkpoint), str(target), *options])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.split("\n")) == 2 + (code > 2)  # the line, behind one that ends a progress bar
    assert listing(place) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in place.iterdir()] == ["exported"]


# run, verify, eval: the exported folder

COMMANDS = [("run", "--prompt", "hello"), ("verify",), ("eval", "--limit", "2", "--backend", "ort-functions")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_missing_exported_folder(command: tuple[str, ...], tmp_path: Path, error_of: Check) -> None:
    name, *options = command
    assert "expected a folder, found none" in error_of(name, tmp_path / "absent", *options)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_folder_without_manifest(command: tuple[str, ...], exported: Path, error_of: Check) -> None:
    (exported / EXPORT_FILE).unlink()
    name, *options = command
    assert "expected export.json, found none" in error_of(name, exported, *options)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_newer_schema(command: tuple[str, ...], exported: Path, error_of: Check) -> None:
    write_manifest(exported, schema=EXPORT_SCHEMA + 1)
    name, *options = command
    line = error_of(name, exported, *options)
    assert f"expected schema {EXPORT_SCHEMA} or older, got {EXPORT_SCHEMA + 1}; upgrade splitq-edge" in line


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_truncated_file_of_the_export(command: tuple[str, ...], exported: Path, error_of: Check) -> None:
    (exported / "decoder.onnx").write_bytes(b"gra")
    name, *options = command
    line = error_of(name, exported, *options)
    assert "decoder.onnx: expected 16 bytes, got 3" in line


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_missing_file_of_the_export(command: tuple[str, ...], exported: Path, error_of: Check) -> None:
    (exported / "embed_tokens.onnx").unlink()
    name, *options = command
    assert "embed_tokens.onnx: expected a file of" in error_of(name, exported, *options)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("content", [{"files": []}, {"files": {"decoder.onnx": 16}}])
def test_manifest_of_another_form(
    content: dict[str, object], command: tuple[str, ...], exported: Path, error_of: Check
) -> None:
    write_manifest(exported, **content)
    name, *options = command
    assert "export the model again" in error_of(name, exported, *options)


def test_graph_that_onnxruntime_cannot_load(exported: Path, checkpoint: Path, error_of: Check) -> None:
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, exported / path.name)
    write_manifest(exported, image_tokens=16, hidden_size=96, image_token_id=3, eos_token_ids=[2], pad_token_id=0)
    line = error_of("run", exported, "--prompt", "hello", "--functions")
    assert "ONNX Runtime cannot load it" in line


def test_folder_without_processor_cannot_answer(exported: Path, error_of: Check) -> None:
    assert "processor" in error_of("run", exported, "--prompt", "hello", "--functions")


def test_changed_file_of_the_same_size_is_found_by_verify(exported: Path, error_of: Check) -> None:
    (exported / "decoder.onnx").write_bytes(b"GRAPH of decoder")
    line = error_of("verify", exported, "--functions")
    assert "decoder.onnx: expected sha256" in line


def test_export_without_parity_samples_cannot_be_verified(exported: Path, error_of: Check) -> None:
    assert "parity.npz: expected the parity samples" in error_of("verify", exported, "--functions")


# run: pictures and prompt


def test_missing_image_for_run(exported: Path, tmp_path: Path, error_of: Check) -> None:
    line = error_of("run", exported, "--prompt", "hello", "--image", tmp_path / "absent.png")
    assert "absent.png: expected a file, found none" in line


@pytest.mark.parametrize("damage", ["text", "empty", "half"])
def test_unreadable_image_for_run(damage: str, exported: Path, tmp_path: Path, error_of: Check) -> None:
    path = write_image(tmp_path / "bad.png")
    content = {"text": b"no picture", "empty": b"", "half": path.read_bytes()[:2000]}
    path.write_bytes(content[damage])
    line = error_of("run", exported, "--prompt", "hello", "--image", path)
    assert "bad.png: expected a readable picture" in line


def test_folder_given_as_image(exported: Path, tmp_path: Path, error_of: Check) -> None:
    assert "expected a readable picture" in error_of("run", exported, "--prompt", "hello", "--image", tmp_path)


def test_run_without_prompt_is_a_usage_error(exported: Path) -> None:
    result = CliRunner().invoke(main, ["run", str(exported)])
    assert result.exit_code == 2
    assert "--prompt" in result.stderr


# eval


def test_unknown_task_lists_the_known(exported: Path, error_of: Check) -> None:
    line = error_of("eval", exported, "--task", "mmmu")
    assert "task 'mmmu': expected one of cifar10, counting, easyvqa," in line


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one(limit: int, exported: Path, error_of: Check, tmp_path: Path) -> None:
    line = error_of("eval", exported, "--limit", limit, "--json", tmp_path / "result.json")
    assert f"expected --limit of 1 or more, got {limit}" in line
    assert not (tmp_path / "result.json").exists()


def test_exported_folder_given_to_the_torch_backend(exported: Path, error_of: Check) -> None:
    assert "expected a checkpoint" in error_of("eval", exported, "--backend", "torch", "--limit", 2)


def test_checkpoint_given_to_the_onnxruntime_backend(checkpoint: Path, error_of: Check) -> None:
    assert "expected export.json, found none" in error_of(
        "eval", checkpoint, "--backend", "ort-functions", "--limit", 2
    )


# NPUs


@pytest.fixture
def static(exported: Path) -> Path:
    """The manifest of static graphs that carries no more than `compile` reads."""
    write_manifest(exported, flavour="qdq", static={"context": 8, "chunk": 2, "blocked": -100.0, "text_rows": False})
    return exported


@pytest.mark.parametrize(
    "command", [("compile",), ("verify", "--target", "qnn-htp:v73")], ids=lambda command: command[0]
)
@pytest.mark.parametrize("flavour", ["packed", "portable"])
def test_npu_asked_of_another_flavour(command: tuple[str, ...], flavour: str, exported: Path, error_of: Check) -> None:
    write_manifest(exported, flavour=flavour)
    name, *options = command
    line = error_of(name, exported, *options)
    assert "expected the flavour qdq" in line
    assert "export it with --flavour qdq" in line
    assert not (exported / "compiled").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("export", "MODEL", "OUT", "--flavour", "qdq", "--target", "qnn-htp:v74"),
        ("compile", "OUT", "--arch", "74"),
        ("compile", "OUT", "--target", "coreml"),
        ("verify", "OUT", "--target", "qnn-htp"),
        ("eval", "OUT", "--backend", "qnn-htp:v74"),
    ],
    ids=" ".join,
)
def test_unknown_npu(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    known = "73', '75', '79" if "--arch" in command else "qnn-htp"
    assert f"'{command[-1]}' is not" in result.stderr
    assert known in result.stderr


def test_target_without_static_graphs(model: Path, out: Path, error_of: Check) -> None:
    assert "add --flavour qdq" in error_of("export", model, out, "--target", "qnn-htp:v73")


def test_missing_plugin(static: Path, error_of: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    qnn._plugin.cache_clear()
    line = error_of("compile", static)
    assert "expected the package onnxruntime-qnn, found none; run: pip install 'splitq-edge[qnn]'" in line
    assert list((static / "compiled").iterdir()) == []


@pytest.mark.parametrize(
    "command", [("verify", "--target"), ("eval", "--limit", "2", "--backend")], ids=lambda command: command[0]
)
def test_not_compiled(command: tuple[str, ...], static: Path, error_of: Check) -> None:
    name, *options = command
    line = error_of(name, static, *options, "qnn-htp:v75")
    assert f"run: splitq-edge compile {static} --target qnn-htp --arch 75" in line


def test_interrupted_compilation_leaves_what_was_there(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn, "versions", dict)
    monkeypatch.setattr(qnn, "compile_part", lambda source, out, _target: out.write_bytes(source.read_bytes()))
    compiled = CliRunner().invoke(main, ["compile", str(static)])
    assert compiled.exit_code == 0, compiled.output
    before = listing(static)
    assert {f"compiled/qnn-htp-v73/{name}" for name in ("compiled.json", "decoder.onnx")} <= set(before)

    def interrupted(_source: Path, out: Path, _target: object) -> None:
        out.write_bytes(b"half")
        if out.name == "decoder.onnx":
            raise KeyboardInterrupt

    monkeypatch.setattr(qnn, "compile_part", interrupted)
    result = CliRunner().invoke(main, ["compile", str(static)])
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted; nothing was changed"
    assert listing(static) == before


# the form of the failure itself


def test_debug_shows_the_traceback(exported: Path) -> None:
    result = CliRunner().invoke(main, ["--debug", "verify", str(exported / "absent")])
    assert type(result.exception).__name__ == "SplitQError"


def test_real_process_exits_with_two_and_one_line(exported: Path, tmp_path: Path) -> None:
    (exported / EXPORT_FILE).write_text(json.dumps({"schema": 99, "files": {}}))
    command = [sys.executable, "-m", "splitq_edge.cli", "verify", str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="no pipes that break")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(unbuffered: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "splitq_edge.cli", "doctor"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, **pipes
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
