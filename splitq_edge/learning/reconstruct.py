"""Block-wise reconstruction: learn the sites of one block so that the block's output stays what it was (eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from splitq_edge.calibration.block_inputs import BlockBatch, BlockInputs, block_output
from splitq_edge.config import LearningConfig
from splitq_edge.learning.site import TrainableSite
from splitq_edge.modality import VISION, ModalityContext
from splitq_edge.parallel import Processes

SWEEPS = 4  # over the gates, since each depends a little on the others
GATE_BATCHES = 8  # that the sweeps look at; a gate is one number a channel, and every trial is a pass over them
# Places on the line from a gate's start, 0, through what was learned, 1; tried where the start is better.
SHARES = (0.5, -0.5, 1.5, 0.25, -0.25, 0.1, -0.1, 0.75, -1.0)


@dataclass(frozen=True)
class BlockResult:
    """Relative error of a block's update, sum |y_q - y|^2 / sum |y - x|^2 over the kept tokens.

    Attributes:
        before: with the start values.
        after: with the learned ones.
    """

    before: float
    after: float


@dataclass(frozen=True)
class BlockTask:
    """One block to learn.

    Attributes:
        block: decoder block whose linears answer through `sites`.
        sites: its trainable sites.
        inputs: batches; the stream "target" holds the float block's outputs.
        stream: what the block receives: "float" or "quantized".
        context: carries the modality mask.
        processes: who learns with us.
        modality_weights: weight of text and of vision tokens in the loss.
        importance: stream of `inputs` with a factor of every token's weight, None for ones.
    """

    block: nn.Module
    sites: Sequence[TrainableSite]
    inputs: BlockInputs
    stream: str
    context: ModalityContext
    processes: Processes
    modality_weights: tuple[float, float] = (1.0, 1.0)
    importance: str | None = None

    def weights(self, number: int) -> torch.Tensor:
        """Weight of every token of a batch in the loss, [batch, sequence, 1], 0 for padding."""
        return self._weights(number, self.inputs.batch(number), self.inputs.get("target", number))

    def _weights(self, number: int, batch: BlockBatch, target: torch.Tensor) -> torch.Tensor:
        weights = token_weights(batch, self.inputs.get("float", number), target, self.modality_weights)
        return weights if self.importance is None else weights * self.inputs.get(self.importance, number).unsqueeze(-1)

    def squared_error(self, number: int) -> torch.Tensor:
        """Weighted squared error of a batch, a scalar with gradient."""
        batch = self.inputs.batch(number)
        target = self.inputs.get("target", number)
        weights = self._weights(number, batch, target)
        output = block_output(self.block, self.inputs.get(self.stream, number), batch, self.context)
        return ((output - target).square() * weights).sum()


def token_weights(
    batch: BlockBatch,
    hidden: torch.Tensor,
    target: torch.Tensor,
    modality_weights: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Weight of every token in the loss, [batch, sequence, 1].

    Some tokens (the first above all) have updates hundreds of times larger than the rest; a plain mean over tokens
    would be a loss about them alone. Their energy is capped at the median of their sample.
    """
    energy = (target - hidden).square().mean(-1)  # [batch, sequence]
    known = torch.where(batch.keep, energy, torch.nan)
    median = known.nanmedian(-1, keepdim=True).values.clamp(min=1e-12)
    text, vision = modality_weights
    by_modality = torch.where(batch.modality == VISION, vision, text)
    return (batch.keep * by_modality / (energy / median).clamp(min=1)).unsqueeze(-1)


def learn_block(
    task: BlockTask,
    config: LearningConfig,
    generator: torch.Generator,
    *,
    progress: Callable[[], None] | None = None,
) -> BlockResult:
    """Train the sites of one block; they are already in place of its linears.

    Args:
        task: the block, its data and its company.
        config: epochs and learning rates.
        generator: order of the batches.
        progress: called after every epoch.

    Returns:
        The relative error before and after.
    """
    scale = 1 / _energy(task)
    before = block_error(task, scale)
    rates = {"transform": config.transform_lr, "clip": config.clip_lr, "gate": config.gate_lr}
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for site in task.sites:
        for kind, parameters in site.parameter_groups().items():
            kinds[kind] += parameters
    parameters = [parameter for group in kinds.values() for parameter in group]
    optimizer = torch.optim.AdamW(
        [{"params": kinds[kind], "lr": rates[kind]} for kind in rates if kinds[kind]], weight_decay=0.0, fused=True
    )
    count = len(task.inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * step / (config.epochs * count)))
    )
    start = [_state(site) for site in task.sites]
    own = set(task.inputs.own)
    for _ in range(config.epochs):
        for number in torch.randperm(count, generator=generator).tolist():
            optimizer.zero_grad()
            if number in own:
                (task.squared_error(number) * (scale * count)).backward()
            _sum_gradients(parameters, task.processes)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress()
    after = settle_gates(task, scale)
    if not after < before:  # also when it is NaN
        for site, state in zip(task.sites, start, strict=True):
            site.load_state_dict(state)
        after = before
    return BlockResult(before, after)


@torch.no_grad()
def settle_gates(task: BlockTask, scale: float) -> float:
    """Hold every gate against its start, the plain SVD, and move it where the start is better.

    A gate moves what is left to be rounded, so the error is rugged in it and descent may end above the start. Where it
    does, the best of a few points on the line through both is taken.

    Args:
        task: its sites' gates are changed.
        scale: see `block_error`.

    Returns:
        The block's relative error.
    """
    gates = [(site, gate) for site in task.sites for gate in site.parameter_groups()["gate"] if gate.numel()]
    learned = [gate.detach().clone() for _, gate in gates]
    count = len(task.inputs)
    looked_at = range(count)[:: max(1, count // GATE_BATCHES)][:GATE_BATCHES]  # evenly: batches are sorted by length

    def error_with(site: TrainableSite, gate: nn.Parameter, value: torch.Tensor) -> float:
        gate.copy_(value)
        site.hold_again()  # the weights of the other sites are as they were
        return _held_error(task, scale, looked_at)

    with _holding_weights(task):
        error = _held_error(task, scale, looked_at)
        for _ in range(SWEEPS):
            moved = False
            for (site, gate), end in zip(gates, learned, strict=True):
                best = gate.detach().clone()
                start = torch.ones_like(end)
                trial = error_with(site, gate, start)
                if trial <= error:
                    moved = moved or trial < error
                    best, error = start, trial
                    for share in SHARES:
                        value = torch.lerp(start, end, share)
                        trial = error_with(site, gate, value)
                        if trial < error:
                            best, error, moved = value, trial, True
                gate.copy_(best)
                site.hold_again()
            if not moved:
                break
        return _held_error(task, scale)


def _sum_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    if processes.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = processes.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.reshape(parameter.shape)


def _state(site: TrainableSite) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in site.state_dict().items()}


@torch.no_grad()
def _energy(task: BlockTask) -> float:
    """Weighted energy of the float block's update, the unit of the loss."""
    total = torch.zeros((), device=task.inputs.device)
    for number in task.inputs.own:
        hidden, target = task.inputs.get("float", number), task.inputs.get("target", number)
        weights = task.weights(number)
        total += ((target - hidden).square() * weights).sum()
    return max(float(task.processes.sum(total)), 1e-12)


@torch.no_grad()
def block_error(task: BlockTask, scale: float | None = None, numbers: Collection[int] | None = None) -> float:
    """Relative error of the block as it is now; see `BlockResult`.

    Args:
        task: the block and its data.
        scale: one over the energy of all batches, worked out where it is not given.
        numbers: only these batches; all by default.
    """
    with _holding_weights(task):
        return _held_error(task, 1 / _energy(task) if scale is None else scale, numbers)


@contextmanager
def _holding_weights(task: BlockTask) -> Iterator[None]:
    with ExitStack() as held:
        for site in task.sites:
            held.enter_context(site.holding_weight())
        yield


def _held_error(task: BlockTask, scale: float, numbers: Collection[int] | None = None) -> float:
    total = torch.zeros((), device=task.inputs.device)
    for number in task.inputs.own if numbers is None else sorted(set(task.inputs.own) & set(numbers)):
        total += task.squared_error(number)
    return float(task.processes.sum(total)) * scale
