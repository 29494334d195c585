"""Sites of the transformer blocks that model families share."""

from splitq_edge.adapters.adapter import Site

LLAMA_BLOCK = (
    Site("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Site("attn_out", ("self_attn.o_proj",)),
    Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj")),
    Site("mlp_mid", ("mlp.down_proj",)),
)

SIGLIP_BLOCK = (
    Site("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Site("attn_out", ("self_attn.out_proj",)),
    Site("mlp_in", ("mlp.fc1",)),
    Site("mlp_mid", ("mlp.fc2",)),
)

QWEN_VISION_BLOCK = (
    Site("attn_in", ("attn.qkv",)),
    Site("attn_out", ("attn.proj",)),
    Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj")),
    Site("mlp_mid", ("mlp.down_proj",)),
)
