"""Answers on disk: one JSON line a question, to be read by people and compared between engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitq_edge.artifacts import write_bytes
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.evaluate.tasks import Answer, Question

WHICH = ("task", "image", "question")  # fields that tell questions apart


def rows_of(asked: Mapping[str, Sequence[Question]], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Questions by task with their answers, in the order in which they were asked.

    Returns:
        Objects with "task", "image" (file name), "question", "type", "right" (the right answer), "answer", "nll" and
        "tokens"; with a reference also "kl".
    """
    questions = [(task, question) for task, part in asked.items() for question in part]
    return [
        {
            "task": task,
            "image": question.image.name,
            "question": question.text,
            "type": question.type,
            "right": question.answer,
            "answer": answer.text.strip(),
            "nll": round(float(answer.nll), 6),
            "tokens": answer.tokens,
            **({} if answer.kl is None else {"kl": float(f"{answer.kl:.4g}")}),
        }
        for (task, question), answer in zip(questions, answers, strict=True)
    ]


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_answers(path: Path) -> list[dict[str, Any]]:
    """What `write_answers` wrote.

    Raises:
        ArtifactError: it is not such a file.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if not all(
            isinstance(row["answer"], str) and all(isinstance(row[name], str) for name in WHICH) for row in rows
        ):
            raise ValueError("a field is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"answers {path}: expected a file of --save-answers ({error!r}); choose another") from error
    return rows


def answers_to(path: Path, asked: Mapping[str, Sequence[Question]]) -> list[dict[str, Any]]:
    """The answers of a file, if it answers these questions in this order.

    Args:
        path: file of `write_answers`.
        asked: questions by task.

    Raises:
        ArtifactError: no such file.
        SplitQError: it holds other questions.
    """
    known = read_answers(path)
    wanted = [[task, question.image.name, question.text] for task, part in asked.items() for question in part]
    if [[row[name] for name in WHICH] for row in known] != wanted:
        raise SplitQError(
            f"answers {path}: expected the {len(wanted)} questions that are asked, got {len(known)} others; "
            "use the same --task, --limit and --seed"
        )
    return known


def same_share(known: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of rows whose answer is the known one of the same place, letter by letter."""
    return sum(row["answer"] == other["answer"] for row, other in zip(rows, known, strict=True)) / len(rows)
