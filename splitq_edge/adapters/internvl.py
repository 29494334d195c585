"""InternVL 3 in transformers' own form: its vision encoder over square tiles, pixel shuffle, Qwen2 language model."""

from splitq_edge.adapters.adapter import ModelAdapter, Site
from splitq_edge.adapters.blocks import LLAMA_BLOCK

ADAPTER = ModelAdapter(
    model_type="internvl",
    vision_encoder="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layer",
    vision_block=(
        Site("attn_in", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        Site("attn_out", ("attention.projection_layer",)),
        Site("mlp_in", ("mlp.fc1",)),
        Site("mlp_mid", ("mlp.fc2",)),
    ),
    downsample_field="downsample_ratio",
    projector_module="model.multi_modal_projector",
    projector=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    language_model="model.language_model",
    language_blocks="model.language_model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.language_model.norm",
    image_token_field="image_token_id",
    pixel_layout="images",
    genai_type="gemma3",
    image_only_processor="InternVLProcessor",
)
