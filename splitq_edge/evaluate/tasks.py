"""Question-answering tasks: what is asked, what counts as right, and how accuracy and likelihood are reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.likelihood import TopTokens


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


@dataclass(frozen=True)
class Answer:
    """What a model says to a question, and how likely it holds the right answer.

    Attributes:
        text: the greedy answer.
        nll: negative log-likelihood of the right answer, summed over its tokens, in nats.
        tokens: number of those tokens, end token included.
        top: what the model held likely at their positions, if the backend kept it.
        kl: divergence of the reference model from this one, summed over the tokens, in nats; None without reference.
    """

    text: str
    nll: float
    tokens: int
    top: TopTokens | None = None
    kl: float | None = None


def load_task(name: str, split: str) -> list[Question]:
    """Questions of a built-in task in their fixed order.

    Args:
        name: a key of `TASKS`.
        split: "train" (calibration and training) or "test" (held out).

    Raises:
        SplitQError: unknown task or split, or the task's data package is not installed.
    """
    task_names(name)
    if split not in ("train", "test"):
        raise SplitQError(f"task '{name}': expected split train or test, got '{split}'")
    return TASKS[name](split)


def task_names(wanted: str) -> list[str]:
    """The tasks that `wanted` names: one, several with commas between, or "all".

    Raises:
        SplitQError: an unknown name.
    """
    names = list(TASKS) if wanted == "all" else list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in names:
        if name not in TASKS:
            known = ", ".join(sorted(TASKS))
            raise SplitQError(f"task '{name}': expected one of {known}, or all; choose one of them")
    return names


def score(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, object]:
    """Accuracy and likelihood of a task.

    Returns:
        n; accuracy, the share of exact matches, and stderr, its standard error sqrt(p (1 - p) / n); nll, the mean over
        the tokens of all right answers in nats, and nll_stderr, its standard error over questions; types, with n and
        accuracy of every question type; with a reference also kl, the mean divergence a token, and kl_stderr.
    """
    if len(questions) != len(answers):
        raise ValueError(f"expected one answer a question, got {len(answers)} for {len(questions)}")
    if not questions:
        raise SplitQError("evaluation: expected at least one question, got none; raise --limit")
    right = [
        answer.text.strip().lower() == question.answer for question, answer in zip(questions, answers, strict=True)
    ]
    types: dict[str, dict[str, float]] = {}
    for name in sorted({question.type for question in questions}):
        marks = [mark for mark, question in zip(right, questions, strict=True) if question.type == name]
        types[name] = {"n": len(marks), "accuracy": sum(marks) / len(marks)}
    share = sum(right) / len(right)
    stderr = math.sqrt(share * (1 - share) / len(right))
    tokens = [answer.tokens for answer in answers]
    nll, nll_stderr = _token_mean([answer.nll for answer in answers], tokens)
    divergences = [answer.kl for answer in answers if answer.kl is not None]
    fidelity: dict[str, float] = {}
    if len(divergences) == len(answers):
        fidelity["kl"], fidelity["kl_stderr"] = _token_mean(divergences, tokens)
    return {
        "n": len(right),
        "accuracy": share,
        "stderr": stderr,
        "nll": nll,
        "nll_stderr": nll_stderr,
        **fidelity,
        "types": types,
    }


def _token_mean(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """Mean a token of what is summed by question, and its standard error as a ratio of two sums over questions."""
    count, total = len(sums), sum(tokens)
    mean = math.fsum(sums) / total
    if count == 1:
        return mean, 0.0
    # A question's tokens are not independent: the variance is that of the questions' deviations (linearized ratio).
    squares = math.fsum((value - mean * length) ** 2 for value, length in zip(sums, tokens, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def _loader(module: str, function: str) -> Callable[[str], list[Question]]:
    """The task modules import this one, so they are imported when they are used."""

    def load(split: str) -> list[Question]:
        return getattr(import_module(f"splitq_edge.evaluate.{module}"), function)(split)

    return load


TASKS: dict[str, Callable[[str], list[Question]]] = {
    "easyvqa": _loader("easyvqa", "load"),
    "ocr": _loader("words", "ocr"),
    "counting": _loader("drawing", "counting"),
    "spatial": _loader("drawing", "spatial"),
    "fashion": _loader("photos", "fashion"),
    "cifar10": _loader("photos", "cifar10"),
}
