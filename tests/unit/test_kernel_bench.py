"""The benchmark of the layers runs where it once did not: hundreds of small copies, and many rows, compared first."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from splitq_edge.runtime_ops import library_path

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/bench/kernels.py, which imports its neighbours by their bare names."""
    if library_path() is None:
        pytest.skip("needs the native library")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("kernels")


@pytest.mark.parametrize(
    ("shape", "rows", "case", "cold_mb"),
    [("256x256", 1, "MatMulNBits 4 bits b128", 10), ("2048x2048", 512, "W4A8", 1)],
)
def test_runs_and_compares(kernels: ModuleType, tmp_path: Path, shape: str, rows: int, case: str, cold_mb: int) -> None:
    file = tmp_path / "kernels.json"
    setting = ["--shapes", shape, "--rows", str(rows), "--threads", "1", "--rounds", "1", "--cold-mb", str(cold_mb)]
    result = CliRunner().invoke(kernels.main, [*setting, "--cases", f"{case},W3A8", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert {row["M"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]} == {rows}


@pytest.mark.parametrize(
    ("option", "value"), [("--shapes", "2048"), ("--shapes", "7x3"), ("--rows", "0"), ("--native", "missing.so")]
)
def test_refuses_in_one_line(kernels: ModuleType, tmp_path: Path, option: str, value: str) -> None:
    wrong = str(tmp_path / value) if option == "--native" else value
    result = CliRunner().invoke(kernels.main, [option, wrong])
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.output.splitlines()[-1].startswith("Error: ")
