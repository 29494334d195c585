"""Calibration block by block: statistics, split plan, learning, rounding; each finished block goes to disk.

A block is read from the checkpoint, quantized and dropped again, so one block is in memory at a time. What the next
block receives is kept in an `ActivationStore`. A resumed run recomputes the float (and quantized) activations of the
finished blocks instead of storing them; with the same seed and threads it ends with the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import (
    BlockInputs,
    PaddedBatch,
    block_output,
    first_block_inputs,
    input_of,
    padded_batches,
)
from splitq_edge.calibration.extra_sites import (
    check_extras,
    head_stats,
    observing_vision,
    quantize_extra,
    wanted_extras,
)
from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.calibration.sensitivity import Sensitivity, collect_sensitivity
from splitq_edge.calibration.state import BlockRecord, CalibrationState
from splitq_edge.config import QuantConfig
from splitq_edge.errors import SplitQError
from splitq_edge.learning.reconstruct import BlockTask, block_error, learn_block
from splitq_edge.learning.site import TrainableSite, merged_weight
from splitq_edge.loading import LoadedModel
from splitq_edge.methods.scales import ScaleInputs
from splitq_edge.modules.split_linear import SplitLinear, site_parts
from splitq_edge.parallel import Processes
from splitq_edge.report.site_quality import site_quality
from splitq_edge.splitting.plan import plan_split

Progress = Callable[[str, int], None]  # what was done, steps of it
STATS_BATCH = 4  # samples a batch where nothing is learned


@dataclass
class Calibration:
    """A run over one model.

    Attributes:
        loaded: the float model; never changed.
        config: the recipe.
        state: where finished blocks go.
        store: where hidden states go.
        seed: order of the batches, and of the rule "random".
        processes: the group that shares the samples.
        progress: called with "sensitivity" and "block" and the steps done, see `steps`.
    """

    loaded: LoadedModel
    config: QuantConfig
    state: CalibrationState
    store: ActivationStore
    seed: int
    processes: Processes
    progress: Progress | None = None

    @property
    def _keeps_quantized(self) -> bool:
        """Whether the stream "quantized" is needed, for learning or for rounding."""
        return self.config.learning.propagate == "quantized" or self.config.rounding == "gptaq"

    def steps(self) -> int:
        """Progress steps of a whole run: one an epoch and one for the rest of a block."""
        return self.loaded.block_count * (self.config.learning.epochs + 1)

    def run(self, encoded: Sequence[dict[str, torch.Tensor]], *, finished: int, stop_after: int | None = None) -> None:
        """Calibrate the blocks, and the sites beside them that the recipe asks for, that are not finished yet.

        The vision encoder's come before the first block, the output projection's after the last.

        Args:
            encoded: model inputs of the samples, see `encode_sample`; the same in all processes.
            finished: blocks already in the state.
            stop_after: stop when so many blocks are finished, None for all.

        Raises:
            SplitQError: no samples, a weight that is not finite, a width that cannot be planned, a recipe that
                quantizes what the model does not have.
        """
        check_extras(self.loaded, self.config)
        if not encoded:
            raise SplitQError("calibration: expected at least one sample, got none; give calibration data")
        blocks = self.loaded.block_count if stop_after is None else min(stop_after, self.loaded.block_count)
        waiting = self._waiting_extras(all_blocks=blocks == self.loaded.block_count)
        if finished >= blocks and not waiting:
            return
        pad = self.loaded.tokenizer.pad_token_id
        size = self.config.learning.batch if self.config.learning.epochs else STATS_BATCH
        batches = padded_batches(encoded, size, 0 if pad is None else pad, self.processes)
        self._check_shares(batches, size)
        samples = len(encoded)
        inputs = self._first_inputs(batches, samples, with_vision="vision" in waiting)
        if finished >= blocks and "lm_head" not in waiting:
            self.store.clear()
            return
        if self._keeps_quantized:
            for number in inputs.own:
                inputs.put("quantized", number, inputs.get("float", number))
        sensitivity = self._sensitivity(inputs)
        for index in range(blocks):
            block = self.loaded.block(index)
            inputs.begin(index, ("float", "quantized") if self._keeps_quantized else ("float",))
            if index < finished:
                self._replay(index, block, inputs)
            else:
                self._calibrate(index, block, inputs, samples, sensitivity)
            del block
            inputs.rename("target", "float")
        if "lm_head" in waiting:
            with self.loaded.outside_blocks():
                stats = head_stats(self.loaded, inputs, samples, self.processes)
                self._calibrate_extra("lm_head", {stats.name: stats})
        self.store.clear()

    def _check_shares(self, batches: Sequence[PaddedBatch], size: int) -> None:
        """Every process must have samples: statistics come from all of them, and each batch is dealt out in turn."""
        shares = self.processes.gather(sum(batch.samples.numel() for batch in batches))
        if 0 in shares:
            raise SplitQError(
                f"calibration: expected samples for each of {len(shares)} processes, got none for {shares.count(0)} "
                f"with {sum(shares)} samples in batches of {size}; start fewer processes, or raise --calib-samples or "
                "learning.batch"
            )

    def _waiting_extras(self, *, all_blocks: bool) -> list[str]:
        """Sites beside the blocks that are still to do, the same in all processes."""
        done = self.processes.gather(self.state.finished_extras())[0]
        return [name for name in wanted_extras(self.config) if name not in done and (all_blocks or name != "lm_head")]

    def _first_inputs(self, batches: Sequence[PaddedBatch], samples: int, *, with_vision: bool) -> BlockInputs:
        """What the first block receives; on the way there the vision sites are observed and quantized."""
        with self.loaded.outside_blocks():
            if not with_vision:
                return first_block_inputs(self.loaded, batches, self.store)
            with observing_vision(self.loaded, samples) as observer:
                inputs = first_block_inputs(self.loaded, batches, self.store, before=observer.begin)
            self._calibrate_extra("vision", observer.stats(self.processes))
        return inputs

    def _calibrate_extra(self, extra: str, stats: dict[str, SiteStats]) -> None:
        if self.processes.main:
            self.state.save_extra(extra, quantize_extra(self.loaded, self.config, extra, stats))
        self.processes.wait()

    def _sensitivity(self, inputs: BlockInputs) -> Sensitivity:
        balance = self.config.learning.balance if self.config.learning.epochs else "none"
        if self.config.scale != "mbq" and balance == "none":
            return {}
        return collect_sensitivity(
            self.loaded,
            inputs,
            self.processes,
            tokens=balance == "answers",
            progress=lambda: self._done("sensitivity", 1),
        )

    def _done(self, what: str, steps: int) -> None:
        if self.progress is not None:
            self.progress(what, steps)

    def _replay(self, index: int, block: nn.Module, inputs: BlockInputs) -> None:
        """Activations behind a finished block."""
        self._float_outputs(block, inputs)
        if self._keeps_quantized:
            record = self.state.load(index, self.loaded.context, self.loaded.device)
            self._place(index, block, record.sites)
            self._advance_quantized(block, inputs)
        self._done("block", self.config.learning.epochs + 1)

    def _calibrate(
        self, index: int, block: nn.Module, inputs: BlockInputs, samples: int, sensitivity: Sensitivity
    ) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        stats = observe_block(self.loaded, index, block, inputs, samples, self.processes)
        sites = self._trainable_sites(index, block, stats, sensitivity)
        quantized = self.config.learning.propagate == "quantized"
        learning = self.config.learning
        importance = f"importance-{index}" if learning.epochs and learning.balance == "answers" else None
        task = BlockTask(
            block,
            list(sites.values()),
            inputs,
            "quantized" if quantized else "float",
            self.loaded.context,
            self.processes,
            self._modality_weights(index, sensitivity),
            importance,
        )
        errors: dict[str, float] = {}
        if self.config.learning.epochs:
            result = learn_block(task, self.config.learning, generator, progress=lambda: self._done("block", 1))
            errors = {"before": result.before, "learned": result.after}
        if self.config.rounding == "gptaq":
            frozen = self._frozen_in_turn(index, task, sites)
        else:
            frozen = {name: site.freeze(hessian) for name, site, hessian in self._with_hessians(task, sites)}
        quality = {name: site_quality(site, frozen[name], stats[name]) for name, site in sites.items()}
        self._place(index, block, frozen)
        errors["final"] = block_error(task)
        report = {"block": index, "relative_error": errors, "sites": quality}
        if self.processes.main:
            self.state.save(index, BlockRecord(frozen, report))
        self.processes.wait()
        if self._keeps_quantized:
            self._advance_quantized(block, inputs)
        self._done("block", 1)

    @torch.no_grad()
    def _float_outputs(self, block: nn.Module, inputs: BlockInputs) -> None:
        for number in inputs.own:
            output = block_output(block, inputs.get("float", number), inputs.batch(number), self.loaded.context)
            inputs.put("target", number, output)

    @torch.no_grad()
    def _advance_quantized(self, block: nn.Module, inputs: BlockInputs) -> None:
        for number in inputs.own:
            output = block_output(block, inputs.get("quantized", number), inputs.batch(number), self.loaded.context)
            inputs.put("quantized", number, output)

    def _trainable_sites(
        self, index: int, block: nn.Module, stats: dict[str, SiteStats], sensitivity: Sensitivity
    ) -> dict[str, TrainableSite]:
        """Put trainable sites in place of the block's linears."""
        sites: dict[str, TrainableSite] = {}
        for site in self.loaded.adapter.language_block:
            name = self.loaded.adapter.site_name(index, site)
            linears = {path: _linear(block, path, name) for path in site.linears}
            known = stats[name]
            plan = plan_split(known, self.config.split, balanced=self.config.transform != "identity", seed=self.seed)
            inputs = ScaleInputs(
                merged_weight(list(linears.values())),
                known.absmax,
                known.text_rows,
                known.vision_rows,
                sensitivity.get(name, (1.0, 1.0)),
            )
            sites[name] = TrainableSite(name, list(linears.values()), plan, self.config, self.loaded.context, inputs)
            replace_linears(block, sites[name], {path: linear.out_features for path, linear in linears.items()})
        return sites

    def _with_hessians(
        self, task: BlockTask, sites: dict[str, TrainableSite]
    ) -> list[tuple[str, TrainableSite, torch.Tensor | None]]:
        if self.config.rounding == "nearest":
            return [(name, site, None) for name, site in sites.items()]
        for number in task.inputs.own:
            batch, weights = task.inputs.batch(number), self._row_weights(task, number)
            with ExitStack() as stack, torch.no_grad():
                for site in sites.values():
                    stack.enter_context(site.observing(weights))
                block_output(task.block, task.inputs.get(task.stream, number), batch, self.loaded.context)
        return [(name, site, self._summed_hessian(site)) for name, site in sites.items()]

    @torch.no_grad()
    def _frozen_in_turn(self, index: int, task: BlockTask, sites: dict[str, TrainableSite]) -> dict[str, SplitLinear]:
        """Round site after site, in the order in which they run.

        Each receives what the quantized ones before it give, and is rounded towards what its float linears say to what
        the float model's give.
        """
        exact = self.loaded.block(index)
        kept = sum(int(task.inputs.batch(number).keep.sum()) for number in task.inputs.own)
        rows = int(self.processes.sum(torch.tensor(float(kept), device=self.loaded.device)))
        frozen: dict[str, SplitLinear] = {}
        for site in self.loaded.adapter.language_block:
            name = self.loaded.adapter.site_name(index, site)
            trained, linear = sites[name], exact.get_submodule(site.linears[0])
            with trained.holding_weight():
                for number in task.inputs.own:
                    batch = task.inputs.batch(number)
                    x = input_of(linear, exact, task.inputs.get("float", number), batch, self.loaded.context)
                    weights = self._row_weights(task, number)
                    with trained.observing(weights, trained.float_output(x)):
                        hidden = task.inputs.get("quantized", number)
                        input_of(trained, task.block, hidden, batch, self.loaded.context)
            hessian, cross = self._summed_hessian(trained), trained.take_cross()
            cross = self.processes.sum(torch.zeros_like(trained.weight) if cross is None else cross)
            frozen[name] = trained.freeze(hessian, cross, rows)
            self._place(index, task.block, {**sites, **frozen})
        return frozen

    def _row_weights(self, task: BlockTask, number: int) -> torch.Tensor:
        """Weight of every token in GPTQ's matrix, [batch, sequence, 1]."""
        return (
            task.weights(number) if self.config.learning.epochs else task.inputs.batch(number).keep[..., None].float()
        )

    def _summed_hessian(self, site: TrainableSite) -> torch.Tensor:
        """Of all processes' samples."""
        hessian = site.take_hessian()
        return self.processes.sum(site.weight.new_zeros(*site.weight.shape[:1] * 2) if hessian is None else hessian)

    def _modality_weights(self, index: int, sensitivity: Sensitivity) -> tuple[float, float]:
        """Loss weights of text and vision tokens, with mean 1: MBQ's ratio of mean absolute gradients."""
        if self.config.learning.balance != "mbq" or not self.config.learning.epochs:
            return 1.0, 1.0
        text, vision = sensitivity[f"block.{index}"]
        mean = max((text + vision) / 2, 1e-20)
        return text / mean, vision / mean

    def _place(self, index: int, block: nn.Module, sites: Mapping[str, nn.Module]) -> None:
        place_sites(self.loaded.adapter, index, block, sites)


def observe_block(
    loaded: LoadedModel, index: int, block: nn.Module, inputs: BlockInputs, samples: int, processes: Processes
) -> dict[str, SiteStats]:
    """Run a float block over its inputs.

    Args:
        loaded: its model.
        index: number of the block.
        block: with its linears in place.
        inputs: the stream "float" is read, its outputs become the stream "target".
        samples: calibration samples in all processes.
        processes: the group that shares them.

    Returns:
        Statistics of what its sites receive, by site name.
    """
    observers: dict[str, Observer] = {}
    running: list[int] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        observers[name] = Observer(name, samples)

        def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
            batch = inputs.batch(running[-1])
            x = args[0].reshape(*batch.keep.shape, -1)
            observers[name].update(x, batch.modality, batch.keep, batch.samples)

        return observe

    with ExitStack() as handles, torch.no_grad():
        for site in loaded.adapter.language_block:
            first = block.get_submodule(site.linears[0])
            handles.callback(first.register_forward_pre_hook(hook(loaded.adapter.site_name(index, site))).remove)
        for number in inputs.own:
            running.append(number)
            output = block_output(block, inputs.get("float", number), inputs.batch(number), loaded.context)
            inputs.put("target", number, output)
    return {name: observer.stats(processes) for name, observer in observers.items()}


def place_sites(adapter: ModelAdapter, index: int, block: nn.Module, sites: Mapping[str, nn.Module]) -> None:
    """Put quantized sites in place of a block's linears (or of what stands there for them).

    Args:
        adapter: the family.
        index: number of the block.
        block: changed in place.
        sites: quantized sites by name; those of other blocks are ignored.
    """
    for site in adapter.language_block:
        name = adapter.site_name(index, site)
        modules: dict[str, Any] = {path: block.get_submodule(path) for path in site.linears}
        widths = {path: int(m.out_features if isinstance(m, nn.Linear) else m.width) for path, m in modules.items()}
        replace_linears(block, sites[name], widths)


def _linear(block: nn.Module, path: str, site: str) -> nn.Linear:
    module = block.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise SplitQError(f"{site}: expected {path} to be a linear layer, got {type(module).__name__}")
    if not torch.isfinite(module.weight).all():
        raise SplitQError(f"{site}: expected finite weights in {path}, got NaN or infinity; check the checkpoint")
    return module


def replace_linears(block: nn.Module, site: nn.Module, widths: dict[str, int]) -> None:
    """Put the parts of a site in place of linears; widths: output features by path, in the site's order."""
    for path, part in site_parts(site, widths).items():
        block.set_submodule(path, part)
