"""The body of `CachedAttention`."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto

from splitq_edge.exporters.functions.contrib import contrib_function
from splitq_edge.exporters.specs import CachedAttentionSpec

EXPLANATION = "Causal attention over a key-value cache, queries and keys turned by their positions first."
ATTRIBUTES = {
    "num_heads": AttributeProto.INT,
    "kv_num_heads": AttributeProto.INT,
    "scale": AttributeProto.FLOAT,
}


def cached_attention_function(spec: CachedAttentionSpec) -> FunctionProto:
    """The function of every such node."""
    return contrib_function(
        spec,
        "GroupQueryAttention",
        [
            "qkv",
            *[""] * 2,  # keys and values are in the queries
            *spec.inputs[1:-1],
            *[""] * 5,  # head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
            "new_tokens",
        ],
        spec.outputs,
        references=ATTRIBUTES,
        explanation=EXPLANATION,
        do_rotary=1,
    )
