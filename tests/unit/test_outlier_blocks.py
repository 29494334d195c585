"""`outliers` looks at what the blocks receive in the model's own forward, whatever the family does between them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import TINY_CONFIGS, tiny_inputs, tiny_model
from rich.console import Console

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.calibration.block_inputs import PaddedBatch, batch_modality
from splitq_edge.commands import outliers
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext


def by_whole_model(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Largest magnitudes of text and of image tokens by site, from hooks on one forward."""
    keep = inputs["attention_mask"].bool()
    modality = batch_modality(inputs, loaded.image_token_id)
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for index, block in enumerate(loaded.language_blocks()):
        for site in loaded.adapter.language_block:

            def observe(_module: object, args: tuple[torch.Tensor, ...], name: str = f"{index}.{site.name}") -> None:
                x = args[0].reshape(*keep.shape, -1)
                found[name] = [x[keep & (modality == kind)].abs().amax(0) for kind in (0, 1)]

            handles.append(block.get_submodule(site.linears[0]).register_forward_pre_hook(observe))
    with torch.no_grad():
        loaded.model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", sorted(set(TINY_CONFIGS) - {"llama"}))
def test_every_block_is_looked_at_with_its_own_masks_and_inputs(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_model(model_type), tiny_inputs(model_type)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    loaded = LoadedModel("tiny", model, processor, adapter_for(model_type), ModalityContext())
    expected = by_whole_model(loaded, inputs)
    monkeypatch.setattr(outliers, "padded_batches", lambda *_: [PaddedBatch(inputs, torch.arange(2))])
    found = outliers._observe(loaded, [None, None], 0.02, Console(quiet=True))
    assert {f"{one.block}.{one.site}" for one in found} == set(expected)
    for one in found:
        for got, wanted in zip((one.text_absmax, one.vision_absmax), expected[f"{one.block}.{one.site}"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
