"""What a site's quantization costs and what each component gives back: SQNR by modality, channels, overlap."""

from __future__ import annotations

from typing import Any

import torch

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.learning.site import TrainableSite
from splitq_edge.modality import TEXT, VISION
from splitq_edge.modules.split_linear import SplitLinear
from splitq_edge.quant.affine import dequantize_weight, quantize_rows, quantize_weight
from splitq_edge.quant.metrics import decibel, energies, sqnr_db
from splitq_edge.splitting.outliers import largest_channels
from splitq_edge.splitting.plan import SplitPlan

MAX_ROWS = 512  # rows of a modality that the report looks at


@torch.no_grad()
def site_quality(site: TrainableSite, frozen: SplitLinear, stats: SiteStats) -> dict[str, Any]:
    """The report of one site, JSON content.

    Args:
        site: with the learned values.
        frozen: its integers.
        stats: calibration statistics; their rows are what the site is measured on.

    Returns:
        `sqnr_db`: by stage, [text, vision] in dB, null without rows of the modality. Stages: "rtn" (whole site,
        nearest), "split" (outlier groups apart, nothing else), "transform" (learned P, scale and clips, no correction),
        "cws", "mac" (all, as learned) and "final" (the integers of the export). `channels`: see `channel_report`.
    """
    stages: dict[str, list[float | None]] = {}
    rows = {TEXT: stats.text_rows, VISION: stats.vision_rows}
    for kind in (TEXT, VISION):
        x = rows[kind][:: max(1, -(-rows[kind].shape[0] // MAX_ROWS))]
        for name, value in _stage_outputs(site, frozen, x, kind).items():
            target = x @ site.weight if site.bias is None else x @ site.weight + site.bias
            stages.setdefault(name, []).append(None if x.shape[0] == 0 else round(sqnr_db(target, value), 3))
    return {"sqnr_db": stages, "channels": channel_report(site.plan, stats)}


class PlainQuality:
    """The report of a site without split and correction, whose output channels may come in slices.

    Args:
        stats: calibration statistics; their rows are what the site is measured on.
    """

    def __init__(self, stats: SiteStats) -> None:
        self._rows = [rows[:: max(1, -(-rows.shape[0] // MAX_ROWS))] for rows in (stats.text_rows, stats.vision_rows)]
        self._energies = {"rtn": [[0.0, 0.0], [0.0, 0.0]], "final": [[0.0, 0.0], [0.0, 0.0]]}

    @torch.no_grad()
    def add(self, site: TrainableSite, frozen: SplitLinear) -> None:
        """Measure the site, or some of its output channels."""
        for kind, x in enumerate(self._rows):
            target = x @ site.weight if site.bias is None else x @ site.weight + site.bias
            for name, value in (("rtn", _nearest(site, x, split=False)), ("final", frozen(x))):
                for place, energy in enumerate(energies(target, value)):
                    self._energies[name][kind][place] += energy

    def report(self) -> dict[str, Any]:
        """The stages "rtn" and "final" of `site_quality`'s `sqnr_db`."""
        return {
            "sqnr_db": {
                name: [
                    None if x.shape[0] == 0 else round(decibel(*both), 3)
                    for x, both in zip(self._rows, kinds, strict=True)
                ]
                for name, kinds in self._energies.items()
            }
        }


def _stage_outputs(site: TrainableSite, frozen: SplitLinear, x: torch.Tensor, kind: int) -> dict[str, torch.Tensor]:
    mask = torch.full(x.shape[:1], kind, dtype=torch.int8, device=x.device)
    outputs = {"rtn": _nearest(site, x, split=False), "split": _nearest(site, x, split=True)}
    with site.context.using(mask):
        for name, without in (("transform", {"cws", "mac"}), ("cws", {"mac"}), ("mac", set())):
            site.without = frozenset(without)
            outputs[name] = site(x)
        outputs["final"] = frozen(x)
    return outputs


def _nearest(site: TrainableSite, x: torch.Tensor, *, split: bool) -> torch.Tensor:
    """Rounded to nearest without scale, transform, clips and correction."""
    config, plan = site.config, site.plan
    every = torch.arange(x.shape[1])
    groups = [(every, config.bits, config.activation_bits, config.group_size, config.activation_symmetric)]
    if split:
        low = config.split.bits, config.split.activation_bits, 0, True
        groups = [(plan.main, *groups[0][1:]), (plan.text, *low), (plan.vision, *low)]
    output = x.new_zeros(x.shape[0], site.out_features)
    for channels, bits, activation_bits, group_size, symmetric in groups:
        if channels.numel() == 0:
            continue
        chosen = channels.to(x.device)
        codes, scale = quantize_rows(x[:, chosen], activation_bits, symmetric=symmetric)
        qweight, weight_scale = quantize_weight(site.weight[chosen], bits, group_size=group_size)
        output += (codes * scale) @ dequantize_weight(qweight, weight_scale, group_size)
    return output if site.bias is None else output + site.bias


def channel_report(plan: SplitPlan, stats: SiteStats) -> dict[str, Any]:
    """Which channels were split off, how much of the magnitude they carry, and how far the modalities agree.

    Returns:
        `text`, `vision`: channel numbers; `absmax_share`: share of the sum of the channels' largest magnitudes that
        each set carries over its own modality's tokens; `absmax_over_median`: [text, vision], the largest channel over
        the median channel; `jaccard`: overlap of the modalities' top channels, as many as the groups have.
    """
    count = max(1, (plan.text.numel() + plan.vision.numel()) // 2)
    if plan.text.numel() + plan.vision.numel() == 0:
        count = max(1, round(0.02 * stats.channels))
    top = [set(largest_channels(absmax, count).tolist()) for absmax in (stats.text_absmax, stats.vision_absmax)]
    both = stats.text_tokens > 0 and stats.vision_tokens > 0
    return {
        "text": plan.text.tolist(),
        "vision": plan.vision.tolist(),
        "absmax_share": [
            _share(stats.text_absmax, plan.text),
            _share(stats.vision_absmax, plan.vision),
        ],
        "absmax_over_median": [_peak(stats.text_absmax), _peak(stats.vision_absmax)],
        "jaccard": round(len(top[0] & top[1]) / len(top[0] | top[1]), 4) if both else None,
    }


def _share(absmax: torch.Tensor, channels: torch.Tensor) -> float:
    return round(float(absmax[channels.to(absmax.device)].sum() / absmax.sum().clamp(min=1e-12)), 4)


def _peak(absmax: torch.Tensor) -> float:
    return round(float(absmax.max() / absmax.median().clamp(min=1e-12)), 3)
