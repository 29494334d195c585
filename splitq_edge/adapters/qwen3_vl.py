"""Qwen3-VL: packed patches on a learned grid, features of several depths ("deepstack"), Qwen3 language model."""

from dataclasses import replace

from splitq_edge.adapters import qwen2_5_vl
from splitq_edge.adapters.adapter import Site

ADAPTER = replace(
    qwen2_5_vl.ADAPTER,
    model_type="qwen3_vl",
    vision_block=(
        Site("attn_in", ("attn.qkv",)),
        Site("attn_out", ("attn.proj",)),
        Site("mlp_in", ("mlp.linear_fc1",)),
        Site("mlp_mid", ("mlp.linear_fc2",)),
    ),
    projector=("model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"),
    deepstack="model.visual.deepstack_merger_list",
    image_only_processor="Qwen3VLProcessor",
    genai_type="qwen3_vl",
)
