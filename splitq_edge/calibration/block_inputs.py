"""What the language blocks receive: calibration samples in padded batches, run up to the first block and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext, modality_of
from splitq_edge.parallel import Processes

SEQUENCES = {
    "input_ids": None,
    "attention_mask": 0,
    "answer": False,
    "modality": 0,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
}
NOT_MODEL_INPUTS = ("answer", "modality")


@dataclass(frozen=True)
class PaddedBatch:
    """Samples of similar length side by side.

    Attributes:
        inputs: model inputs, left-padded; with "answer" [batch, sequence] bool, the tokens that the loss is about, and
            where the caller named the modality himself "modality" [batch, sequence] int8.
        samples: [batch] int64, number of each sample.
        pixel_rows: rows of pixel_values that each sample has, in their order; 0 without an image.
    """

    inputs: dict[str, torch.Tensor]
    samples: torch.Tensor
    pixel_rows: tuple[int, ...] = ()


def padded_batches(
    encoded: Sequence[dict[str, torch.Tensor]], size: int, pad_token_id: int, processes: Processes
) -> list[PaddedBatch]:
    """Batches of this process: each takes every `processes.size`-th sample of the same global batches.

    Args:
        encoded: model inputs of single conversations, the same in all processes.
        size: samples a batch, over all processes.
        pad_token_id: fills input_ids; attention_mask is 0 there.
        processes: the group that shares the samples.

    Returns:
        One entry a global batch; where this process has no sample of it, `samples` is empty and `inputs` too.
    """
    order = sorted(range(len(encoded)), key=lambda index: encoded[index]["input_ids"].shape[1])
    # A batch holds samples with the same kinds of inputs: text-only chats have no pixel_values.
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index in order:
        kinds.setdefault(tuple(sorted(encoded[index])), []).append(index)
    batches = []
    for members in kinds.values():
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            width = max(encoded[index]["input_ids"].shape[1] for index in batch)
            own = batch[processes.rank :: processes.size]
            inputs = _pad([encoded[index] for index in own], width, pad_token_id) if own else {}
            pixel_rows = tuple(len(encoded[index].get("pixel_values", ())) for index in own)
            batches.append(PaddedBatch(inputs, torch.tensor(own, dtype=torch.long), pixel_rows))
    return batches


def _pad(samples: Sequence[dict[str, torch.Tensor]], width: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    batch = {name: torch.cat([s[name] for s in samples]) for name in samples[0] if name not in SEQUENCES}
    for name, filler in SEQUENCES.items():
        if name in samples[0]:
            value = pad_token_id if filler is None else filler
            rows = [nn.functional.pad(s[name], (width - s[name].shape[1], 0), value=value) for s in samples]
            batch[name] = torch.cat(rows)
    return batch


@dataclass(frozen=True)
class BlockBatch:
    """What a block receives for one batch beside the hidden states.

    Attributes:
        kwargs: the block's other arguments (mask, position embeddings, ...).
        modality: [batch, sequence] int8.
        keep: [batch, sequence] bool, False for padding.
        samples: [batch] int64, sample numbers.
    """

    kwargs: dict[str, Any]
    modality: torch.Tensor
    keep: torch.Tensor
    samples: torch.Tensor


class BlockInputs:
    """Batches and the hidden states that belong to them, in an `ActivationStore`.

    Hidden states are kept by a stream's name ("float", "quantized", "target") and the batch's number.

    Attributes:
        block: number of the block that `batch` speaks of.
    """

    def __init__(self, store: ActivationStore, device: torch.device) -> None:
        self.store = store
        self.device = device
        self.block = 0
        self._added: dict[int, set[int]] = {}
        self._batches: list[tuple[list[tuple[Any, list[Any]]], list[int], PaddedBatch, torch.Tensor] | None] = []

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def own(self) -> list[int]:
        """Numbers of the batches of which this process has samples."""
        return [number for number, entry in enumerate(self._batches) if entry is not None]

    def add(
        self,
        batch: PaddedBatch,
        hidden: Sequence[torch.Tensor],
        calls: Sequence[dict[str, Any]],
        modality: torch.Tensor,
    ) -> None:
        """Keep a batch and its hidden states under the stream "float".

        Args:
            batch: the samples.
            hidden: what every block receives if the blocks only hand on, [batch, sequence, hidden] each.
            calls: the other arguments of every block; what several blocks share is kept once.
            modality: [batch, sequence] int8.
        """
        number = len(self._batches)
        for block, (before, now) in enumerate(pairwise(hidden), start=1):
            if now is not before:
                self.store.put(_added_key(number, block), now - before)
                self._added.setdefault(number, set()).add(block)
        kinds: list[tuple[Any, list[Any]]] = []
        known: dict[tuple[int, ...], int] = {}
        of_block = []
        for kwargs in calls:
            leaves, spec = _pytree.tree_flatten(kwargs)
            same = tuple(map(id, leaves))
            if same not in known:
                known[same] = len(kinds)
                kinds.append((spec, [self._kept(leaf, number, len(kinds), i) for i, leaf in enumerate(leaves)]))
            of_block.append(known[same])
        self._batches.append((kinds, of_block, batch, modality))
        self.put("float", number, hidden[0])

    def _kept(self, leaf: Any, number: int, kind: int, index: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        self.store.put(_leaf_key(number, kind, index), leaf)
        return _Stored()

    def add_missing(self) -> None:
        """A global batch of which other processes have all samples."""
        self._batches.append(None)

    def begin(self, block: int, streams: Sequence[str] = ("float",)) -> None:
        """From here on `batch` speaks of this block, and the streams hold what enters it.

        Args:
            block: its number.
            streams: hold what the block before it gave; some models add to that on the way.
        """
        self.block = block
        for number in self.own:
            if (added := self.added(number)) is not None:
                for stream in streams:
                    self.put(stream, number, self.get(stream, number) + added)

    def added(self, number: int) -> torch.Tensor | None:
        """What the model adds to the hidden states before the block, [batch, sequence, hidden]; None for nothing."""
        key = _added_key(number, self.block)
        return self.store.get(key, self.device) if self.block in self._added.get(number, ()) else None

    def batch(self, number: int) -> BlockBatch:
        """The batch without its hidden states."""
        kinds, of_block, padded, modality = self._entry(number)
        kind = of_block[min(self.block, len(of_block) - 1)]
        spec, leaves = kinds[kind]
        values = [
            self.store.get(_leaf_key(number, kind, index), self.device) if isinstance(leaf, _Stored) else leaf
            for index, leaf in enumerate(leaves)
        ]
        return BlockBatch(
            _pytree.tree_unflatten(values, spec),
            modality.to(self.device),
            padded.inputs["attention_mask"].bool().to(self.device),
            padded.samples,
        )

    def tokens(self, number: int) -> dict[str, torch.Tensor]:
        """input_ids and, where the samples have it, the answer mask of a batch."""
        inputs = self._entry(number)[2].inputs
        return {name: inputs[name].to(self.device) for name in ("input_ids", "answer") if name in inputs}

    def _entry(self, number: int) -> tuple[list[tuple[Any, list[Any]]], list[int], PaddedBatch, torch.Tensor]:
        entry = self._batches[number]
        assert entry is not None, f"batch {number} belongs to other processes"
        return entry

    def put(self, stream: str, number: int, hidden: torch.Tensor) -> None:
        """Keep hidden states [batch, sequence, hidden]."""
        self.store.put(f"{stream}-{number}", hidden)

    def get(self, stream: str, number: int) -> torch.Tensor:
        """Hidden states of a stream."""
        return self.store.get(f"{stream}-{number}", self.device)

    def rename(self, old: str, new: str) -> None:
        """Give a whole stream another name; what had that name is forgotten."""
        for number in self.own:
            self.store.rename(f"{old}-{number}", f"{new}-{number}")


class _Stored:
    """Stands for a tensor that lies in the store."""


def _added_key(number: int, block: int) -> str:
    return f"added-{number}-{block}"


def _leaf_key(number: int, kind: int, index: int) -> str:
    return f"argument-{number}-{kind}-{index}"


def block_output(block: nn.Module, hidden: torch.Tensor, batch: BlockBatch, context: ModalityContext) -> torch.Tensor:
    """Run a block on a batch: [batch, sequence, hidden]."""
    with context.using(batch.modality, batch.keep):
        output = block(hidden, **batch.kwargs)
    return output[0] if isinstance(output, tuple) else output


class _Reached(Exception):
    """The module that was waited for was called; nothing behind it needs to run."""


def input_of(
    module: nn.Module, block: nn.Module, hidden: torch.Tensor, batch: BlockBatch, context: ModalityContext
) -> torch.Tensor:
    """Run a block up to and with one of its modules; what the module received."""
    seen: list[torch.Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], _output: torch.Tensor) -> None:
        seen.append(args[0])
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        with suppress(_Reached):
            block_output(block, hidden, batch, context)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def first_block_inputs(
    loaded: LoadedModel,
    batches: Sequence[PaddedBatch],
    store: ActivationStore,
    *,
    before: Callable[[PaddedBatch], None] | None = None,
) -> BlockInputs:
    """Run the model up to its first language block and keep what the blocks are called with.

    The blocks themselves do not run: each hands its hidden states on, so that the arguments of all are seen (layers may
    have masks and positions of their own) and no weight of them is needed.

    Args:
        loaded: inside `outside_blocks`.
        batches: of this process.
        store: where hidden states go.
        before: called with each batch before it runs.
    """
    inputs = BlockInputs(store, loaded.device)
    with passed_through(loaded.language_blocks()) as caught:
        for batch in batches:
            if not batch.inputs:
                inputs.add_missing()
                continue
            if before is not None:
                before(batch)
            given = {name: value.to(loaded.device) for name, value in batch.inputs.items()}
            with suppress(_Reached):
                loaded.model(**{k: v for k, v in given.items() if k not in NOT_MODEL_INPUTS}, use_cache=False)
            hidden, calls = zip(*caught, strict=True)
            inputs.add(batch, hidden, calls, batch_modality(given, loaded.image_token_id))
            caught.clear()
    return inputs


@contextmanager
def passed_through(blocks: nn.ModuleList) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
    """Within the `with` block the blocks hand their hidden states on; behind the last one `_Reached` is raised.

    Yields:
        What the blocks were called with, in turn: hidden states and the other arguments.
    """
    caught: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def hand_on(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = args[0] if args else kwargs.pop("hidden_states")
        caught.append((hidden, kwargs))
        if len(caught) == len(blocks):
            raise _Reached
        return hidden

    try:
        for block in blocks:
            block.forward = hand_on
        yield caught
    finally:
        for block in blocks:
            del block.forward


def batch_modality(inputs: dict[str, torch.Tensor], image_token_id: int | None) -> torch.Tensor:
    """[batch, sequence] int8: what the samples say, else by the image token."""
    if "modality" in inputs:
        return inputs["modality"]
    if image_token_id is None:
        return torch.zeros_like(inputs["input_ids"], dtype=torch.int8)
    return modality_of(inputs["input_ids"], image_token_id)
