"""Answers on disk and how many of them two engines share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.evaluate.answers import read_answers, rows_of, same_share, write_answers
from splitq_edge.evaluate.tasks import Answer, Question


def rows(*texts: str, task: str = "colors") -> list[dict[str, object]]:
    questions = [Question(Path(f"images/{index}.png"), "what color?", "red", "color") for index in range(len(texts))]
    return rows_of({task: questions}, [Answer(text, 0.5, 2) for text in texts])


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
    }
    assert second["answer"] == "blau"


def test_equal_answers_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, rows("red", "blue", "green", "red"))
    assert same_share(path, rows("red", "Blue", "green", "")) == 0.5


@pytest.mark.parametrize("other", [rows("red"), rows("red", "red", task="shapes"), rows("red", "red", "red")])
def test_other_questions_are_refused(tmp_path: Path, other: list[dict[str, object]]) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, rows("red", "red"))
    with pytest.raises(SplitQError, match="use the same --task, --limit and --seed"):
        same_share(path, other)


@pytest.mark.parametrize("text", ["no json", "[]", "3", json.dumps({"answer": "red"}), json.dumps({"task": 3})])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="expected a file of --save-answers"):
        read_answers(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a file of --save-answers"):
        read_answers(tmp_path / "none.jsonl")
