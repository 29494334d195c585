"""What a teacher-forced pass says of an answer: its likelihood, and what the model would have said instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Forced:
    """One right answer, fed to the model.

    Attributes:
        nll: negative log-likelihood summed over the answer's tokens, in nats.
        greedy: the most likely token at every position of the answer, given the right tokens before it.
        same: how many of them, from the first on, are the answer's own.
    """

    nll: float
    greedy: list[int]
    same: int


def force(logits: np.ndarray, answers: Sequence[Sequence[int]], image_token_id: int | None) -> list[Forced]:
    """Score the answers of a batch.

    Args:
        logits: [batch, longest answer, vocabulary] float32; position i of a row predicts token i of its answer, given
            the prompt and the tokens before it.
        answers: token ids of each row, end token included.
        image_token_id: placeholder that is never said, if the model has one; its share of the probability stays.
    """
    return [_force(row[: len(answer)], answer, image_token_id) for row, answer in zip(logits, answers, strict=True)]


def _force(logits: np.ndarray, answer: Sequence[int], image_token_id: int | None) -> Forced:
    values = logits.astype(np.float64)  # [answer, vocabulary]
    top = values.max(-1, keepdims=True)
    log_total = top[:, 0] + np.log(np.exp(values - top).sum(-1))
    nll = float((log_total - values[np.arange(len(answer)), answer]).sum())
    if image_token_id is not None:
        values[:, image_token_id] = -np.inf
    greedy = [int(token) for token in values.argmax(-1)]
    equal = [token == wanted for token, wanted in zip(greedy, answer, strict=True)]
    return Forced(nll, greedy, equal.index(False) if False in equal else len(equal))
