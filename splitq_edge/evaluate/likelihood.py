"""What a teacher-forced pass says of an answer: its likelihood, the greedy tokens, the distance from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from splitq_edge.artifacts import check_writable, write_bytes
from splitq_edge.errors import ArtifactError

KEPT_TOKENS = 64  # of a distribution; the rest of its mass counts as one event


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens at every position of an answer.

    Attributes:
        ids: [positions, kept] int32, kept = min(64, vocabulary).
        logprobs: [positions, kept] float32, natural logarithms.
    """

    ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Forced:
    """One right answer, fed to the model.

    Attributes:
        nll: negative log-likelihood summed over the answer's tokens, in nats.
        greedy: the most likely token at every position of the answer, given the right tokens before it.
        same: how many of them, from the first on, are the answer's own.
        top: the most likely tokens with their probabilities.
        kl: Kullback-Leibler divergence of the reference from this model, summed over the answer's tokens, in nats;
            None without a reference.
    """

    nll: float
    greedy: list[int]
    same: int
    top: TopTokens
    kl: float | None = None


def force(
    logits: np.ndarray,
    answers: Sequence[Sequence[int]],
    image_token_id: int | None,
    references: Sequence[TopTokens | None] | None = None,
) -> list[Forced]:
    """Score the answers of a batch.

    Args:
        logits: [batch, longest answer, vocabulary] float32; position i of a row predicts token i of its answer, given
            the prompt and the tokens before it.
        answers: token ids of each row, end token included.
        image_token_id: placeholder that is never said, if the model has one; its share of the probability stays.
        references: of each row, what the reference model held likely at the answer's positions.
    """
    known = [None] * len(answers) if references is None else references
    rows = zip(logits, answers, known, strict=True)
    return [_force(row[: len(answer)], answer, image_token_id, reference) for row, answer, reference in rows]


def _force(
    logits: np.ndarray, answer: Sequence[int], image_token_id: int | None, reference: TopTokens | None
) -> Forced:
    values = logits.astype(np.float64)  # [answer, vocabulary]
    top = values.max(-1, keepdims=True)
    logprobs = values - (top + np.log(np.exp(values - top).sum(-1, keepdims=True)))
    nll = float(-logprobs[np.arange(len(answer)), answer].sum())
    if image_token_id is not None:
        values[:, image_token_id] = -np.inf
    greedy = [int(token) for token in values.argmax(-1)]
    equal = [token == wanted for token, wanted in zip(greedy, answer, strict=True)]
    same = equal.index(False) if False in equal else len(equal)
    kl = None if reference is None else divergence(reference, logprobs)
    return Forced(nll, greedy, same, top_tokens(logprobs), kl)


def top_tokens(logprobs: np.ndarray) -> TopTokens:
    """Keep the likeliest tokens of every position; logprobs: [positions, vocabulary]."""
    kept = min(KEPT_TOKENS, logprobs.shape[-1])
    ids = np.argpartition(logprobs, -kept, axis=-1)[:, -kept:]
    return TopTokens(ids.astype(np.int32), np.take_along_axis(logprobs, ids, -1).astype(np.float32))


def divergence(reference: TopTokens, logprobs: np.ndarray) -> float:
    """Sum over positions of KL(reference || model) with all tokens that the reference does not name as one event.

    Merging events never raises the divergence: it is exact where 64 tokens are the whole vocabulary and else a lower
    bound that misses what happens inside the reference's tail.

    Args:
        reference: of the same positions.
        logprobs: [positions, vocabulary] of the model.
    """
    p = reference.logprobs.astype(np.float64)
    q = np.take_along_axis(logprobs, reference.ids.astype(np.int64), -1)
    total = float((np.exp(p) * (p - q)).sum())
    if p.shape[-1] < logprobs.shape[-1]:
        rest_p, rest_q = (np.clip(1 - np.exp(x).sum(-1), 1e-12, 1.0) for x in (p, q))
        total += float((rest_p * (np.log(rest_p) - np.log(rest_q))).sum())
    return max(total, 0.0)


def save_reference(path: Path, key: str, rows: Sequence[TopTokens]) -> None:
    """Write what a model held likely, question by question, as .npz.

    Args:
        path: the file.
        key: what was asked, compared when the file is read.
        rows: of every question.
    """
    import io

    content = io.BytesIO()
    np.savez_compressed(
        content,
        key=np.array(key),
        lengths=np.array([len(row.ids) for row in rows], np.int64),
        ids=np.concatenate([row.ids for row in rows]),
        logprobs=np.concatenate([row.logprobs for row in rows]),
    )
    check_writable(path)
    write_bytes(path, content.getvalue())


def load_reference(path: Path, key: str) -> list[TopTokens]:
    """Inverse of `save_reference`.

    Raises:
        ArtifactError: no such file, or it answers other questions.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            found, lengths = str(content["key"]), content["lengths"]
            ends = np.cumsum(lengths)[:-1]
            pairs = zip(np.split(content["ids"], ends), np.split(content["logprobs"], ends), strict=True)
            rows = [TopTokens(ids, logprobs) for ids, logprobs in pairs]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ArtifactError(
            f"reference {path}: expected a file of --save-reference ({error!r}); make it with the float model"
        ) from error
    if found != key:
        raise ArtifactError(f"reference {path}: expected answers to {key}, got {found}; make it for these questions")
    return rows
