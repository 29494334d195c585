"""The body of `SkipRMSNorm`."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, helper

from splitq_edge.exporters.functions.body import OPSET
from splitq_edge.exporters.functions.cached_attention import MICROSOFT
from splitq_edge.exporters.specs import DOMAIN, VERSION, SkipRMSNormSpec

EXPLANATION = "sum = x + skip, and y = sum / sqrt(mean(sum^2) + epsilon) * weight."


def skip_norm_function(spec: SkipRMSNormSpec) -> FunctionProto:
    """The function of every such node: ONNX Runtime's own op, which every build of it for processors has."""
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "skip", "weight"], ["y", "", "", "sum"], domain=MICROSOFT
    )
    node.attribute.append(AttributeProto(name="epsilon", ref_attr_name="epsilon", type=AttributeProto.FLOAT))
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
