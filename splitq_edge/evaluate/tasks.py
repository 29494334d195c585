"""Question-answering tasks: what is asked, what counts as right, and how accuracy is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitq_edge.errors import SplitQError


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        image: file of the image; questions of one image share the path.
        text: the question, as a user would type it.
        answer: the one right answer, lower case.
        type: question type, the key of the per-type accuracy.
    """

    image: Path
    text: str
    answer: str
    type: str


def load_task(name: str, split: str) -> list[Question]:
    """Questions of a built-in task in their fixed order.

    Args:
        name: a key of `TASKS`.
        split: "train" (calibration and training) or "test" (held out).

    Raises:
        SplitQError: unknown task or split, or the task's data package is not installed.
    """
    if name not in TASKS:
        raise SplitQError(f"task '{name}': expected one of {', '.join(sorted(TASKS))}; choose one of them")
    if split not in ("train", "test"):
        raise SplitQError(f"task '{name}': expected split train or test, got '{split}'")
    return TASKS[name](split)


def accuracy_table(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, object]:
    """Exact-match accuracy, its standard error sqrt(p (1 - p) / n), and the same by question type."""
    if len(questions) != len(answers):
        raise ValueError(f"expected one answer a question, got {len(answers)} for {len(questions)}")
    if not questions:
        raise SplitQError("evaluation: expected at least one question, got none; raise --limit")
    right = [answer.strip().lower() == question.answer for question, answer in zip(questions, answers, strict=True)]
    types: dict[str, dict[str, float]] = {}
    for name in sorted({question.type for question in questions}):
        marks = [mark for mark, question in zip(right, questions, strict=True) if question.type == name]
        types[name] = {"n": len(marks), "accuracy": sum(marks) / len(marks)}
    share = sum(right) / len(right)
    stderr = math.sqrt(share * (1 - share) / len(right))
    return {"n": len(right), "accuracy": share, "stderr": stderr, "types": types}


def _easyvqa(split: str) -> list[Question]:
    from splitq_edge.evaluate.easyvqa import load

    return load(split)


TASKS: dict[str, Callable[[str], list[Question]]] = {"easyvqa": _easyvqa}
