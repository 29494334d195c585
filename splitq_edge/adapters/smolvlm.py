"""SmolVLM: SigLIP vision encoder over square tiles, pixel shuffle and one linear, Llama language model."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.blocks import LLAMA_BLOCK, SIGLIP_BLOCK

ADAPTER = ModelAdapter(
    model_type="smolvlm",
    vision_encoder="model.vision_model",
    vision_blocks="model.vision_model.encoder.layers",
    vision_block=SIGLIP_BLOCK,
    patch_positions="model.vision_model.embeddings.position_embedding",
    patch_encoder="model.vision_model.encoder",
    projector_module="model.connector",
    projector=("model.connector.modality_projection.proj",),
    language_model="model.text_model",
    language_blocks="model.text_model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.text_model.norm",
    image_token_field="image_token_id",
    pixel_layout="tiles",
    image_only_processor="Idefics3Processor",
    genai_type="gemma3",
    transformers_js=True,
)
