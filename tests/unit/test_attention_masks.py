"""Masks of decoders whose tokens see later ones, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from families import tiny_gemma3_config

from splitq_edge.exporters.attention_masks import (
    additive,
    causal_and_group_masks,
    image_groups,
    near_mask,
    prompt_groups,
)

WINDOW = 3
IMAGE = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 10, [0, 0, *[1] * 8]])  # the second row has padding on the left
PROMPT = torch.tensor([[1] * 7 + [0] * 3, [1] * 9 + [0]], dtype=torch.int8)


def seen(mask: torch.Tensor) -> torch.Tensor:
    """What real tokens may look at, from an additive mask [batch, 1, sequence, total]."""
    return (mask[:, 0] == 0) & MASK[:, :, None].bool()


def own(groups: torch.Tensor, *, image: bool) -> dict[str, torch.Tensor]:
    causal, together = causal_and_group_masks(MASK, groups)
    near = near_mask(MASK, groups.shape[1], WINDOW)
    sliding = near & (causal | together) if image else (near & causal) | together
    masks = {"full_attention": causal | together, "sliding_attention": sliding}
    return {kind: additive(allowed, MASK) for kind, allowed in masks.items()}


def test_tokens_of_a_picture_see_each_other_as_in_gemma_3() -> None:
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

    config = tiny_gemma3_config().text_config
    config._attn_implementation, config.sliding_window = "eager", WINDOW
    groups = image_groups(IMAGE)
    assert groups[0].tolist() == [-1, -1, 0, 0, 0, 0, -1, 1, 1, -1]
    states = torch.zeros(2, 10, 8)
    expected = create_masks_for_vision_model(config, states, MASK, None, None, groups)
    for kind, mask in own(groups, image=True).items():
        assert torch.equal(seen(mask), seen(expected[kind])), kind


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_a_prompt_sees_itself_whole_as_in_paligemma_2(kind: str) -> None:
    from transformers import Gemma2Config
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = Gemma2Config(num_hidden_layers=2, sliding_window=WINDOW, attn_implementation="eager")
    create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
    groups = prompt_groups(PROMPT)
    expected = create(config, torch.zeros(2, 10, 8), MASK, None, block_sequence_ids=groups)
    assert torch.equal(seen(own(groups, image=False)[kind]), seen(expected))


def test_a_step_sees_all_that_is_behind_it() -> None:
    for groups in (image_groups(torch.zeros(2, 1)), prompt_groups(torch.zeros(2, 1, dtype=torch.int8))):
        causal, together = causal_and_group_masks(MASK, groups)
        assert causal.shape == (1, 10)
        assert causal.all()
        assert not together.any()
    assert torch.equal(near_mask(MASK, 1, WINDOW)[0, 0], torch.arange(10) > 9 - WINDOW)


def test_padding_between_tokens_does_not_narrow_the_window() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1]])
    assert near_mask(mask, 1, WINDOW)[0, 0].tolist() == [True] * 5
