"""Llama and models of its shape (SmolLM2): text only."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.blocks import LLAMA_BLOCK

ADAPTER = ModelAdapter(
    model_type="llama",
    model_class="AutoModelForCausalLM",
    language_model="model",
    language_blocks="model.layers",
    language_block=LLAMA_BLOCK,
    final_norm="model.norm",
)
