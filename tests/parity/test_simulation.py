"""The torch simulation of a kept calibration and the exported folder answer alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import lora_adapter, write_chats, write_checkpoint
from click.testing import CliRunner, Result

from splitq_edge.cli import main

MODEL = "models/easyvqa-tiny"
pytestmark = pytest.mark.slow


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export at W3A2, where answers differ from the float model's, and its calibration."""
    folder = tmp_path_factory.mktemp("simulation")
    state = ["--state", str(folder / "state"), "--keep-state"]
    result = run("export", MODEL, str(folder / "out"), "--scheme", "W3A2", "--method", "quarot", *state)
    assert result.exit_code == 0, result.output
    return folder


def test_simulation_and_export_give_the_same_answers(work: Path) -> None:
    asked = ["--limit", "200", "--seed", "5"]
    answers = str(work / "answers.jsonl")
    simulated = run(
        *["eval", MODEL, "--backend", "torch", "--state", str(work / "state")],
        *["--save-answers", answers, "--json", str(work / "torch.json"), *asked],
    )
    assert simulated.exit_code == 0, simulated.output
    exported = run("eval", str(work / "out"), "--answers", answers, "--json", str(work / "ort.json"), *asked)
    assert exported.exit_code == 0, exported.output
    one, other = (json.loads((work / name).read_text()) for name in ("torch.json", "ort.json"))
    assert other["same_answers"] >= 0.99
    assert (one["scheme"], one["effective_bits"]) == (other["scheme"], pytest.approx(other["effective_bits"]))
    float_model = run("eval", MODEL, "--backend", "torch", "--answers", answers, "--json", answers + ".json", *asked)
    assert float_model.exit_code == 0, float_model.output
    assert json.loads(Path(answers + ".json").read_text())["same_answers"] < 0.99  # the simulation simulates


def test_other_weights_are_refused(work: Path) -> None:
    result = run("eval", "models/easyvqa-tiny-stressed", "--backend", "torch", "--state", str(work / "state"))
    assert result.exit_code != 0
    assert "got one of other weights" in result.output


def test_a_calibration_of_an_adapter_is_simulated_with_it_alone(tmp_path: Path) -> None:
    base, state = str(write_checkpoint(tmp_path / "base")), str(tmp_path / "state")
    adapter = str(lora_adapter(tmp_path / "adapter", base="../base"))
    calibration = ["--calib", str(write_chats(tmp_path / "chats")), "--calib-samples", "2", "--state", state]
    for folder, joined in (("one", [adapter]), ("other", [base, "--adapter", adapter])):
        model, *option = joined
        out = str(tmp_path / folder)
        done = run("export", model, out, *option, "--method", "rtn", *calibration, "--keep-state", "--force")
        assert done.exit_code == 0, done.output
        for asked in ([adapter], [base, "--adapter", adapter]):
            result = run("eval", *asked, "--backend", "torch", "--state", state, "--limit", "2")
            assert result.exit_code == 0, result.output
            assert "W4A8" in result.output
        result = run("eval", base, "--backend", "torch", "--state", state, "--limit", "2")
        assert result.exit_code != 0
        assert "got one of other weights" in result.output
        shutil.rmtree(state)


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--state", "nowhere"], "found none"), (["--answers", "nowhere"], "expected a file of --save-answers")],
)
def test_what_is_not_there_is_one_line(more: list[str], message: str) -> None:
    result = run("eval", MODEL, "--backend", "torch", "--limit", "2", *more)
    assert result.exit_code != 0
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--state", "--adapter"])
def test_state_and_adapter_are_for_checkpoints_alone(work: Path, option: str) -> None:
    result = run("eval", str(work / "out"), option, str(work / "state"))
    assert result.exit_code != 0
    assert "expected --backend torch" in result.output
