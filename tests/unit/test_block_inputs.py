"""What calibration hands from block to block is what the model's own forward does, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import TINY_CONFIGS, tiny_inputs, tiny_model

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import PaddedBatch, block_output, first_block_inputs
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
@torch.no_grad()
def test_blocks_one_by_one_give_the_models_logits(model_type: str, tmp_path: Path) -> None:
    model, inputs = tiny_model(model_type), tiny_inputs(model_type)
    expected = model(**inputs, use_cache=False).logits
    loaded = LoadedModel("tiny", model, None, adapter_for(model_type), ModalityContext())
    batch = PaddedBatch(inputs, torch.arange(2))
    kept = first_block_inputs(loaded, [batch], ActivationStore(tmp_path))
    for index in range(loaded.block_count):
        kept.begin(index)
        kept.put("float", 0, block_output(loaded.block(index), kept.get("float", 0), kept.batch(0), loaded.context))
    hidden = model.get_submodule(loaded.final_norm_path)(kept.get("float", 0))
    logits = model.get_submodule(loaded.adapter.lm_head)(hidden)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert torch.equal(model(**inputs, use_cache=False).logits, expected)  # the blocks run again
