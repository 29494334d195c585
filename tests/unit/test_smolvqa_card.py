"""The card of smolvqa-135m says what its results file holds."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from builders import load_script
from click.testing import CliRunner

from splitq_edge.evaluate.results import Results, Row

SCRIPT = Path(__file__).parents[2] / "models" / "smolvqa-135m" / "tables.py"


@pytest.fixture
def tables() -> ModuleType:
    return load_script(SCRIPT)


def test_card_has_every_line_of_the_tables(tables: ModuleType) -> None:
    result = CliRunner().invoke(tables.main, ["--check"])
    assert result.exit_code == 0, result.output


def row(method: str, scheme: str, task: str, accuracy: float, **values: object) -> Row:
    settings = {"backend": "ort-native", "n": 500, "stderr": 0.01, "nll": 0.1, "effective_bits": 4.0}
    return Row(method, scheme, task=task, accuracy=accuracy, calibration_s=12.0, **(settings | values))  # type: ignore[arg-type]


def test_a_row_that_the_card_lacks_is_named(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "results.json", tables.MODEL)
    again = Results(tmp_path / "results-seed1.json", tables.MODEL)
    for place, task in enumerate(tables.TASKS):
        results.put(row("fp32", "none", task, 0.9))
        results.put(row("splitq, 4 epochs", "W3A3", task, 0.8 + place / 100, calibrated_on="cuda"))
        results.put(row("mac: all, 4 epochs", "W3A3", task, 0.7))
        results.put(row("components: +CWS", "W3A2", task, 0.6, kl=0.5))
        again.put(row("components: +CWS", "W3A2", task, 0.58, kl=0.75, seed=1))
    (tmp_path / "README.md").write_text("nothing\n")
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    result = CliRunner().invoke(tables.main, ["--check"])
    assert result.exit_code == 1
    # 0.825 of 0.9; a standard error of six means with 0.01 each is 0.01 / sqrt(6)
    assert "| **splitq** |  |  |  |  | 82.50 ± 0.41 | 91.7 |  |  |" in result.output
    expected = "| 80.0 | 81.0 | 82.0 | 83.0 | 84.0 | 85.0 | 82.50 ± 0.41 | 91.7 | 4.00 | 12, GPU |"
    assert f"| splitq, 4 epochs {expected}" in result.output
    assert "| all, 4 epochs | 70.0 |" in result.output
    assert "| W3A2, +CWS | 60.00 ± 0.41 | 0.500 | 58.00 ± 0.41 | 0.750 |" in result.output
    printed = CliRunner().invoke(tables.main, ["--plot", str(tmp_path / "plot.png")])
    assert printed.exit_code == 0, printed.output
    (tmp_path / "README.md").write_text(printed.output)
    assert CliRunner().invoke(tables.main, ["--check"]).exit_code == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
