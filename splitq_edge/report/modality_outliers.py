"""Where text and image tokens have their largest channels: what decides whether splitting them off pays."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.splitting.outliers import largest_channels

if TYPE_CHECKING:
    import torch

PLOTTED_BLOCKS = 3  # first, middle, last


@dataclass(frozen=True)
class SiteOutliers:
    """Largest channels of one site.

    Attributes:
        block: number of the block.
        site: name within it, for example "attn_in".
        text_absmax: [K] float32, largest magnitude of each channel over the text tokens.
        vision_absmax: the same over the image tokens.
        text_peak: largest over median channel, text tokens.
        vision_peak: the same, image tokens.
        overlap: Jaccard index of the two sets of top channels.
        borrowed: share of the text's top channels' magnitude (the part above the median channel) that the image's top
            channels would catch; 1 where one joint set serves both.
    """

    block: int
    site: str
    text_absmax: torch.Tensor
    vision_absmax: torch.Tensor
    text_peak: float
    vision_peak: float
    overlap: float
    borrowed: float


def describe(block: int, site: str, stats: SiteStats, share: float) -> SiteOutliers:
    """Compare the modalities at one site.

    Args:
        block: number of the block.
        site: name within it.
        stats: of text and image tokens, both seen.
        share: of the channels that count as top, for example 0.02.
    """
    count = max(1, round(share * stats.channels))
    text, vision = (
        set(largest_channels(absmax, count).tolist()) for absmax in (stats.text_absmax, stats.vision_absmax)
    )
    above = (stats.text_absmax - stats.text_absmax.median()).clamp(min=0)
    own, other = (float(above[sorted(chosen)].sum()) for chosen in (text, vision))
    return SiteOutliers(
        block,
        site,
        stats.text_absmax.cpu(),
        stats.vision_absmax.cpu(),
        _peak(stats.text_absmax),
        _peak(stats.vision_absmax),
        len(text & vision) / len(text | vision),
        other / own if own else 1.0,
    )


def _peak(absmax: torch.Tensor) -> float:
    return float(absmax.max() / absmax.median().clamp(min=1e-12))


def medians(found: Sequence[SiteOutliers]) -> dict[str, dict[str, float]]:
    """By site name, the medians over the blocks."""
    names = ("text_peak", "vision_peak", "overlap", "borrowed")
    return {
        site: {name: statistics.median(getattr(one, name) for one in found if one.site == site) for name in names}
        for site in dict.fromkeys(one.site for one in found)
    }


def as_json(found: Sequence[SiteOutliers], share: float) -> dict[str, Any]:
    """What `splitq-edge outliers --json` writes."""
    names = ("block", "site", "text_peak", "vision_peak", "overlap", "borrowed")
    rows = [{name: _rounded(getattr(one, name)) for name in names} for one in found]
    return {"schema": 1, "share": share, "sites": rows, "medians": medians(found)}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def plot(found: Sequence[SiteOutliers], share: float, title: str, path: Path) -> None:
    """Draw the largest magnitudes by channel, text upwards and image downwards, for three blocks: first, middle, last.

    Args:
        found: all sites.
        share: of the channels that are marked as top.
        title: over the picture.
        path: image file, its suffix names the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = max(one.block for one in found)
    blocks = sorted({round(last * step / (PLOTTED_BLOCKS - 1)) for step in range(PLOTTED_BLOCKS)})
    sites = list(dict.fromkeys(one.site for one in found))
    figure = Figure(figsize=(4 * len(blocks), 1.9 * len(sites)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sites), len(blocks), squeeze=False)
    by_place = {(one.site, one.block): one for one in found}
    for row, site in zip(axes, sites, strict=True):
        for axis, block in zip(row, blocks, strict=True):
            one = by_place[site, block]
            for absmax, sign, color, name in (
                (one.text_absmax, 1, "tab:blue", "text"),
                (one.vision_absmax, -1, "tab:orange", "image"),
            ):
                heights = sign * absmax / absmax.median().clamp(min=1e-12)
                top = largest_channels(absmax, max(1, round(share * absmax.numel())))
                axis.vlines(range(absmax.numel()), 0, heights.numpy(), color=color, linewidth=0.5, alpha=0.5)
                axis.plot(top.numpy(), heights[top].numpy(), ".", color=color, markersize=3, label=f"{name}, top")
            axis.axhline(0, color="black", linewidth=0.5)
            axis.set_title(f"layers.{block}.{site}, overlap {one.overlap:.2f}", fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7, loc="upper right")
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("channel", fontsize=8)
    figure.supylabel("largest magnitude over the median channel's; image downwards", fontsize=8)
    figure.savefig(path, dpi=110)
