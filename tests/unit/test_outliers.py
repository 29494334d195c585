"""MOCD (paper section 4.2, eq. 7-12) against numbers worked by hand, its invariances, planted outliers."""

from __future__ import annotations

import pytest
import torch
from builders import rng

from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.config import SplitConfig
from splitq_edge.parallel import Processes
from splitq_edge.splitting.outliers import (
    choose_channels,
    percentile_ranks,
    vision_scores,
    within_cluster_variance,
)
from splitq_edge.splitting.plan import plan_split

# The example of these tests: 5 channels, 2 vision tokens, 4 text tokens.
VISION = torch.tensor([[1.0, -2.0, 2.0, 0.0, -9.0], [-2.0, 1.0, 2.0, 5.0, 3.0]])
TEXT = torch.tensor(
    [
        [1.0, -2.0, 3.0, -4.0, 100.0],
        [2.0, 3.0, -4.0, 1.0, 0.0],
        [-10.0, 30.0, 40.0, 20.0, 7.0],
        [0.1, 0.2, 0.4, 0.3, -50.0],
    ]
)
# eq. 7: s_v(c) = max over vision tokens of |X[i, c]|, column by column.
VISION_SCORES = [2.0, 2.0, 2.0, 5.0, 9.0]
# eq. 9 over C' = {0, 1, 2, 3} once channel 4 is taken for vision; magnitudes are ranked within each row.
TEXT_RANKS = [
    [0.25, 0.50, 0.75, 1.00],  # 1 < 2 < 3 < 4
    [0.50, 0.75, 1.00, 0.25],  # channel 3 is the smallest of 2, 3, 4, 1
    [0.25, 0.75, 1.00, 0.50],  # 10 < 20 (channel 3) < 30 < 40
    [0.25, 0.50, 1.00, 0.75],  # 0.1 < 0.2 < 0.3 (channel 3) < 0.4
]
# eq. 10 with k = 3: channels 0, 1, 2 take two values each, which three centres hit: 0. Channel 3 takes .25 .5 .75 1:
# the best three centres merge one pair of neighbours, 2 * 0.125 ** 2 / 4 = 1 / 128.
TEXT_SCORES = [0.0, 0.0, 0.0, 1 / 128]


def observed(text: torch.Tensor, vision: torch.Tensor) -> SiteStats:
    observer = Observer("site", samples=1)
    modality = torch.tensor([[0] * len(text) + [1] * len(vision)], dtype=torch.int8)
    keep = torch.ones_like(modality, dtype=torch.bool)
    observer.update(torch.cat([text, vision])[None], modality, keep, torch.tensor([0]))
    return observer.stats(Processes(alone=True))


def choose(text: torch.Tensor, vision: torch.Tensor, *, text_count: int, vision_count: int, clusters: int = 3):
    """(C_v, C_t) as lists."""
    sets = choose_channels(
        vision.abs().amax(0), text, vision_count=vision_count, text_count=text_count, clusters=clusters
    )
    return [channels.tolist() for channels in sets]


def planted(channels: int = 48, tokens: int = 240) -> tuple[torch.Tensor, torch.Tensor, set[int], set[int]]:
    """Text and vision tokens of a layer with known outliers.

    Normal channels keep their own magnitude, with 10 % noise. Three channels are 50 times as large in vision tokens
    only. Three others run from the smallest to the largest magnitude over the text tokens.
    """
    generator = rng(5)
    level = torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=generator)]
    picks = torch.randperm(channels, generator=generator)[:6].tolist()
    vision_only, text_only = set(picks[:3]), set(picks[3:])

    def tokens_of(count: int) -> torch.Tensor:
        sign = torch.randint(0, 2, (count, channels), generator=generator) * 2 - 1
        return level * (1 + 0.1 * torch.randn(count, channels, generator=generator)) * sign

    text, vision = tokens_of(tokens), tokens_of(tokens)
    for channel in vision_only:
        vision[:, channel] *= 50
    for channel in text_only:
        text[:, channel] = torch.logspace(-1.2, 1.2, tokens)[torch.randperm(tokens, generator=generator)]
    return text, vision, text_only, vision_only


def test_vision_scores_are_the_largest_magnitudes_over_vision_tokens() -> None:
    stats = observed(TEXT, VISION)
    assert vision_scores(stats.vision_absmax).tolist() == VISION_SCORES


def test_percentile_ranks_by_hand() -> None:
    assert percentile_ranks(TEXT[:, :4].abs()).tolist() == TEXT_RANKS


def test_equal_magnitudes_share_the_higher_rank() -> None:
    # |{j : |x_j| <= |x_c|}| counts ties: 3 of 4 are <= 0, all are <= 5; 1 < 2 < 3 = 3.
    magnitudes = torch.tensor([[0.0, 0.0, 0.0, 5.0], [3.0, 1.0, 3.0, 2.0]])
    assert percentile_ranks(magnitudes).tolist() == [[0.75, 0.75, 0.75, 1.0], [1.0, 0.25, 1.0, 0.5]]


def test_clustering_scores_of_the_example() -> None:
    scores = within_cluster_variance(torch.tensor(TEXT_RANKS), 3)
    torch.testing.assert_close(scores, torch.tensor(TEXT_SCORES), atol=1e-7, rtol=0)


def test_clustering_score_where_the_optimum_is_obvious() -> None:
    # Three pairs 0.1 apart: centres in their middles, every value 0.05 away: 0.0025. The order of tokens is shuffled.
    pairs = torch.tensor([0.5, 1.0, 0.0, 0.6, 0.1, 0.9])
    # Three heaps of unequal size, spread +-0.02 in one of them only: 2 * 0.02 ** 2 / 6.
    heaps = torch.tensor([0.1, 0.9, 0.1, 0.48, 0.52, 0.9])
    scores = within_cluster_variance(torch.stack([pairs, heaps], 1), 3)
    torch.testing.assert_close(scores, torch.tensor([0.0025, 0.0008 / 6]), atol=1e-7, rtol=1e-4)


def test_one_cluster_is_the_plain_variance() -> None:
    sequences = torch.rand(50, 7, generator=rng())
    expected = sequences.var(0, correction=0)
    torch.testing.assert_close(within_cluster_variance(sequences, 1), expected, atol=1e-6, rtol=1e-4)


def test_more_clusters_than_values_leave_no_variance() -> None:
    assert within_cluster_variance(torch.tensor([[0.5, 1.0], [0.25, 1.0]]), 3).tolist() == [0.0, 0.0]


def test_a_single_token_has_no_variance() -> None:
    assert within_cluster_variance(torch.rand(1, 4, generator=rng()), 3).tolist() == [0.0] * 4


def test_every_channel_is_clustered_on_its_own() -> None:
    sequences = torch.rand(60, 9, generator=rng())
    together = within_cluster_variance(sequences, 3)
    alone = torch.cat([within_cluster_variance(column[:, None], 3) for column in sequences.T])
    torch.testing.assert_close(together, alone, atol=1e-7, rtol=1e-5)


def test_selection_by_hand() -> None:
    assert choose(TEXT, VISION, vision_count=1, text_count=1) == [[4], [3]]


def test_vision_takes_its_channels_first_and_text_chooses_among_the_rest() -> None:
    # Channel 3 would win both; vision's second best takes it, and text falls back to a tie at 0: the lowest number.
    assert choose(TEXT, VISION, vision_count=2, text_count=1) == [[3, 4], [0]]


def test_ties_go_to_the_lower_channel_number() -> None:
    assert choose(TEXT, VISION, vision_count=4, text_count=1) == [[0, 1, 3, 4], [2]]


def test_counts_of_zero_choose_nothing() -> None:
    assert choose(TEXT, VISION, vision_count=0, text_count=0) == [[], []]


def test_scaling_whole_text_tokens_changes_neither_ranks_nor_sets() -> None:
    text, vision, *_ = planted()
    factors = 2.0 ** torch.randint(-8, 9, (len(text), 1), generator=rng(1))
    assert torch.equal(percentile_ranks(text.abs()), percentile_ranks((text * factors).abs()))
    counts = {"vision_count": 3, "text_count": 3}
    assert choose(text * factors, vision, **counts) == choose(text, vision, **counts)


def test_permuting_tokens_changes_nothing() -> None:
    text, vision, *_ = planted()
    shuffled = text[torch.randperm(len(text), generator=rng(2))]
    scores = [within_cluster_variance(percentile_ranks(rows.abs()), 3) for rows in (text, shuffled)]
    torch.testing.assert_close(*scores, atol=1e-7, rtol=1e-5)
    counts = {"vision_count": 5, "text_count": 5}
    assert choose(shuffled, vision[torch.randperm(len(vision), generator=rng(3))], **counts) == choose(
        text, vision, **counts
    )


def test_permuting_channels_permutes_the_sets() -> None:
    text, vision, *_ = planted()
    order = torch.randperm(text.shape[1], generator=rng(4))
    counts = {"vision_count": 5, "text_count": 5}
    for plain, permuted in zip(
        choose(text, vision, **counts), choose(text[:, order], vision[:, order], **counts), strict=True
    ):
        assert sorted(order[permuted].tolist()) == plain


def test_planted_outliers_of_both_modalities_are_found() -> None:
    text, vision, text_only, vision_only = planted()
    chosen_vision, chosen_text = choose(text, vision, vision_count=3, text_count=3)
    assert set(chosen_vision) == vision_only
    assert set(chosen_text) == text_only


def test_channel_that_is_large_for_all_text_tokens_is_no_text_outlier() -> None:
    # The rule asks for channels whose place among the others changes, not for large ones (paper table 4: text-max
    # does worse).
    text, vision, text_only, _ = planted()
    always_large = next(c for c in range(text.shape[1]) if c not in text_only)
    text[:, always_large] *= 1000
    _, chosen = choose(text, vision, vision_count=3, text_count=3)
    assert set(chosen) == text_only


@pytest.mark.parametrize("channels", [64, 96, 130, 256])
def test_sets_are_disjoint_and_cover_every_channel(channels: int) -> None:
    generator = rng(channels)
    text = torch.randn(40, channels, generator=generator)
    vision = torch.randn(30, channels, generator=generator)
    plan = plan_split(observed(text, vision), SplitConfig(ratio=0.05))
    assert min(plan.widths) > 0
    assert sorted(plan.order.tolist()) == list(range(channels))
    for channels_of_group in (plan.main, plan.text, plan.vision):
        assert channels_of_group.tolist() == sorted(channels_of_group.tolist())
    together = [*plan.main.tolist(), *plan.text.tolist(), *plan.vision.tolist()]
    assert plan.order.tolist() == together
