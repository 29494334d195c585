"""The split plan: group widths that kernels and transforms can take."""

from __future__ import annotations

import pytest
import torch
from builders import rng

from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.config import SplitConfig
from splitq_edge.errors import SplitQError
from splitq_edge.parallel import Processes
from splitq_edge.quant.transforms import factor_pair, has_balanced_factors
from splitq_edge.splitting.plan import MAIN_MULTIPLE, outlier_width, plan_split


def stats_of(channels: int, text: int = 20, vision: int = 20) -> SiteStats:
    observer = Observer("layers.7.mlp_in", samples=1)
    modality = torch.tensor([[0] * text + [1] * vision], dtype=torch.int8)
    x = torch.randn(1, text + vision, channels, generator=rng(channels))
    observer.update(x, modality, torch.ones_like(modality, dtype=torch.bool), torch.tensor([0]))
    return observer.stats(Processes(alone=True))


@pytest.mark.parametrize(
    ("channels", "main"), [(576, 512), (1536, 1472), (2048, 1984), (3584, 3456), (4096, 3904), (960, 896)]
)
def test_default_ratio_gives_the_documented_main_widths(channels: int, main: int) -> None:
    assert channels - outlier_width(channels, 0.02) == main


@pytest.mark.parametrize("ratio", [0.005, 0.02, 0.25])
def test_every_even_width_is_planned_or_refused_in_one_line(ratio: float) -> None:
    planned = 0
    for channels in range(64, 8193, 2):
        try:
            total = outlier_width(channels, ratio)
        except SplitQError as error:
            message = str(error)
            assert message.startswith("split: expected a main width"), channels
            assert "\n" not in message
            continue
        planned += 1
        main = channels - total
        assert main % MAIN_MULTIPLE == 0, channels
        assert 2 <= total <= channels // 2, channels
        a, b = factor_pair(main)
        assert b <= 8 * a, channels
    assert planned > 2000


@pytest.mark.parametrize("ratio", [0.02, 0.05])
def test_outlier_groups_have_balanced_factors_too(ratio: float) -> None:
    # Each outlier group has a transform of its own (eq. 13-14).
    lopsided = []
    for channels in range(64, 8193, 2):
        try:
            total = outlier_width(channels, ratio)
        except SplitQError:
            continue
        if not (has_balanced_factors(total // 2) and has_balanced_factors(total - total // 2)):
            lopsided.append((channels, total))
    assert lopsided == []


@pytest.mark.parametrize("channels", [193, 1001, 4095, 11007])
def test_odd_widths_are_planned_too(channels: int) -> None:
    assert (channels - outlier_width(channels, 0.02)) % MAIN_MULTIPLE == 0


@pytest.mark.parametrize("channels", [64, 576, 4096, 5000])
def test_ratio_zero_splits_nothing(channels: int) -> None:
    assert outlier_width(channels, 0) == 0
    plan = plan_split(stats_of(channels), SplitConfig(ratio=0))
    assert plan.widths == (channels, 0, 0)
    assert plan.order.tolist() == list(range(channels))


@pytest.mark.parametrize("channels", [1, 2, 32, 48, 63])
def test_site_too_narrow_to_split_keeps_one_group_and_says_so(channels: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert outlier_width(channels, 0.02) == 0
    assert f"{channels} input channels is too narrow to split" in caplog.text


def test_total_follows_the_ratio() -> None:
    totals = [outlier_width(4096, ratio) for ratio in (0.005, 0.01, 0.02, 0.05, 0.1, 0.25)]
    assert totals == sorted(totals)
    for ratio, total in zip((0.02, 0.05), (totals[2], totals[3]), strict=True):
        assert total == pytest.approx(2 * ratio * 4096, rel=0.2)


def test_main_width_without_balanced_factors_is_passed_over_unless_the_transform_is_the_identity() -> None:
    channels = 32 * 257 + 64  # 257 is prime: 32 x 257 is just beyond 1 : 8
    ratio = 32 / channels
    assert not has_balanced_factors(channels - 64)
    assert outlier_width(channels, ratio, balanced=False) == 64
    assert has_balanced_factors(channels - outlier_width(channels, ratio))


@pytest.mark.parametrize("channels", [64, 576, 600, 1001])
def test_plan_has_the_planned_widths_and_halves_the_outliers(channels: int) -> None:
    plan = plan_split(stats_of(channels), SplitConfig())
    total = outlier_width(channels, 0.02)
    assert plan.widths == (channels - total, total // 2, total - total // 2)
    assert plan.order.dtype == torch.int32


def test_order_lists_main_then_text_then_vision() -> None:
    plan = plan_split(stats_of(576), SplitConfig())
    main, text, _ = plan.widths
    assert torch.equal(plan.order[:main].long(), plan.main)
    assert torch.equal(plan.order[main : main + text].long(), plan.text)
    assert torch.equal(plan.order[main + text :].long(), plan.vision)


def test_no_text_tokens_is_an_error_that_names_the_site() -> None:
    with pytest.raises(SplitQError, match=r"layers\.7\.mlp_in: expected text tokens in the calibration data, got none"):
        plan_split(stats_of(576, text=0), SplitConfig())


def test_no_text_tokens_does_not_matter_without_a_split() -> None:
    assert plan_split(stats_of(576, text=0), SplitConfig(ratio=0)).widths == (576, 0, 0)


def test_without_vision_tokens_the_largest_text_magnitudes_take_the_vision_group() -> None:
    stats = stats_of(576, vision=0)
    plan = plan_split(stats, SplitConfig())
    assert set(plan.vision.tolist()) == set(stats.text_absmax.topk(32).indices.tolist())
