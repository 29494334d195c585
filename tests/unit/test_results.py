"""The results file and its tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.evaluate import results as results_module
from splitq_edge.evaluate.results import RESULTS_SCHEMA, Results, Row, averages, render, render_markdown


def row(method: str = "rtn", scheme: str = "W4A8", **changes: Any) -> Row:
    values = {"n": 9673, "accuracy": 0.998900, "stderr": 0.000337, "nll": 0.0123457, "effective_bits": 4.0}
    return Row(
        method, scheme, **{"backend": "ort-native", "task": "easyvqa", "calibration_s": 1.0, **values, **changes}
    )


def test_rows_have_exactly_these_keys() -> None:
    keys = "method scheme backend task n accuracy stderr nll effective_bits calibration_s"
    more = "nll_stderr kl kl_stderr calib_samples seed calibrated_on"
    assert list(asdict(row())) == keys.split() + more.split()


def test_floats_are_rounded() -> None:
    measured = row(accuracy=1 / 3, stderr=2 / 3e3, nll=1.23456789e-5, effective_bits=4.107421875, calibration_s=12.3456)
    stored = (measured.accuracy, measured.stderr, measured.nll, measured.effective_bits, measured.calibration_s)
    assert stored == (0.333333, 0.000667, 1.23457e-5, 4.1074, 12.3)


def test_file_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.json"
    results = Results(path, "tiny")
    for count, method in enumerate(("rtn", "gptq"), start=1):
        results.put(row(method))
        content = json.loads(path.read_text())
        assert content["schema"] == RESULTS_SCHEMA
        assert content["model"] == "tiny"
        assert len(content["rows"]) == count
    assert Results(path, "tiny").rows == [row("rtn"), row("gptq")]


def test_row_of_the_same_key_is_replaced_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = Results(path, "tiny")
    for added in (row("rtn"), row("gptq"), row("rtn", accuracy=0.5), row("rtn", "W4A4"), row("rtn", task="other")):
        results.put(added)
    found = Results(path, "tiny")
    assert found.rows == [row("rtn", accuracy=0.5), row("gptq"), row("rtn", "W4A4"), row("rtn", task="other")]
    assert found.get(row("gptq").key) == row("gptq")
    assert found.get(row("awq").key) is None


def test_two_writers_of_one_file_keep_each_others_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first, second = Results(path, "tiny"), Results(path, "tiny")
    first.put(row("rtn"))
    second.put(row("gptq"))
    first.put(row("awq"))
    assert {each.method for each in Results(path, "tiny").rows} == {"rtn", "gptq", "awq"}


def test_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    results = Results(path, "tiny")
    results.put(row("rtn"))
    before = path.read_bytes()

    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("splitq_edge.artifacts.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        results.put(row("gptq"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"schema": 1, "model": "tiny", "rows": [{"method": "rtn"}]}', '{"schema": 1, "rows": []}'],
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match="expected a results file"):
        Results(path, "tiny")
    assert path.read_text() == content


def test_newer_schema_is_refused_by_number(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": RESULTS_SCHEMA + 1, "model": "tiny", "rows": []}))
    with pytest.raises(ArtifactError, match=f"expected schema {RESULTS_SCHEMA} or older, got {RESULTS_SCHEMA + 1}"):
        Results(path, "tiny")


def test_rows_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, "tiny").put(row())
    with pytest.raises(SplitQError, match="expected rows of model large, got 'tiny'"):
        Results(path, "large")


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SplitQError, match="expected a file name in a writable folder"):
        Results(tmp_path, "tiny")


def several(tmp_path: Path) -> Results:
    results = Results(tmp_path / "results.json", "tiny")
    results.put(row("fp32", "none", effective_bits=32, calibration_s=0, nll=0.00099))
    for method, scheme in (("rtn", "W4A8"), ("rtn", "W3A2"), ("splitq", "W4A8")):
        results.put(row(method, scheme, calibration_s=12.3456))
    return results


def test_markdown_keeps_the_rows_of_a_scheme_together(tmp_path: Path) -> None:
    assert render_markdown(several(tmp_path)).splitlines() == [
        "tiny, easyvqa, ort-native",
        "",
        "| scheme | method | n | accuracy % | NLL | KL | bits | calib. s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| none | fp32 | 9673 | 99.89 ± 0.03 | 0.00099 | 0 | 32.00 | 0 |",
        "| W4A8 | rtn | 9673 | 99.89 ± 0.03 | 0.01235 | 0 | 4.00 | 12 |",
        "| W4A8 | splitq | 9673 | 99.89 ± 0.03 | 0.01235 | 0 | 4.00 | 12 |",
        "| W3A2 | rtn | 9673 | 99.89 ± 0.03 | 0.01235 | 0 | 4.00 | 12 |",
    ]


def test_tables_of_other_tasks_stand_apart(tmp_path: Path) -> None:
    results = several(tmp_path)
    results.put(row("rtn", task="other"))
    assert render_markdown(results).count("| scheme |") == 3  # with the averages
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(results))
    printed = capture.get()
    assert "tiny, easyvqa, ort-native" in printed
    assert "tiny, other, ort-native" in printed
    assert printed.count("99.89 ± 0.03") == 5


def test_averages_hold_only_methods_measured_on_every_task() -> None:
    float_rows = [row("fp32", "none", task=task, accuracy=value) for task, value in (("a", 1.0), ("b", 0.6))]
    assert averages(float_rows[:1]) == []
    quantized = [row("rtn", task="a", accuracy=0.9, stderr=0.03), row("rtn", task="b", accuracy=0.5, stderr=0.04)]
    means = averages([*float_rows, *quantized, row("gptq", task="a")])
    assert [(mean.method, mean.scheme) for mean in means] == [("fp32", "none"), ("rtn", "W4A8")]
    assert means[0].accuracy == pytest.approx(0.8)
    assert means[0].retained == 1.0
    assert means[1].accuracy == pytest.approx(0.7)
    assert means[1].stderr == pytest.approx(0.025)
    assert means[1].retained == pytest.approx(0.7 / 0.8)


def test_render_shows_every_column_in_eighty_characters(tmp_path: Path) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(several(tmp_path)))
    assert all(name in capture.get() for name in results_module.COLUMNS)
