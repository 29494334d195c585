"""Runs the float model over the calibration samples and observes every language site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import modality_of


def collect_stats(
    loaded: LoadedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    progress: Callable[[], None] | None = None,
) -> dict[str, SiteStats]:
    """Statistics of every site of the language model, by site name.

    Args:
        loaded: the float model.
        batches: model inputs, see `encode_sample`.
        progress: called after every batch.

    Raises:
        SplitQError: no batch came.
    """
    observers: dict[str, Observer] = {}
    tokens: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            observer = observers.setdefault(name, Observer(name, x.shape[-1]))
            keep = tokens["keep"]
            observer.update(x[keep], tokens["modality"][keep])

        return observe

    handles = []
    for index, block in enumerate(loaded.language_blocks()):
        for site in loaded.adapter.language_block:
            first = block.get_submodule(site.linears[0])
            handles.append(first.register_forward_pre_hook(hook(loaded.adapter.site_name(index, site))))
    try:
        with torch.inference_mode():
            for batch in batches:
                tokens["modality"] = modality_of(batch["input_ids"], loaded.image_token_id)
                tokens["keep"] = batch["attention_mask"].bool()
                loaded.model(**batch, use_cache=False)
                if progress is not None:
                    progress()
    finally:
        for handle in handles:
            handle.remove()
    if not observers:
        raise SplitQError("calibration: expected at least one sample, got none; give calibration data")
    return {name: observer.stats() for name, observer in observers.items()}
