"""The smoke of smolvqa-135m's accuracy: what is recorded, compared and kept. Measuring is faked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from builders import load_script
from click.testing import CliRunner, Result

from splitq_edge.evaluate.results import Results, Row

SCRIPT = Path(__file__).resolve().parents[2] / "models" / "smolvqa-135m" / "smoke.py"


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, its record in a folder of the test."""
    module = load_script(SCRIPT)
    monkeypatch.setattr(module, "RECORD", tmp_path / "smoke.json")
    return module


@pytest.fixture
def measure(smoke: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the script on a model of the given NLL; None for one that cannot be measured."""

    def run(nll: float | None, *more: str) -> Result:
        def table(options: object, _rows: object, _console: object) -> int:
            if nll is None:
                return 1
            row = Row("rtn", "W4A8", "ort-native", "ocr", 25, 0.92, 0.05, nll, 4.0, 1.0)
            Results(options.results, "tiny").put(row)  # type: ignore[attr-defined]
            return 0

        monkeypatch.setattr(smoke, "run_table", table)
        return CliRunner().invoke(smoke.main, ["models/tiny", "--work", str(tmp_path / "work"), *more])

    return run


def test_recorded_numbers_hold_until_they_move(measure: Callable[..., Result]) -> None:
    assert measure(0.5, "--record").exit_code == 0
    assert measure(0.53).exit_code == 0
    moved = measure(0.6)
    assert moved.exit_code == 1
    assert "accuracy moved" in moved.output


def test_without_a_record_there_is_nothing_to_compare_with(measure: Callable[..., Result], tmp_path: Path) -> None:
    result = measure(0.5)
    assert result.exit_code == 1
    assert "smoke.json: expected what to compare with, found none; make it with --record" in result.output
    assert not (tmp_path / "work").exists()


def test_record_that_fails_keeps_the_earlier_one(measure: Callable[..., Result], smoke: ModuleType) -> None:
    measure(0.5, "--record")
    before = smoke.RECORD.read_bytes()
    assert measure(None, "--record").exit_code == 1
    assert smoke.RECORD.read_bytes() == before


def test_tasks_may_move_where_their_mean_may_not(smoke: ModuleType, tmp_path: Path) -> None:
    def changed(shift: dict[str, float], scheme: str = "W4A8") -> int:
        before, after = tmp_path / "smoke.json", tmp_path / "after.json"
        for path in (before, after):
            path.unlink(missing_ok=True)
        for task, moved in shift.items():
            row = Row("rtn", scheme, "ort-native", task, 50, 0.80, 0.05, 0.5, 4.0, 1.0)
            Results(before, "tiny").put(row)
            Results(after, "tiny").put(replace(row, accuracy=0.80 + moved))

        def table(options: object, _rows: object, _console: object) -> int:
            options.results.write_bytes(after.read_bytes())  # type: ignore[attr-defined]
            return 0

        smoke.run_table = table  # type: ignore[attr-defined]
        return CliRunner().invoke(smoke.main, ["models/tiny", "--work", str(tmp_path / "work")]).exit_code

    assert changed({"ocr": 0.12, "counting": -0.12}) == 0
    assert changed({"ocr": 0.12, "counting": 0.0}) == 1  # the mean by 0.06
    assert changed({"ocr": 0.22, "counting": -0.22}) == 1
    assert changed({"ocr": 0.08, "counting": -0.08}, "none") == 1  # float tips at most a near tie
