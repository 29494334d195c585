"""The model types that can be quantized."""

from splitq_edge.adapters import (
    gemma3,
    idefics3,
    internvl,
    llama,
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.errors import UnsupportedModelError

FAMILIES = (
    gemma3,
    idefics3,
    internvl,
    llama,
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
ADAPTERS: dict[str, ModelAdapter] = {family.ADAPTER.model_type: family.ADAPTER for family in FAMILIES}


def adapter_for(model_type: str) -> ModelAdapter:
    """The adapter of a model type.

    Raises:
        UnsupportedModelError: none is known; the message lists the supported types.
    """
    if model_type not in ADAPTERS:
        raise UnsupportedModelError(
            f"model type '{model_type}': expected one of {', '.join(sorted(ADAPTERS))}; "
            "use a model of a supported family, or add one as docs/add-a-model.md says"
        )
    return ADAPTERS[model_type]
