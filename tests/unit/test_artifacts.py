"""Files on disk: published whole or not at all, and refused by name when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from splitq_edge.artifacts import (
    EXPORT_FILE,
    EXPORT_SCHEMA,
    check_target,
    file_table,
    read_export,
    sha256_of,
    staged_folder,
    write_json,
)
from splitq_edge.errors import ArtifactError, SplitQError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_export(folder: Path, **changes: Any) -> Path:
    """A folder that passes `read_export`: two files and their manifest."""
    folder.mkdir(parents=True)
    (folder / "decoder.onnx").write_bytes(b"graph")
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_bytes(b"words")
    content = {"schema": EXPORT_SCHEMA, "files": file_table(folder), **changes}
    write_json(folder / EXPORT_FILE, content)
    return folder


# staged_folder


def test_staged_folder_appears_whole_when_the_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, force=False) as staging:
        (staging / "a.txt").write_text("a")
        assert not out.exists()
        assert staging.parent == out.parent  # a rename, not a copy across file systems
    assert (out / "a.txt").read_text() == "a"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, SplitQError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["absent", "empty", "export"])
def test_failure_in_the_block_leaves_everything_as_it_was(
    error: type[BaseException], before: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    elif before == "export":
        make_export(out)
    listing = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def fail() -> None:
        with staged_folder(out, force=True) as staging:
            (staging / "half.onnx").write_bytes(b"half")
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == listing


def test_published_folder_and_manifest_have_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "out", force=False) as staging:
            write_json(staging / EXPORT_FILE, {})
            (staging / "plain").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "plain").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out" / EXPORT_FILE).stat().st_mode & 0o777 == 0o640


def test_existing_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out", force=False) as staging:
        (staging / "a").touch()
    assert names(tmp_path / "out") == ["a"]
    assert names(tmp_path) == ["out"]


def test_force_replaces_an_earlier_export_entirely(tmp_path: Path) -> None:
    out = make_export(tmp_path / "out")
    with staged_folder(out, force=True) as staging:
        (staging / "new").touch()
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_earlier_export_stands_until_the_new_one_is_ready(tmp_path: Path) -> None:
    out = make_export(tmp_path / "out")
    with staged_folder(out, force=True) as staging:
        (staging / "new").touch()
        assert read_export(out)["schema"] == EXPORT_SCHEMA


def test_earlier_export_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_export(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == out and self.name != "old":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)

    def publish() -> None:
        with staged_folder(out, force=True) as staging:
            (staging / "new").touch()

    with pytest.raises(OSError, match="disk full"):
        publish()
    assert names(tmp_path) == ["out"]
    assert read_export(out)["schema"] == EXPORT_SCHEMA


def test_first_rename_that_fails_leaves_the_earlier_export_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_export(tmp_path / "out")

    def refuse(*_: object) -> None:
        raise OSError("busy")

    monkeypatch.setattr(Path, "rename", refuse)

    def publish() -> None:
        with staged_folder(out, force=True) as staging:
            (staging / "new").touch()

    with pytest.raises(OSError, match="busy"):
        publish()
    assert names(tmp_path) == ["out"]
    assert read_export(out)["schema"] == EXPORT_SCHEMA


@pytest.mark.parametrize(
    ("content", "force", "message"),
    [
        ({"a.txt": "x"}, False, "expected an empty or new folder, it has files; use --force"),
        ({EXPORT_FILE: "{}"}, False, "expected an empty or new folder, it has files; use --force"),
        ({"a.txt": "x"}, True, "only what splitq-edge wrote is replaced and this one has no export.json"),
        (None, False, "expected a folder, got a file"),
        (None, True, "expected a folder, got a file"),
    ],
)
def test_target_that_may_not_be_replaced_is_refused_and_kept(
    content: dict[str, str] | None, force: bool, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if content is None:
        out.write_text("file")
    else:
        out.mkdir()
        for name, text in content.items():
            (out / name).write_text(text)
    for action in (lambda: check_target(out, force=force), lambda: staged_folder(out, force=force).__enter__()):
        with pytest.raises(SplitQError, match=message):
            action()
    assert names(tmp_path) == ["out"]
    assert out.is_file() if content is None else names(out) == sorted(content)


def test_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SplitQError, match="expected a writable place"):
        staged_folder(tmp_path / "file" / "out", force=False).__enter__()


def test_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def access(path: Path, _mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr("splitq_edge.artifacts.os.access", access)
    with pytest.raises(SplitQError, match=r"out: expected a writable place, .* is none; choose another"):
        check_target(tmp_path / "new" / "out", force=False)
    assert asked == [tmp_path]
    assert names(tmp_path) == []


@pytest.mark.parametrize("out", ["", ".", "..", "/", "a/.."])
def test_target_without_a_name_of_its_own_is_refused(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SplitQError, match="expected the name of a folder, got no name; write it out"):
        check_target(Path(out), force=True)


# write_json


def test_json_ends_with_a_newline_and_makes_its_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"b": [1, 2]})
    text = (tmp_path / "deep" / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"b": [1, 2]}


def test_json_that_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": [1, 2, object()]})
    assert json.loads(path.read_text()) == {"old": True}
    assert names(tmp_path) == ["a.json"]


def test_interrupted_rename_of_json_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert names(tmp_path) == ["a.json"]


# hashes


def test_file_table_lists_sizes_and_hashes_by_relative_path(tmp_path: Path) -> None:
    table = file_table(make_export(tmp_path / "out"))
    assert list(table) == ["decoder.onnx", "sub/vocab.txt"]  # export.json cannot hold its own hash
    graph = "eef93e1d14482804277fca0172464032d1a4fdbcc338524059fa1e861454ad4d"  # printf graph | sha256sum
    assert table["decoder.onnx"] == {"bytes": 5, "sha256": graph}


def test_hash_of_a_file_of_several_chunks(tmp_path: Path) -> None:
    import hashlib

    content = os.urandom(1 << 10) * 2500  # 2.5 MB: two and a half chunks
    (tmp_path / "big").write_bytes(content)
    assert sha256_of(tmp_path / "big") == hashlib.sha256(content).hexdigest()


# read_export


def test_whole_export_is_read(tmp_path: Path) -> None:
    assert read_export(make_export(tmp_path / "out", scheme="W4A8"))["scheme"] == "W4A8"


def test_missing_folder_is_the_users_mistake_not_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(SplitQError, match="expected a folder, found none") as raised:
        read_export(tmp_path / "none")
    assert not isinstance(raised.value, ArtifactError)


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected export\.json, found none"):
        read_export(tmp_path)


@pytest.mark.parametrize("schema", [EXPORT_SCHEMA + 1, 99, "1", None])
def test_newer_or_strange_schema_is_refused_by_number(schema: object, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"expected schema 1 or older, got {schema!r}"):
        read_export(make_export(tmp_path / "out", schema=schema))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"{}", b'{"schema": 1}', b'"schema"', b"\xff\xfe{}"],
    ids=["empty", "half", "list", "null", "no_keys", "no_files", "string", "no_utf8"],
)
def test_damaged_manifest_is_refused_in_one_line(text: bytes, tmp_path: Path) -> None:
    out = make_export(tmp_path / "out")
    (out / EXPORT_FILE).write_bytes(text)
    with pytest.raises(ArtifactError, match="expected the JSON of an export") as raised:
        read_export(out)
    assert "\n" not in str(raised.value)


def test_truncated_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    out = make_export(tmp_path / "out")
    (out / "decoder.onnx").write_bytes(b"gra")
    with pytest.raises(ArtifactError, match=r"decoder\.onnx: expected 5 bytes, got 3"):
        read_export(out)


def test_missing_listed_file_is_refused(tmp_path: Path) -> None:
    out = make_export(tmp_path / "out")
    (out / "sub" / "vocab.txt").unlink()
    with pytest.raises(ArtifactError, match=r"vocab\.txt: expected a file of 5 bytes, found none"):
        read_export(out)


def test_files_beside_the_listed_ones_do_not_matter(tmp_path: Path) -> None:
    out = make_export(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    assert read_export(out)["schema"] == EXPORT_SCHEMA
