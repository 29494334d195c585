"""The body of `CachedAttention`."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, helper

from splitq_edge.exporters.functions.body import OPSET
from splitq_edge.exporters.specs import DOMAIN, VERSION, CachedAttentionSpec

EXPLANATION = "Causal attention over a key-value cache, queries and keys turned by their positions first."
MICROSOFT = "com.microsoft"
ATTRIBUTES = {
    "num_heads": AttributeProto.INT,
    "kv_num_heads": AttributeProto.INT,
    "scale": AttributeProto.FLOAT,
}


def cached_attention_function(spec: CachedAttentionSpec) -> FunctionProto:
    """The function of every such node: ONNX Runtime's own op, which every build of it for processors has."""
    node = helper.make_node(
        "GroupQueryAttention",
        [
            "qkv",
            *[""] * 2,  # keys and values are in the queries
            *spec.inputs[1:-1],
            *[""] * 5,  # head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
            "new_tokens",
        ],
        list(spec.outputs),
        domain=MICROSOFT,
        do_rotary=1,
    )
    for name, kind in ATTRIBUTES.items():
        node.attribute.append(AttributeProto(name=name, ref_attr_name=name, type=kind))
    return helper.make_function(
        DOMAIN,
        spec.op_type,
        spec.inputs,
        spec.outputs,
        [node],
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION), helper.make_opsetid(MICROSOFT, 1)],
        attributes=list(spec.attributes),
        doc_string=EXPLANATION,
    )
