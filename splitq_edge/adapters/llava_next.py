"""LLaVA-NeXT (1.6): LLaVA over the tiles of a picture on a grid that suits its shape."""

from dataclasses import replace

from splitq_edge.adapters import llava

ADAPTER = replace(
    llava.ADAPTER,
    model_type="llava_next",
    pixel_layout="anyres",
    line_end="model.image_newline",
    transformers_js=False,
)
