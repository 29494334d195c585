"""Answers on disk and how many of them two engines share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from splitq_edge.commands import evaluate
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.evaluate.answers import answers_to, read_answers, rows_of, same_share, write_answers
from splitq_edge.evaluate.tasks import Answer, Question


def asked(count: int, task: str = "colors") -> dict[str, list[Question]]:
    return {task: [Question(Path(f"images/{index}.png"), "what color?", "red", "color") for index in range(count)]}


def rows(*texts: str) -> list[dict[str, object]]:
    return rows_of(asked(len(texts)), [Answer(text, 0.5, 2) for text in texts])


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, rows("red", " blau\u2028 "))
    first, second = read_answers(path)
    assert first == {
        "task": "colors",
        "image": "0.png",
        "question": "what color?",
        "type": "color",
        "right": "red",
        "answer": "red",
        "nll": 0.5,
        "tokens": 2,
    }
    assert second["answer"] == "blau"


def test_rows_say_the_divergence_where_there_is_a_reference() -> None:
    (row,) = rows_of(asked(1), [Answer("red", 0.5, 2, kl=1.23456e-7)])
    assert row["kl"] == 1.235e-7


def test_equal_answers_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, rows("red", "blue", "green", "red"))
    assert same_share(answers_to(path, asked(4)), rows("red", "Blue", "green", "")) == 0.5


@pytest.mark.parametrize("other", [asked(1), asked(2, "shapes"), asked(3)])
def test_other_questions_are_refused_before_any_is_asked(
    tmp_path: Path, other: dict[str, list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, rows("red", "red"))
    with pytest.raises(SplitQError, match="use the same --task, --limit and --seed"):
        answers_to(path, other)
    monkeypatch.setattr(evaluate, "load_task", lambda name, _split: other[name])
    monkeypatch.setattr(evaluate, "task_names", lambda _task: list(other))
    monkeypatch.setattr(evaluate, "_open", lambda _options: pytest.fail("the model was opened"))
    options = evaluate.EvalOptions("model", "task", "ort", None, 0, 1, None, answers=path)
    with pytest.raises(SplitQError, match="use the same --task, --limit and --seed"):
        evaluate.run_eval(options, Console(quiet=True))


@pytest.mark.parametrize("text", ["no json", "[]", "3", json.dumps({"answer": "red"}), json.dumps({"task": 3})])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="expected a file of --save-answers"):
        read_answers(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a file of --save-answers"):
        read_answers(tmp_path / "none.jsonl")
