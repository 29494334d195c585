"""From float linears to quantized sites: the loop over blocks and sites, and what it yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.config import QuantConfig
from splitq_edge.correction.low_rank import LowRank, rank_of, svd_anchor
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import Correction, GroupWeights, SplitLinear, site_parts
from splitq_edge.quant.affine import quantize_weight
from splitq_edge.quant.transforms import factor_pair, invert_into_weight, orthogonal_start
from splitq_edge.splitting.plan import SplitPlan, plan_split


@dataclass(frozen=True)
class QuantizedModel:
    """A model whose language linears have been replaced.

    Attributes:
        loaded: the model, changed in place.
        config: the recipe.
        sites: quantized sites by name, in the order of the blocks.
        plans: their split plans.
    """

    loaded: LoadedModel
    config: QuantConfig
    sites: dict[str, SplitLinear]
    plans: dict[str, SplitPlan]


def quantize_model(
    loaded: LoadedModel,
    config: QuantConfig,
    stats: dict[str, SiteStats],
    *,
    progress: Callable[[], None] | None = None,
) -> QuantizedModel:
    """Replace every linear of the language blocks by its part of a `SplitLinear`.

    Args:
        loaded: float model; changed in place.
        config: the recipe.
        stats: calibration statistics by site name.
        progress: called after every site.

    Raises:
        SplitQError: a site without statistics, a weight that is not finite, a width that cannot be planned.
    """
    sites: dict[str, SplitLinear] = {}
    plans: dict[str, SplitPlan] = {}
    for index, block in enumerate(loaded.language_blocks()):
        for site in loaded.adapter.language_block:
            name = loaded.adapter.site_name(index, site)
            linears = {path: _linear(block, path, name) for path in site.linears}
            plans[name] = plan_split(stats[name], config.split, balanced=config.transform != "identity")
            sites[name] = quantize_site(name, list(linears.values()), plans[name], config, loaded.context)
            widths = {path: linear.out_features for path, linear in linears.items()}
            for path, part in site_parts(sites[name], widths).items():
                block.set_submodule(path, part)
            if progress is not None:
                progress()
    return QuantizedModel(loaded, config, sites, plans)


def _linear(block: nn.Module, path: str, site: str) -> nn.Linear:
    module = block.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise SplitQError(f"{site}: expected {path} to be a linear layer, got {type(module).__name__}")
    if not torch.isfinite(module.weight).all():
        raise SplitQError(f"{site}: expected finite weights in {path}, got NaN or infinity; check the checkpoint")
    return module


def quantize_site(
    name: str, linears: list[nn.Linear], plan: SplitPlan, config: QuantConfig, context: ModalityContext
) -> SplitLinear:
    """Quantize the linears of one site together.

    Args:
        name: site name.
        linears: the linears that read the site's activation, weights [N_i, K].
        plan: channel groups.
        config: the recipe.
        context: modality of the running pass.
    """
    weight = torch.cat([linear.weight.detach().float() for linear in linears]).T.contiguous()  # [K, N]
    groups: dict[str, GroupWeights] = {}
    correction: Correction | None = None
    split = config.split
    for group, channels in (("main", plan.main), ("text", plan.text), ("vision", plan.vision)):
        if not channels.numel():
            continue
        part = weight[channels]
        p1, p2 = _transform(config.transform, channels.numel())
        target = part if p1 is None or p2 is None else invert_into_weight(part, p1, p2)
        bits, activation_bits, group_size = split.bits, split.activation_bits, 0
        if group == "main":
            bits, activation_bits, group_size = config.bits, config.activation_bits, config.group_size
            low_rank = _low_rank(part, p1, p2, config)
            if low_rank is not None:
                target = target - low_rank.cws_product() if low_rank.gate_cws.numel() else target
                correction = Correction(
                    **vars(low_rank),
                    bits=config.correction.bits,
                    residual_bits=config.correction.residual_bits,
                    mac_rows=config.correction.mac_rows,
                )
        qweight, scale = quantize_weight(target, bits, group_size=group_size)
        groups[group] = GroupWeights(qweight, scale, p1, p2, bits, activation_bits)
    return SplitLinear(
        name,
        order=plan.order,
        groups=groups,
        context=context,
        correction=correction,
        bias=_merged_bias(linears),
        group_size=config.group_size,
        activation_symmetric=config.activation_symmetric,
    )


def _transform(kind: str, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if kind == "identity":
        return None, None
    a, b = factor_pair(width)
    return orthogonal_start(a), orthogonal_start(b)


def _low_rank(
    weight: torch.Tensor, p1: torch.Tensor | None, p2: torch.Tensor | None, config: QuantConfig
) -> LowRank | None:
    full = min(weight.shape)
    cws_rank = rank_of(config.correction.cws_ratio, full)
    mac_rank = rank_of(config.correction.mac_ratio, full)
    if max(cws_rank, mac_rank) == 0:
        return None
    return svd_anchor(weight, p1, p2, cws_rank=cws_rank, mac_rank=mac_rank, bits=config.correction.bits)


def _merged_bias(linears: list[nn.Linear]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float() for linear in linears
    ]
    return torch.cat(parts)


def effective_bits(sites: dict[str, SplitLinear]) -> float:
    """Stored bits a weight of the quantized linears, low-rank factors included, scales and transforms not.

    This is the figure to print beside a scheme's label (W4A4 with 2 % + 2 % outlier channels and ranks 2 % / 3 % is
    about 4.4 bits).
    """
    stored = weights = 0
    for site in sites.values():
        for group in site.groups.values():
            stored += group.qweight.numel() * group.bits
        if site.correction is not None:
            stored += (site.correction.u.numel() + site.correction.v.numel()) * site.correction.bits
        weights += site.in_features * site.out_features
    return stored / weights
