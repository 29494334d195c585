"""Accuracy and likelihood of answers, and how questions are cut into chunks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.evaluate.backends import CHUNK_IMAGES, CHUNK_QUESTIONS, answer_all, chunks
from splitq_edge.evaluate.likelihood import TopTokens, divergence, force, load_reference, save_reference, top_tokens
from splitq_edge.evaluate.tasks import Answer, Question, score


def question(image: int, text: str = "what?", answer: str = "red", kind: str = "color") -> Question:
    return Question(Path(f"{image}.png"), text, answer, kind)


def test_likelihood_is_the_cross_entropy_of_the_first_positions() -> None:
    logits = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)) * 4
    answers = [[4, 2], [1, 7, 5]]
    for row, forced in enumerate(force(logits.numpy(), answers, None)):
        picked = logits[row, : len(answers[row])].double()
        expected = torch.nn.functional.cross_entropy(picked, torch.tensor(answers[row]), reduction="sum")
        assert forced.nll == pytest.approx(float(expected), rel=1e-9)
        assert forced.greedy == picked.argmax(-1).tolist()


def test_likelihood_of_huge_logits_is_finite() -> None:
    logits = np.array([[[3e38, -3e38, 0.0]]], np.float32)
    assert force(logits, [[0]], None)[0].nll == 0
    assert force(logits, [[1]], None)[0].nll == pytest.approx(6e38, rel=1e-6)


@pytest.mark.parametrize(("answer", "same"), [([3, 4, 2], 3), ([3, 0, 2], 1), ([0, 4, 2], 0), ([3, 4, 0], 2)])
def test_same_counts_the_right_tokens_up_to_the_first_other_one(answer: list[int], same: int) -> None:
    logits = np.full((1, 4, 6), -1, np.float32)
    for position, token in enumerate([3, 4, 2]):
        logits[0, position, token] = 1
    assert force(logits, [answer], None)[0].same == same


def test_image_placeholder_is_never_said_but_keeps_its_probability() -> None:
    logits = np.array([[[0.0, 5.0, 1.0]]], np.float32)
    with_placeholder, without = force(logits, [[2]], 1)[0], force(logits, [[2]], None)[0]
    assert (with_placeholder.greedy, without.greedy) == ([2], [1])
    assert with_placeholder.nll == without.nll > 3


def test_answers_count_when_equal_but_for_case_and_white_space() -> None:
    questions = [question(0), question(0), question(1, answer="yes", kind="yesno"), question(1)]
    texts = [" Red\n", "red.", "yes", ""]
    table = score(questions, [Answer(text, 1.0, 2) for text in texts])
    assert (table["n"], table["accuracy"], table["stderr"]) == (4, 0.5, 0.25)
    assert table["types"] == {"color": {"n": 3, "accuracy": 1 / 3}, "yesno": {"n": 1, "accuracy": 1.0}}


def test_nll_is_the_mean_over_tokens_and_its_error_that_of_questions() -> None:
    answers = [Answer("", 1.0, 2), Answer("", 4.0, 2), Answer("", 1.0, 4)]
    table = score([question(0)] * 3, answers)
    assert table["nll"] == pytest.approx(6 / 8)
    deviations = [1 - 2 * 0.75, 4 - 2 * 0.75, 1 - 4 * 0.75]
    assert table["nll_stderr"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) * 3 / 2) / 8)


def test_error_of_the_nll_is_that_of_a_plain_mean_when_answers_are_of_one_length() -> None:
    values = np.array([0.5, 1.5, 4.0, 2.0])
    table = score([question(0)] * 4, [Answer("", 2 * value, 2) for value in values])
    assert table["nll"] == pytest.approx(values.mean())
    assert table["nll_stderr"] == pytest.approx(values.std(ddof=1) / 2)


def test_one_question_has_no_error() -> None:
    assert score([question(0)], [Answer("red", 3.0, 2)])["nll_stderr"] == 0


def test_no_question_is_an_error() -> None:
    with pytest.raises(SplitQError, match="expected at least one question"):
        score([], [])


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ([1], [1]),
        ([3, CHUNK_QUESTIONS - 3, 1], [CHUNK_QUESTIONS, 1]),
        ([3, CHUNK_QUESTIONS - 2, 1], [3, CHUNK_QUESTIONS - 1]),
        ([2 * CHUNK_QUESTIONS + 5], [CHUNK_QUESTIONS, CHUNK_QUESTIONS, 5]),
        ([4, CHUNK_QUESTIONS + 5, 2], [4, CHUNK_QUESTIONS, 7]),
        ([2] * (CHUNK_IMAGES + 1), [2 * CHUNK_IMAGES, 2]),
        ([], []),
    ],
)
def test_chunks_keep_order_and_limits(counts: list[int], sizes: list[int]) -> None:
    questions = [question(image) for image, count in enumerate(counts) for _ in range(count)]
    found = list(chunks(questions))
    assert [len(chunk) for chunk in found] == sizes
    assert [asked for chunk in found for asked in chunk] == questions
    assert all(len({asked.image for asked in chunk}) <= CHUNK_IMAGES for chunk in found)


def test_answers_come_in_the_order_of_the_questions_and_progress_counts_them() -> None:
    class Echo:
        def answer(self, questions: list[Question], references: object = None) -> list[Answer]:
            assert references is None
            return [Answer(asked.text, 0.0, 1) for asked in questions]

    questions = [question(index // 3, text=str(index)) for index in range(200)]
    done: list[int] = []
    answers = answer_all(Echo(), questions, progress=done.append)
    assert [answer.text for answer in answers] == [str(index) for index in range(200)]
    assert sum(done) == 200
    assert len(done) > 1


def test_divergence_is_the_kl_of_small_vocabularies() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 11, generator=generator).double().mul(3).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert divergence(top_tokens(p.numpy()), q.numpy()) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(top_tokens(p.numpy()), p.numpy()) == pytest.approx(0, abs=1e-6)


def test_divergence_of_a_large_vocabulary_merges_the_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 500, generator=generator).double().mul(3).log_softmax(-1) for _ in range(2))
    whole = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
    kept = divergence(top_tokens(p.numpy()), q.numpy())
    assert 0.5 * whole < kept < whole


def test_divergence_is_reported_only_if_every_answer_has_one() -> None:
    answers = [Answer("red", 1.0, 2, kl=0.5), Answer("red", 1.0, 2, kl=0.1)]
    table = score([question(0)] * 2, answers)
    assert table["kl"] == pytest.approx(0.15)
    assert "kl" not in score([question(0)] * 2, [answers[0], Answer("red", 1.0, 2)])


def test_reference_file_is_read_back_and_bound_to_its_questions(tmp_path: Path) -> None:
    rows = [TopTokens(np.full((n, 3), n, np.int32), np.full((n, 3), -n, np.float32)) for n in (1, 4, 2)]
    path = tmp_path / "float.npz"
    save_reference(path, "easyvqa, 3 questions", rows)
    for got, row in zip(load_reference(path, "easyvqa, 3 questions"), rows, strict=True):
        np.testing.assert_array_equal(got.ids, row.ids)
        np.testing.assert_array_equal(got.logprobs, row.logprobs)
    with pytest.raises(ArtifactError, match="expected answers to other"):
        load_reference(path, "other")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="expected a file of --save-reference"):
        load_reference(path, "easyvqa, 3 questions")
