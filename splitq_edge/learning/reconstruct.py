"""Block-wise reconstruction: learn the sites of one block so that the block's output stays what it was (eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitq_edge.config import LearningConfig
from splitq_edge.learning.site import TrainableSite
from splitq_edge.modality import ModalityContext


@dataclass(frozen=True)
class BlockBatch:
    """What a block receives for one batch of calibration samples.

    Attributes:
        hidden: [batch, sequence, hidden] float32.
        kwargs: the block's other arguments (mask, position embeddings, ...), the same for every block.
        modality: [batch, sequence] int8.
        keep: [batch, sequence] bool, False for padding.
    """

    hidden: torch.Tensor
    kwargs: dict[str, Any]
    modality: torch.Tensor
    keep: torch.Tensor


@dataclass(frozen=True)
class BlockResult:
    """Relative error of a block's update, sum |y_q - y|^2 / sum |y - x|^2 over the kept tokens.

    Attributes:
        before: with the start values.
        after: with the learned ones.
    """

    before: float
    after: float


def block_output(block: nn.Module, batch: BlockBatch, context: ModalityContext) -> torch.Tensor:
    """Run a block on a batch: [batch, sequence, hidden]."""
    with context.using(batch.modality):
        output = block(batch.hidden, **batch.kwargs)
    return output[0] if isinstance(output, tuple) else output


def token_weights(batch: BlockBatch, target: torch.Tensor) -> torch.Tensor:
    """Weight of every token in the loss, [batch, sequence, 1].

    Some tokens (the first above all) have updates hundreds of times larger than the rest; a plain mean over tokens
    would be a loss about them alone. Their energy is capped at the median token's.
    """
    energy = (target - batch.hidden).square().mean(-1, keepdim=True)
    median = energy[batch.keep].median().clamp(min=1e-12)
    return batch.keep.unsqueeze(-1) / (energy / median).clamp(min=1)


def learn_block(
    block: nn.Module,
    sites: Sequence[TrainableSite],
    batches: Sequence[BlockBatch],
    targets: Sequence[torch.Tensor],
    config: LearningConfig,
    context: ModalityContext,
    generator: torch.Generator,
    *,
    progress: Callable[[], None] | None = None,
) -> BlockResult:
    """Train the sites of one block; they are already in place of its linears.

    Args:
        block: decoder block whose linears answer through `sites`.
        sites: its trainable sites.
        batches: inputs of the block.
        targets: outputs of the float block, one a batch.
        config: epochs and learning rates.
        context: carries the modality mask.
        generator: order of the batches.
        progress: called after every epoch.

    Returns:
        The relative error before and after.
    """
    weights = [token_weights(batch, target) for batch, target in zip(batches, targets, strict=True)]
    scale = 1 / _energy(batches, targets, weights)
    before = _error(block, batches, targets, weights, scale, context)
    rates = {"transform": config.transform_lr, "clip": config.clip_lr, "gate": config.gate_lr}
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for site in sites:
        for kind, parameters in site.parameter_groups().items():
            kinds[kind] += parameters
    optimizer = torch.optim.AdamW(
        [{"params": kinds[kind], "lr": rates[kind]} for kind in rates if kinds[kind]], weight_decay=0.0
    )
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    start = [_state(site) for site in sites]
    for _ in range(config.epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            output = block_output(block, batches[index], context)
            loss = ((output - targets[index]).square() * weights[index]).sum() * (scale * len(batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in kinds.values() for p in group], 1.0)
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress()
    after = _error(block, batches, targets, weights, scale, context)
    if not after < before:  # also when it is NaN
        for site, state in zip(sites, start, strict=True):
            site.load_state_dict(state)
        after = before
    return BlockResult(before, after)


def _state(site: TrainableSite) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in site.state_dict().items()}


def _energy(batches: Sequence[BlockBatch], targets: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> float:
    """Weighted energy of the float block's update, the unit of the loss."""
    parts = zip(batches, targets, weights, strict=True)
    return max(sum(((t - b.hidden).square() * w).sum().item() for b, t, w in parts), 1e-12)


@torch.no_grad()
def _error(
    block: nn.Module,
    batches: Sequence[BlockBatch],
    targets: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scale: float,
    context: ModalityContext,
) -> float:
    total = 0.0
    for batch, target, weight in zip(batches, targets, weights, strict=True):
        total += ((block_output(block, batch, context) - target).square() * weight).sum().item()
    return total * scale
