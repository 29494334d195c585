"""PaliGemma: SigLIP vision encoder and one linear, Gemma language model whose prompt is read in both directions."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.blocks import LLAMA_BLOCK, SIGLIP_BLOCK

ADAPTER = ModelAdapter(
    model_type="paligemma",
    vision_encoder="model.vision_tower",
    vision_blocks="model.vision_tower.encoder.layers",
    vision_block=SIGLIP_BLOCK,
    projector_module="model.multi_modal_projector",
    projector=("model.multi_modal_projector.linear",),
    language_model="model.language_model",
    language_blocks="model.language_model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.language_model.norm",
    image_token_field="image_token_index",
    pixel_layout="images",
    bidirectional="prompt",
    token_types="token_type_ids",
    # The processor itself puts the begin token behind the pictures and a line end behind the prompt.
    chat_template=(
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    ),
)
