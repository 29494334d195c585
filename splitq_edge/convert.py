"""From float linears to quantized sites: the loop over blocks and sites, and what it yields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.config import QuantConfig
from splitq_edge.errors import SplitQError
from splitq_edge.learning.reconstruct import BlockBatch, BlockResult, block_output, learn_block
from splitq_edge.learning.site import TrainableSite
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import SplitLinear, site_parts
from splitq_edge.splitting.plan import SplitPlan, plan_split


@dataclass(frozen=True)
class QuantizedModel:
    """A model whose language linears have been replaced.

    Attributes:
        loaded: the model, changed in place.
        config: the recipe.
        sites: quantized sites by name, in the order of the blocks.
        plans: their split plans.
        blocks: what learning did for each block, empty when nothing was learned.
    """

    loaded: LoadedModel
    config: QuantConfig
    sites: dict[str, SplitLinear]
    plans: dict[str, SplitPlan]
    blocks: dict[int, BlockResult]


def quantize_model(
    loaded: LoadedModel,
    config: QuantConfig,
    stats: dict[str, SiteStats],
    batches: Sequence[BlockBatch],
    *,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> QuantizedModel:
    """Replace every linear of the language blocks by its part of a `SplitLinear`, block by block.

    Args:
        loaded: float model; changed in place.
        config: the recipe.
        stats: calibration statistics by site name.
        batches: what the first block receives, see `first_block_batches`; needed only when something is learned.
        seed: order of the batches while learning.
        progress: called after every epoch of every block, or after every block when nothing is learned.

    Raises:
        SplitQError: a site without statistics, a weight that is not finite, a width that cannot be planned, nothing to
            learn from.
    """
    if config.learning.epochs and not batches:
        raise SplitQError("learning: expected calibration batches, got none; give samples or set learning.epochs to 0")
    generator = torch.Generator().manual_seed(seed)
    quantized = QuantizedModel(loaded, config, {}, {}, {})
    float_batches = quantized_batches = list(batches)
    for index, block in enumerate(loaded.language_blocks()):
        trainable = _place_sites(quantized, stats, index, block)
        if config.learning.epochs:
            # The float block is rebuilt from the trainable sites' own float weights, so no second copy is kept.
            targets = _outputs(block, trainable, float_batches, loaded.context)
            inputs = quantized_batches if config.learning.propagate == "quantized" else float_batches
            quantized.blocks[index] = learn_block(
                block,
                list(trainable.values()),
                inputs,
                targets,
                config.learning,
                loaded.context,
                generator,
                progress=progress,
            )
        _freeze_sites(quantized, index, block, trainable)
        if config.learning.epochs:
            float_batches = [replace(batch, hidden=y) for batch, y in zip(float_batches, targets, strict=True)]
            if config.learning.propagate == "quantized":
                with torch.no_grad():
                    quantized_batches = [
                        replace(batch, hidden=block_output(block, batch, loaded.context)) for batch in quantized_batches
                    ]
        elif progress is not None:
            progress()
    return quantized


@torch.no_grad()
def _outputs(
    block: nn.Module, sites: dict[str, TrainableSite], batches: Sequence[BlockBatch], context: ModalityContext
) -> list[torch.Tensor]:
    """Outputs of the float block."""
    for site in sites.values():
        site.float_only = True
    outputs = [block_output(block, batch, context) for batch in batches]
    for site in sites.values():
        site.float_only = False
    return outputs


def _place_sites(
    quantized: QuantizedModel, stats: dict[str, SiteStats], index: int, block: nn.Module
) -> dict[str, TrainableSite]:
    """Put trainable sites in place of the block's linears."""
    loaded, config = quantized.loaded, quantized.config
    trainable: dict[str, TrainableSite] = {}
    for site in loaded.adapter.language_block:
        name = loaded.adapter.site_name(index, site)
        linears = {path: _linear(block, path, name) for path in site.linears}
        plan = plan_split(stats[name], config.split, balanced=config.transform != "identity")
        absmax = torch.maximum(stats[name].vision_absmax, stats[name].text_absmax) if config.learning.epochs else None
        trainable[name] = TrainableSite(name, list(linears.values()), plan, config, loaded.context, absmax)
        quantized.plans[name] = plan
        _replace_linears(block, trainable[name], {path: linear.out_features for path, linear in linears.items()})
    return trainable


def _freeze_sites(quantized: QuantizedModel, index: int, block: nn.Module, trainable: dict[str, TrainableSite]) -> None:
    """Put the quantized sites in place of the trainable ones."""
    for site in quantized.loaded.adapter.language_block:
        name = quantized.loaded.adapter.site_name(index, site)
        parts: dict[str, Any] = {path: block.get_submodule(path) for path in site.linears}
        widths = {path: int(part.width) for path, part in parts.items()}
        quantized.sites[name] = trainable[name].freeze()
        _replace_linears(block, quantized.sites[name], widths)


def _replace_linears(block: nn.Module, site: nn.Module, widths: dict[str, int]) -> None:
    for path, part in site_parts(site, widths).items():
        block.set_submodule(path, part)


def _linear(block: nn.Module, path: str, site: str) -> nn.Linear:
    module = block.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise SplitQError(f"{site}: expected {path} to be a linear layer, got {type(module).__name__}")
    if not torch.isfinite(module.weight).all():
        raise SplitQError(f"{site}: expected finite weights in {path}, got NaN or infinity; check the checkpoint")
    return module


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
