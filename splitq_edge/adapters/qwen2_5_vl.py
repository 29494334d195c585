"""Qwen2.5-VL: window-attention vision encoder that ends in a two-layer merger, Qwen2 language model with mRoPE."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.blocks import LLAMA_BLOCK, QWEN_VISION_BLOCK

ADAPTER = ModelAdapter(
    model_type="qwen2_5_vl",
    vision_encoder="model.visual",
    vision_blocks="model.visual.blocks",
    vision_block=QWEN_VISION_BLOCK,
    projector_module="model.visual.merger",
    projector=("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    language_model="model.language_model",
    language_blocks="model.language_model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.language_model.norm",
    image_token_field="image_token_id",
    pixel_layout="patches",
    mrope=True,
    genai_type="qwen2_5_vl",
    token_types="mm_token_type_ids",
    image_only_processor="PaddleOCRVLProcessor",
)
