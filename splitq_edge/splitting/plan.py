"""The split plan of a site: which channels form the groups main, text and vision (paper eq. 12)."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import torch

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.config import SplitConfig
from splitq_edge.errors import SplitQError
from splitq_edge.quant.transforms import has_balanced_factors
from splitq_edge.splitting.outliers import choose_channels, halves_by_rank, largest_channels

logger = logging.getLogger(__name__)

MAIN_MULTIPLE = 32  # three-bit weights are packed in blocks of 32 input channels
SCORED_ROWS = 1024  # text rows that are ranked and clustered; the time of clustering grows with them
MAX_WIDE_SHARE = 8  # prefer groups that are multiples of 32 while both take at most 1/8 of the channels


@dataclass(frozen=True)
class SplitPlan:
    """Disjoint channel sets that cover 0..K-1.

    Attributes:
        main: ascending int64 channel numbers.
        text: likewise, text outliers C_t.
        vision: likewise, vision outliers C_v.
    """

    main: torch.Tensor
    text: torch.Tensor
    vision: torch.Tensor

    @property
    def order(self) -> torch.Tensor:
        """channel_order of the op: [K] int32, main then text then vision."""
        return torch.cat([self.main, self.text, self.vision]).to(torch.int32)

    @property
    def widths(self) -> tuple[int, int, int]:
        """K_m, K_t, K_v."""
        return self.main.numel(), self.text.numel(), self.vision.numel()


def outlier_width(channels: int, ratio: float, *, balanced: bool = True) -> int:
    """How many channels both outlier groups take together.

    The main width becomes a multiple of 32 and all three widths have two near-equal factors. Among those, the total
    nearest to `2 * ratio * channels` wins, multiples of 64 first while they are at most an eighth of the channels.

    Args:
        channels: K.
        ratio: share a modality.
        balanced: whether the widths must have balanced factors (needed by the Kronecker transform).

    Returns:
        The total, 0 for ratio 0 and for sites too narrow to split.

    Raises:
        SplitQError: no width fits.
    """
    if ratio == 0:
        return 0
    if channels < 2 * MAIN_MULTIPLE:
        logger.warning("site with %d input channels is too narrow to split; it keeps one group", channels)
        return 0
    totals = [
        channels - main
        for main in range(MAIN_MULTIPLE, channels, MAIN_MULTIPLE)
        if not balanced or has_balanced_factors(main)
    ]
    totals = [total for total in totals if 2 <= total <= channels // 2]
    if balanced:
        totals = [t for t in totals if has_balanced_factors(t // 2) and has_balanced_factors(t - t // 2)]
    if not totals:
        raise SplitQError(
            f"split: expected a main width below {channels} channels that is a multiple of {MAIN_MULTIPLE} with two "
            "near-equal factors, found none; set split.ratio to 0"
        )
    wide = [total for total in totals if total % (2 * MAIN_MULTIPLE) == 0 and total * MAX_WIDE_SHARE <= channels]
    return min(wide or totals, key=lambda total: (abs(total - 2 * ratio * channels), total))


def plan_split(stats: SiteStats, config: SplitConfig, *, balanced: bool = True, seed: int = 0) -> SplitPlan:
    """Choose the channels of one site.

    Args:
        stats: calibration statistics of the site.
        config: ratio, rule and clusters.
        balanced: see `outlier_width`.
        seed: of the rule "random".

    Raises:
        SplitQError: no text tokens were seen, so text outliers cannot be ranked.
    """
    channels = stats.channels
    total = outlier_width(channels, config.ratio, balanced=balanced)
    every = torch.arange(channels)
    if total == 0:
        return SplitPlan(every, every[:0], every[:0])
    vision, text = (part.cpu() for part in _chosen(stats, config, total, seed))
    main = torch.ones(channels, dtype=torch.bool)
    main[vision] = False
    main[text] = False
    return SplitPlan(main.nonzero().flatten(), text, vision)


def _chosen(stats: SiteStats, config: SplitConfig, total: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """C_v and C_t by the rule of the recipe."""
    counts = total - total // 2, total // 2
    # Without vision tokens the largest magnitudes there are take the vision group.
    vision_absmax = stats.vision_absmax if stats.vision_tokens else stats.text_absmax
    if config.rule == "mocd":
        if stats.text_rows.shape[0] == 0:
            raise SplitQError(f"{stats.name}: expected text tokens in the calibration data, got none; use chat samples")
        return choose_channels(
            vision_absmax,
            stats.text_rows[:: max(1, -(-stats.text_rows.shape[0] // SCORED_ROWS))],
            vision_count=counts[0],
            text_count=counts[1],
            clusters=config.clusters,
        )
    if config.rule == "modality-max":
        vision = largest_channels(vision_absmax, counts[0])
        rest = stats.text_absmax.clone()
        rest[vision] = -1.0  # below every magnitude
        return vision, largest_channels(rest, counts[1])
    if config.rule == "random":
        site_seed = seed ^ int.from_bytes(hashlib.sha256(stats.name.encode()).digest()[:4], "little")
        order = torch.randperm(stats.channels, generator=torch.Generator().manual_seed(site_seed))
        return order[: counts[0]].sort().values, order[counts[0] : total].sort().values
    scores = {"text-max": stats.text_absmax, "vision-max": stats.vision_absmax, "all-max": stats.absmax}
    return halves_by_rank(scores[config.rule], *counts)
