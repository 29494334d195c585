"""What an export asks of its parity samples."""

from __future__ import annotations

import math

import pytest
import torch

from splitq_edge.exporters.export_folder import _middle, case_limits
from splitq_edge.modality import TEXT, VISION
from splitq_edge.runtime_ops.verify import ParityRow, _limit_db, disagreements


def test_calm_samples_keep_the_limit_of_their_part() -> None:
    assert case_limits(30.0, {"prefill": 120.0, "middle": 36.1, "step": 130.0}) == {}


def test_sample_is_asked_no_more_than_the_simulation_agrees_with_itself() -> None:
    assert case_limits(30.0, {"prefill": 25.0, "middle": 40.0}) == {"prefill": 19.0}


def test_sample_that_rounding_decides_is_not_asked() -> None:
    assert case_limits(15.0, {"prefill": 5.7, "middle": 12.0}) == {"prefill": None, "middle": 6.0}


def test_single_step_is_asked_like_the_others_but_never_for_nothing() -> None:
    assert case_limits(30.0, {"step": 29.5}) == {"step": 23.5}
    assert case_limits(30.0, {"step": 36.1}) == {}
    assert case_limits(15.0, {"step": 0.0}) == {"step": 6.0}


def test_limits_of_a_part_and_of_its_samples() -> None:
    part = {"parity_limit_db": 30.0, "parity_case_limits_db": {"prefill": None, "middle": 12.5}}
    assert [_limit_db(part, case) for case in ("prefill", "middle", "step")] == [None, 12.5, 30.0]
    assert _limit_db({"parity_limit_db": 80.0}, "image") == 80.0


@pytest.mark.parametrize(
    ("sqnr", "limit", "ok", "asked"),
    [
        (31.0, 30.0, True, ">= 30"),
        (29.0, 30.0, False, ">= 30"),
        (-1.0, None, True, "-"),
        (-math.inf, None, False, "-"),
    ],
)
def test_row_is_ok_or_not(sqnr: float, limit: float | None, ok: bool, asked: str) -> None:
    row = ParityRow("decoder prefill", "logits", 10, 1.0, sqnr, 1.0, limit)
    assert (row.ok, row.asked) == (ok, asked)


def test_disagreements_name_what_is_wrong_and_by_how_much() -> None:
    rows = [
        ParityRow("decoder prefill", "logits", 10, 1.0, 31.0, 1.0, 30.0),
        ParityRow("decoder middle", "logits", 10, 1.0, 2.0, 1.0, None),
        ParityRow("decoder step", "logits", 10, 1.0, 9.14, 1.0, 30.0),
        ParityRow("decoder step", "present", 10, math.inf, -math.inf, 0.0, None),
    ]
    assert disagreements(rows) == "decoder step logits 9.1 dB (>= 30), decoder step present -inf dB (-)"
    assert disagreements(rows[:2]) == ""


def modality(text: int, vision: int, more: int) -> torch.Tensor:
    return torch.tensor([[TEXT] * text + [VISION] * vision + [TEXT] * more])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (modality(3, 36, 20), (35, 43)),  # four of the picture, four behind it
        (modality(3, 36, 2), (32, 40)),  # the last token is left out
        (modality(40, 0, 0), (15, 23)),  # no picture: the middle
        (modality(3, 0, 0), (0, 2)),
    ],
)
def test_middle_holds_the_border(tokens: torch.Tensor, expected: tuple[int, int]) -> None:
    assert _middle(tokens) == expected
