"""The body of `SkipRMSNorm`."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto

from splitq_edge.exporters.functions.contrib import contrib_function
from splitq_edge.exporters.specs import SkipRMSNormSpec

EXPLANATION = "sum = x + skip, and y = sum / sqrt(mean(sum^2) + epsilon) * weight."


def skip_norm_function(spec: SkipRMSNormSpec) -> FunctionProto:
    """The function of every such node."""
    return contrib_function(
        spec,
        "SkipSimplifiedLayerNormalization",
        ["x", "skip", "weight"],
        ["y", "", "", "sum"],
        references={"epsilon": AttributeProto.FLOAT},
        explanation=EXPLANATION,
    )
