"""Gemma 3: SigLIP vision encoder pooled to a fixed number of tokens, Gemma language model with sliding windows."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.blocks import LLAMA_BLOCK, SIGLIP_BLOCK

ADAPTER = ModelAdapter(
    model_type="gemma3",
    vision_encoder="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    vision_block=SIGLIP_BLOCK,
    projector_module="model.multi_modal_projector",
    language_model="model.language_model",
    language_blocks="model.language_model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.language_model.norm",
    image_token_field="image_token_index",
    pixel_layout="images",
    bidirectional="image",
    token_types="token_type_ids",
    genai_type="gemma3",
)
