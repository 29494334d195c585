"""The rules that choose outlier channels, besides MOCD (see test_outliers)."""

from __future__ import annotations

import pytest
import torch
from builders import rng

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.config import CHANNEL_RULES, SplitConfig
from splitq_edge.errors import SplitQError
from splitq_edge.splitting.outliers import halves_by_rank
from splitq_edge.splitting.plan import SplitPlan, plan_split

CHANNELS = 96  # 64 main, 16 text, 16 vision


def stats_of(name: str = "site", *, text: bool = True) -> SiteStats:
    rows = [torch.randn(30, CHANNELS, generator=rng(seed)) for seed in (1, 2)]
    rows[0] = rows[0] if text else rows[0][:0]
    absmax = [r.abs().amax(0) if r.shape[0] else torch.zeros(CHANNELS) for r in rows]
    return SiteStats(name, absmax[1], absmax[0], rows[0], rows[1], 30, rows[0].shape[0])


def plan(rule: str, *, name: str = "site", seed: int = 0) -> SplitPlan:
    return plan_split(stats_of(name), SplitConfig(ratio=0.05, rule=rule), seed=seed)


@pytest.mark.parametrize("rule", CHANNEL_RULES)
def test_every_rule_gives_groups_of_the_same_widths_that_cover_all_channels(rule: str) -> None:
    found = plan(rule)
    assert found.widths == (64, 16, 16)
    assert sorted(found.order.tolist()) == list(range(CHANNELS))
    for part in (found.main, found.text, found.vision):
        assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize(
    ("rule", "field"), [("text-max", "text_absmax"), ("vision-max", "vision_absmax"), ("all-max", "absmax")]
)
def test_rules_by_magnitude_take_the_largest_channels_and_give_vision_the_larger_half(rule: str, field: str) -> None:
    found, scores = plan(rule), getattr(stats_of(), field).tolist()
    ranked = sorted(range(CHANNELS), key=lambda c: -scores[c])
    assert set(found.vision.tolist()) == set(ranked[:16])
    assert set(found.text.tolist()) == set(ranked[16:32])


def test_rule_by_the_largest_of_each_modality_takes_vision_first_and_then_text_among_the_rest() -> None:
    stats, found = stats_of(), plan("modality-max")
    by_vision = sorted(range(CHANNELS), key=lambda c: -float(stats.vision_absmax[c]))
    assert set(found.vision.tolist()) == set(by_vision[:16])
    rest = sorted(by_vision[16:], key=lambda c: -float(stats.text_absmax[c]))
    assert set(found.text.tolist()) == set(rest[:16])


def test_random_rule_repeats_with_its_seed_and_differs_between_sites_and_seeds() -> None:
    first = plan("random").order
    assert torch.equal(first, plan("random").order)
    assert not torch.equal(first, plan("random", seed=1).order)
    assert not torch.equal(first, plan("random", name="other").order)


def test_rules_choose_differently() -> None:
    chosen = {frozenset(plan(rule).text.tolist()) for rule in CHANNEL_RULES}
    assert len(chosen) == len(CHANNEL_RULES)


def test_only_mocd_needs_text_tokens() -> None:
    with pytest.raises(SplitQError, match="site: expected text tokens in the calibration data, got none"):
        plan_split(stats_of(text=False), SplitConfig(ratio=0.05))
    for rule in ("random", "vision-max", "all-max", "modality-max"):
        plan_split(stats_of(text=False), SplitConfig(ratio=0.05, rule=rule))


def test_equal_scores_go_to_the_lower_channel() -> None:
    vision, text = halves_by_rank(torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0]), 2, 2)
    assert vision.tolist() == [1, 2]
    assert text.tolist() == [0, 4]


def test_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SplitQError, match=r"split\.rule: expected one of .*mocd.*random.*got 'magic'"):
        SplitConfig(rule="magic")
