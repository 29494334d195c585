"""What the first block receives: calibration samples run up to it, in padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from splitq_edge.learning.reconstruct import BlockBatch
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import modality_of


def padded_batches(
    encoded: Sequence[dict[str, torch.Tensor]], size: int, pad_token_id: int
) -> list[dict[str, torch.Tensor]]:
    """Samples of similar length side by side, left-padded.

    Args:
        encoded: model inputs of single conversations.
        size: samples a batch.
        pad_token_id: fills input_ids; attention_mask is 0 there.

    Returns:
        Model inputs; other tensors than input_ids and attention_mask are concatenated.
    """
    ordered = sorted(encoded, key=lambda sample: sample["input_ids"].shape[1])
    # A batch holds samples with the same kinds of inputs: text-only chats have no pixel_values.
    kinds: dict[tuple[str, ...], list[dict[str, torch.Tensor]]] = {}
    for sample in ordered:
        kinds.setdefault(tuple(sorted(sample)), []).append(sample)
    return [
        _pad(samples[start : start + size], pad_token_id)
        for samples in kinds.values()
        for start in range(0, len(samples), size)
    ]


def _pad(samples: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    width = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {name: torch.cat([s[name] for s in samples]) for name in samples[0] if not _is_sequence(name)}
    for name, value in (("input_ids", pad_token_id), ("attention_mask", 0)):
        rows = [nn.functional.pad(s[name], (width - s[name].shape[1], 0), value=value) for s in samples]
        batch[name] = torch.cat(rows)
    return batch


def _is_sequence(name: str) -> bool:
    return name in ("input_ids", "attention_mask")


class _Reached(Exception):
    """The first block was called; nothing behind it needs to run."""


@torch.no_grad()
def first_block_batches(loaded: LoadedModel, batches: Iterable[dict[str, torch.Tensor]]) -> list[BlockBatch]:
    """Run the model up to its first language block and keep what the block is called with."""
    caught: list[tuple[torch.Tensor, dict[str, Any]]] = []
    result: list[BlockBatch] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        caught.append((hidden, kwargs))
        raise _Reached

    handle = loaded.language_blocks()[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Reached):
                loaded.model(**batch, use_cache=False)
            hidden, kwargs = caught[-1]
            modality = modality_of(batch["input_ids"], loaded.image_token_id)
            result.append(BlockBatch(hidden.clone(), kwargs, modality, batch["attention_mask"].bool()))
    finally:
        handle.remove()
    return result
