"""Where a result goes is checked before the questions are asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitq_edge.artifacts import check_writable, write_json
from splitq_edge.errors import SplitQError


def test_json_path_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SplitQError, match="expected a file name in a writable folder"):
        check_writable(tmp_path / "file" / "result.json")


def test_json_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SplitQError, match="expected a file name in a writable folder"):
        write_json(tmp_path, {})


def test_missing_folders_of_the_json_path_are_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "result.json", {"n": 1})
    assert '"n": 1' in (tmp_path / "a" / "b" / "result.json").read_text()
