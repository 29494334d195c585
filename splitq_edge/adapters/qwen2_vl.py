"""Qwen2-VL: vision encoder over packed patches that ends in a two-layer merger, Qwen2 language model with mRoPE."""

from dataclasses import replace

from splitq_edge.adapters import qwen2_5_vl
from splitq_edge.adapters.adapter import Site

ADAPTER = replace(
    qwen2_5_vl.ADAPTER,
    model_type="qwen2_vl",
    vision_block=(
        Site("attn_in", ("attn.qkv",)),
        Site("attn_out", ("attn.proj",)),
        Site("mlp_in", ("mlp.fc1",)),
        Site("mlp_mid", ("mlp.fc2",)),
    ),
)
