"""`splitq-edge table` with faked exports and evaluations: which rows are measured, kept, and lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from splitq_edge.artifacts import EXPORT_FILE, write_json
from splitq_edge.cli import main
from splitq_edge.commands import table
from splitq_edge.commands.table import ablation_rows
from splitq_edge.config import QuantConfig, preset
from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.tasks import Question

Pair = tuple[str, str]
QUESTIONS = 20


class Fakes:
    """Stand-ins for export and evaluation; `fail` maps method and scheme to what the export raises."""

    def __init__(self) -> None:
        self.exported: list[Pair] = []
        self.options: list[Any] = []
        self.configs: list[QuantConfig | None] = []
        self.folders: list[Path] = []
        self.fail: dict[Pair, BaseException] = {}
        self.eval_error: Exception | None = None

    def run_export(self, options: Any, _console: Console, config: QuantConfig | None) -> dict[str, Any]:
        pair = ("fp32" if config is None else config.method, options.scheme)
        self.options.append(options)
        self.configs.append(config)
        self.exported.append(pair)
        self.folders.append(options.out)
        options.out.mkdir()
        (options.out.parent / f"{options.out.name}.calibration").mkdir()
        if pair in self.fail:
            raise self.fail[pair]
        write_json(options.out / EXPORT_FILE, {"scheme": options.scheme})
        return {"calibration_s": 0.0 if options.scheme == "none" else 12.34, "calibrated_on": "cuda"}

    def run_eval(self, options: Any, _console: Console) -> dict[str, Any]:
        if self.eval_error is not None:
            raise self.eval_error
        assert (Path(options.model) / EXPORT_FILE).is_file()
        assert options.backend == "ort"
        values = {"n": options.limit or QUESTIONS, "accuracy": 0.75, "stderr": 0.01, "nll": 0.5, "nll_stderr": 0.1}
        asked = f"{options.task} {options.limit} {options.seed}"
        if options.save_reference is not None:
            options.save_reference.write_text(asked)
        else:
            assert options.reference.read_text() == asked
            values |= {"kl": 0.25, "kl_stderr": 0.01}
        return {"effective_bits": 4.1, "tasks": {options.task: values}}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes()
    monkeypatch.setattr(table, "run_export", fakes.run_export)
    monkeypatch.setattr(table, "run_eval", fakes.run_eval)
    monkeypatch.setattr(table, "require_native", lambda: None)
    monkeypatch.setattr(table, "check_model", lambda _source: None)
    questions = [Question(Path("0.png"), "what?", "red", "color")] * QUESTIONS
    monkeypatch.setattr(table, "load_task", lambda _task, _split: questions)
    return fakes


@pytest.fixture
def run(tmp_path: Path, fakes: Fakes) -> Callable[..., Result]:
    """Runs the command for two methods and two schemes."""

    def invoke(*more: str) -> Result:
        arguments = ["table", "models/tiny", "--results", str(tmp_path / "results.json")]
        arguments += ["--methods", "rtn,splitq", "--schemes", "W4A8,W3A3", "--work", str(tmp_path / "work"), *more]
        return CliRunner().invoke(main, arguments)

    assert fakes.exported == []
    return invoke


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["model"] == "tiny"
    return list(content["rows"])


ALL = [("fp32", "none"), ("rtn", "W4A8"), ("splitq", "W4A8"), ("rtn", "W3A3"), ("splitq", "W3A3")]


def exports(tmp_path: Path) -> list[str]:
    """What lies in the work folder beside the float model's answers."""
    return sorted(path.name for path in (tmp_path / "work").iterdir() if path.suffix != ".npz")


def test_every_method_is_measured_at_every_scheme_after_the_float_model(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    result = run("--calib-samples", "7", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert [(row["method"], row["scheme"]) for row in rows(tmp_path)] == ALL
    assert rows(tmp_path)[1] == {
        "method": "rtn",
        "scheme": "W4A8",
        "backend": "ort-native",
        "task": "easyvqa",
        "n": QUESTIONS,
        "accuracy": 0.75,
        "stderr": 0.01,
        "nll": 0.5,
        "effective_bits": 4.1,
        "calibration_s": 12.3,
        "nll_stderr": 0.1,
        "kl": 0.25,
        "kl_stderr": 0.01,
        "calib_samples": 7,
        "seed": 3,
        "calibrated_on": "cuda",
    }
    assert {(options.calib, options.calib_samples, options.seed) for options in fakes.options} == {("easyvqa", 7, 3)}
    assert result.output.count("75.00 ± 1.00") == len(ALL)


def test_fewer_epochs_are_those_of_methods_that_learn_and_in_their_labels(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    result = run("--epochs", "2")
    assert result.exit_code == 0, result.output
    labels = ["fp32", "rtn", "splitq, 2 epochs", "rtn", "splitq, 2 epochs"]
    assert [row["method"] for row in rows(tmp_path)] == labels
    assert [None if config is None else config.learning.epochs for config in fakes.configs] == [None, 0, 2, 0, 2]


def test_another_learning_rate_is_that_of_methods_that_learn_and_in_their_labels(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    assert run("--epochs", "2", "--transform-lr", "0.015", "--schemes", "W4A8").exit_code == 0
    assert run("--transform-lr", "0.015", "--schemes", "W4A8").exit_code == 0
    assert run("--epochs", "0", "--transform-lr", "0.015", "--schemes", "W4A8").exit_code == 0
    labels = ["splitq, 2 epochs at 0.015", "splitq, learning rate 0.015", "splitq, 0 epochs"]
    assert [row["method"] for row in rows(tmp_path)] == ["fp32", "rtn", *labels]
    rates = [config.learning.transform_lr for config in fakes.configs if config and config.method == "splitq"]
    assert rates == [0.015, 0.015, preset("W4A8").learning.transform_lr]


def test_kept_calibrations_are_gone_on_with_and_shared_by_rows_of_one_recipe(fakes: Fakes, tmp_path: Path) -> None:
    arguments = ["--results", str(tmp_path / "results.json"), "--work", str(tmp_path / "work")]
    arguments += ["--states", str(tmp_path / "states")]
    commands = (["table", "--methods", "rtn,splitq", "--schemes", "W3A3"], ["ablate", "--tables", "components"])
    for command, *options in commands:
        result = CliRunner().invoke(main, [command, "models/tiny", *options, *arguments])
        assert result.exit_code == 0, result.output
    assert all(
        (o.resume, o.keep_state) == (config is not None,) * 2
        for o, config in zip(fakes.options, fakes.configs, strict=True)
    )
    found = {tuple(pair): options.state for pair, options in zip(fakes.exported, fakes.options, strict=True)}
    assert found[("fp32", "none")] is None
    places = [options.state for options in fakes.options if options.scheme != "none"]
    assert all(place.parent == tmp_path / "states" for place in places)
    splitq = [place for place in places if place.name.startswith("splitq-W3A3-")]
    assert len(places) == 6  # rtn and splitq, then flatquant, +MOCD, +CWS and +MAC, which is splitq
    assert len(splitq) == 4
    assert len(set(splitq)) == 3
    assert run_with_seed(arguments, fakes) not in places


def run_with_seed(arguments: list[str], fakes: Fakes) -> Path | None:
    """Where the calibration of another seed is kept."""
    CliRunner().invoke(main, ["table", "models/tiny", "--methods", "rtn", "--redo", "--seed", "1", *arguments])
    kept: Path | None = fakes.options[-1].state
    return kept


def test_several_tasks_share_one_export_a_row(run: Callable[..., Result], fakes: Fakes, tmp_path: Path) -> None:
    result = run("--task", "ocr,counting")
    assert result.exit_code == 0, result.output
    assert [(row["method"], row["scheme"], row["task"]) for row in rows(tmp_path)] == [
        (*pair, task) for pair in ALL for task in ("ocr", "counting")
    ]
    assert fakes.exported == ALL
    assert {options.calib for options in fakes.options} == {"ocr,counting"}
    assert "tiny, average of 2 tasks, ort-native" in result.output


def test_a_row_that_lacks_a_task_is_measured_again(run: Callable[..., Result], fakes: Fakes) -> None:
    run("--task", "ocr")
    fakes.exported.clear()
    assert run("--task", "ocr,counting").exit_code == 0
    assert fakes.exported == ALL


def test_exports_are_deleted_after_their_evaluation(run: Callable[..., Result], fakes: Fakes, tmp_path: Path) -> None:
    run()
    assert len(set(fakes.folders)) == len(ALL)
    assert exports(tmp_path) == []


def test_exports_are_kept_on_demand_and_replaced_by_the_next(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    names = [f"tiny-{method}-{scheme}" for method, scheme in ALL]
    for _ in range(2):
        assert run("--keep", "--redo").exit_code == 0
        assert exports(tmp_path) == sorted(names)
        assert all((tmp_path / "work" / name / EXPORT_FILE).is_file() for name in names)


def test_kept_export_does_not_replace_other_files(run: Callable[..., Result], tmp_path: Path) -> None:
    place = tmp_path / "work" / "tiny-rtn-W4A8"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")
    result = run("--keep")
    assert result.exit_code == 1
    assert "error: rtn W4A8: output" in result.stdout
    assert (place / "mine.txt").read_text() == "mine"


def test_rows_of_the_file_are_kept(run: Callable[..., Result], fakes: Fakes, tmp_path: Path) -> None:
    run("--schemes", "W4A8")
    before = rows(tmp_path)
    fakes.exported.clear()
    result = run()
    assert result.exit_code == 0
    assert len(fakes.exported) == 2
    assert {scheme for _, scheme in fakes.exported} == {"W3A3"}
    assert rows(tmp_path)[: len(before)] == before
    assert len(rows(tmp_path)) == len(ALL)


def test_float_model_is_asked_again_if_its_answers_are_gone(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    run("--schemes", "W4A8")
    fakes.exported.clear()
    (reference,) = (tmp_path / "work").glob("*.reference.npz")
    reference.unlink()
    run("--schemes", "W4A8")
    assert fakes.exported == []  # nothing waits for them
    run()
    assert fakes.exported[0] == ("fp32", "none")
    assert len(fakes.exported) == 3


def test_tables_of_other_questions_do_not_take_each_others_answers_of_the_float_model(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    """Two results files, one work folder: the fake evaluation looks at what its reference was asked."""
    other = str(tmp_path / "other.json")
    assert run("--limit", "5", "--schemes", "W4A8").exit_code == 0
    assert run("--limit", "7", "--seed", "1", "--results", other).exit_code == 0
    assert run("--limit", "5").exit_code == 0
    assert [row["n"] for row in rows(tmp_path)] == [5] * len(ALL)


def test_redo_measures_them_again(run: Callable[..., Result], fakes: Fakes, tmp_path: Path) -> None:
    run()
    fakes.exported.clear()
    run("--redo")
    assert len(fakes.exported) == len(ALL)
    assert len(rows(tmp_path)) == len(ALL)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "expected rows with questions 20, got fp32 none with 5"),
        (("--limit", "5", "--calib-samples", "7"), "expected rows with calibration samples 7, got rtn W4A8 with"),
        (("--limit", "5", "--seed", "3"), "expected rows with seed 3, got rtn W4A8 with 0"),
    ],
)
def test_rows_measured_otherwise_are_neither_mixed_nor_replaced(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    run("--limit", "5")
    before = rows(tmp_path)
    fakes.exported.clear()
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.output
    assert "choose another file, or --redo" in result.output
    assert rows(tmp_path) == before
    assert fakes.exported == []
    assert run(*arguments, "--redo").exit_code == 0
    assert fakes.exported


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SplitQError("layer 3: expected a\nfactor"), "error: rtn W4A8: layer 3: expected a factor"),
        (RuntimeError("cholesky [not] positive"), "error: rtn W4A8: RuntimeError: cholesky [not] positive"),
    ],
)
def test_failed_export_is_a_line_and_the_others_go_on(
    error: Exception, line: str, run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    fakes.fail["rtn", "W4A8"] = error
    result = run()
    assert result.exit_code == 1
    assert line in result.stdout.splitlines()
    assert result.stderr.startswith("error: 1 rows could not be measured")
    assert [(row["method"], row["scheme"]) for row in rows(tmp_path)] == [pair for pair in ALL if pair != ALL[1]]
    assert exports(tmp_path) == []
    fakes.fail.clear()
    fakes.exported.clear()
    assert run().exit_code == 0
    assert fakes.exported == [("rtn", "W4A8")]


def test_failed_evaluation_is_a_line_too(run: Callable[..., Result], fakes: Fakes, tmp_path: Path) -> None:
    fakes.eval_error = SplitQError("decoder: ONNX Runtime failed")
    result = run()
    assert result.exit_code == 1
    assert result.stdout.count("error: ") == len(ALL)
    assert not (tmp_path / "results.json").exists()
    assert exports(tmp_path) == []


def test_interrupted_table_keeps_its_rows_and_leaves_no_folder(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    fakes.fail["rtn", "W3A3"] = KeyboardInterrupt()
    result = run()
    assert result.exit_code == 130
    assert [(row["method"], row["scheme"]) for row in rows(tmp_path)] == ALL[:3]
    assert exports(tmp_path) == []


def test_leftovers_of_a_killed_table_are_removed(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "work" / ".tiny-rtn-W4A8" / "tiny-rtn-W4A8.calibration").mkdir(parents=True)
    assert run().exit_code == 0
    assert exports(tmp_path) == []


def test_markdown_is_printed_on_demand(run: Callable[..., Result]) -> None:
    output = run("--markdown").output
    assert "| W3A3 | splitq | 20 | 75.00 ± 1.00 | 0.5 | 0.25 | 4.10 | 12 (cuda) |" in output


def test_missing_native_library_stops_before_any_export(
    run: Callable[..., Result], fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitq_edge import runtime_ops
    from splitq_edge.runtime_ops.session import require_native

    monkeypatch.setattr(runtime_ops, "library_path", lambda: None)
    monkeypatch.setattr(table, "require_native", require_native)
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("error: native library: expected one")
    assert fakes.exported == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "error: evaluation: expected --limit of 1 or more, got 0"),
        (["--calib-samples", "0"], "error: calibration: expected at least 1 sample, got --calib-samples 0"),
        (["--methods", "rtn,awk"], "expected names out of rtn, "),
        (["--schemes", "W4A8,"], "expected names out of W4A8, "),
    ],
)
def test_useless_options_stop_before_any_export(
    more: list[str], message: str, run: Callable[..., Result], fakes: Fakes
) -> None:
    result = run(*more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert fakes.exported == []


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "resnet"}'])
def test_model_that_cannot_be_used_is_one_line_and_not_one_a_row(
    config: str | None, run: Callable[..., Result], fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitq_edge.loading import check_model

    if config is not None:
        (tmp_path / "models" / "tiny").mkdir(parents=True)
        (tmp_path / "models" / "tiny" / "config.json").write_text(config)
    (tmp_path / "models").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "check_model", check_model)
    result = run()
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert fakes.exported == []
    assert not (tmp_path / "results.json").exists()


def test_file_of_another_model_stops_before_any_export(
    run: Callable[..., Result], fakes: Fakes, tmp_path: Path
) -> None:
    write_json(tmp_path / "results.json", {"schema": 1, "model": "large", "rows": []})
    result = run()
    assert result.exit_code == 2
    assert "expected rows of model tiny, got 'large'" in result.stderr
    assert fakes.exported == []


def test_work_place_that_cannot_be_made(run: Callable[..., Result], fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    result = run()
    assert result.exit_code == 2
    assert "expected a writable place" in result.stderr
    assert fakes.exported == []


def test_ablation_measures_every_component_and_every_rule_once(fakes: Fakes, tmp_path: Path) -> None:
    arguments = ["ablate", "models/tiny", "--results", str(tmp_path / "results.json"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(main, [*arguments, "--scheme", "W3A2", "--epochs", "0"])
    assert result.exit_code == 0, result.output
    found = [row["method"] for row in rows(tmp_path)]
    components = [f"components: {name}, 0 epochs" for name in ("flatquant", "+MOCD", "+CWS", "+MAC")]
    rules = [
        f"rules: {name}, 0 epochs"
        for name in ("none", "modality-max", "all-max", "vision-max", "text-max", "random", "mocd")
    ]
    assert found == ["fp32", *components, *rules]
    assert {row["scheme"] for row in rows(tmp_path)[1:]} == {"W3A2"}


def test_ablation_with_another_rounding_says_so(fakes: Fakes, tmp_path: Path) -> None:
    arguments = ["ablate", "models/tiny", "--results", str(tmp_path / "results.json"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(main, [*arguments, "--tables", "components", "--epochs", "2", "--rounding", "nearest"])
    assert result.exit_code == 0, result.output
    found = [row["method"] for row in rows(tmp_path)]
    assert found[1:] == [f"components: {name}, 2 epochs, nearest" for name in ("flatquant", "+MOCD", "+CWS", "+MAC")]
    assert {config.rounding for config in fakes.configs if config is not None} == {"nearest"}


def test_rows_with_a_rounding_of_their_own_keep_its_name() -> None:
    settings: Any = {"epochs": 0, "transform_lr": None, "transform": None, "rounding": "nearest"}
    for row in [row for name in ("options", "bits") for row in ablation_rows(name, "W4A4", **settings)]:
        assert row.is_float or row.method.endswith(", nearest") == (row.config.rounding == "nearest"), row.method
