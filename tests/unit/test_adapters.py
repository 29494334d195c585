"""Adapters describe a family so that every linear is claimed exactly once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import TINY_CONFIGS
from torch import nn

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.registry import ADAPTERS, adapter_for
from splitq_edge.errors import SplitQError, UnsupportedModelError

# 2 vision blocks, projector, 2 language blocks of 7, lm_head
LINEARS = {
    "gemma3": 2 * 6 + 0 + 2 * 7 + 1,  # its projector is a bare matrix
    "idefics3": 2 * 6 + 1 + 2 * 7 + 1,
    "internvl": 2 * 6 + 2 + 2 * 7 + 1,
    "llama": 2 * 7 + 1,
    "llava": 2 * 6 + 2 + 2 * 7 + 1,
    "llava_next": 2 * 6 + 2 + 2 * 7 + 1,
    "llava_onevision": 2 * 6 + 2 + 2 * 7 + 1,
    "paligemma": 2 * 6 + 1 + 2 * 7 + 1,
    "qwen2_5_vl": 2 * 5 + 2 + 2 * 7 + 1,
    "qwen2_vl": 2 * 4 + 2 + 2 * 7 + 1,
    "qwen3_vl": 2 * 4 + 2 + 2 + 2 * 7 + 1,  # the merger and one more for deepstack
    "smolvlm": 2 * 6 + 1 + 2 * 7 + 1,
}


@pytest.fixture(params=sorted(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> ModelAdapter:
    return adapter_for(request.param)


@pytest.fixture
def meta_model(adapter: ModelAdapter) -> Any:
    with torch.device("meta"):
        return getattr(transformers, adapter.model_class).from_config(TINY_CONFIGS[adapter.model_type]())


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_every_linear_is_claimed_exactly_once(adapter: ModelAdapter, meta_model: nn.Module) -> None:
    names = linears(meta_model)
    assert len(names) == LINEARS[adapter.model_type]
    assert {name: len(adapter.claims(name)) for name in names} == dict.fromkeys(names, 1)


def test_sites_of_a_language_block_hold_each_linear_of_it_once(adapter: ModelAdapter, meta_model: nn.Module) -> None:
    block = meta_model.get_submodule(adapter.language_blocks)[0]
    claimed = Counter(path for site in adapter.language_block for path in site.linears)
    assert claimed == Counter(linears(block))


def test_linears_of_one_site_have_the_same_input_width(adapter: ModelAdapter, meta_model: nn.Module) -> None:
    for blocks, sites in (
        (adapter.vision_blocks, adapter.vision_block),
        (adapter.language_blocks, adapter.language_block),
    ):
        for block in meta_model.get_submodule(blocks) if blocks else ():
            for site in sites:
                assert len({block.get_submodule(path).in_features for path in site.linears}) == 1, site.name


def test_all_module_paths_of_the_adapter_exist(adapter: ModelAdapter, meta_model: Any) -> None:
    vision = (adapter.vision_encoder, adapter.vision_blocks, adapter.projector_module, *adapter.projector)
    language = (adapter.language_model, adapter.language_blocks, adapter.final_norm, adapter.lm_head)
    if adapter.image_token_field:
        assert all(vision)
        assert isinstance(getattr(meta_model.config, adapter.image_token_field), int)
    else:
        assert not any((*vision, adapter.vision_block))
    for path in filter(None, (*vision, *language)):
        assert isinstance(meta_model.get_submodule(path), nn.Module), path


def test_transformers_has_the_processor_that_stands_in_for_the_familys_own(adapter: ModelAdapter) -> None:
    if adapter.image_only_processor:
        assert hasattr(transformers, adapter.image_only_processor)


@pytest.mark.parametrize(
    "stranger",
    [
        "model.language_model.layers.0.self_attn.extra_proj",
        "model.language_model.layers.x.self_attn.q_proj",
        "model.language_model.layers.0.q_proj",
        "self_attn.q_proj",
        "model.language_model.embed_tokens",
    ],
)
def test_a_linear_that_the_adapter_does_not_know_is_claimed_by_nothing(stranger: str) -> None:
    assert adapter_for("llava").claims(stranger) == []


def test_site_names_carry_the_block_number() -> None:
    adapter = adapter_for("llava")
    assert [adapter.site_name(3, site) for site in adapter.language_block] == [
        "layers.3.attn_in",
        "layers.3.attn_out",
        "layers.3.mlp_in",
        "layers.3.mlp_mid",
    ]


def test_unknown_model_type_lists_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        adapter_for("resnet")
    assert isinstance(raised.value, SplitQError)
    message = str(raised.value)
    assert "'resnet'" in message
    assert all(model_type in message for model_type in ADAPTERS)
    page = "docs/add-a-model.md"
    assert page in message
    assert (Path(__file__).parents[2] / page).is_file()


def test_registry_keys_are_the_adapters_own_model_types() -> None:
    assert {name: adapter.model_type for name, adapter in ADAPTERS.items()} == {name: name for name in ADAPTERS}


def test_a_prompt_read_in_both_directions_is_more_than_genai_tells_a_decoder(adapter: ModelAdapter) -> None:
    assert not (adapter.bidirectional == "prompt" and adapter.genai_type)


def test_transformers_js_gets_no_family_whose_vision_graph_takes_more_than_pixels(adapter: ModelAdapter) -> None:
    assert adapter.pixel_layout in ("images", "tiles") or not adapter.transformers_js
