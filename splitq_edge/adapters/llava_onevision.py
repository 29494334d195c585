"""LLaVA-OneVision: SigLIP over the tiles of a picture, two-layer projector, Qwen2 language model."""

from dataclasses import replace

from splitq_edge.adapters import llava_next

ADAPTER = replace(llava_next.ADAPTER, model_type="llava_onevision", image_only_processor="LlavaOnevisionProcessor")
