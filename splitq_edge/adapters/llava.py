"""LLaVA 1.5: CLIP or SigLIP vision encoder, two-layer projector, Llama-like language model."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.blocks import LLAMA_BLOCK, SIGLIP_BLOCK

ADAPTER = ModelAdapter(
    model_type="llava",
    vision_encoder="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    vision_block=SIGLIP_BLOCK,
    projector_module="model.multi_modal_projector",
    projector=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    language_model="model.language_model",
    language_blocks="model.language_model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.language_model.norm",
    image_token_field="image_token_index",
    pixel_layout="images",
    genai_type="gemma3",
    transformers_js=True,
)
