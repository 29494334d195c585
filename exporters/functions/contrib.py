"""Bodies that are one of ONNX Runtime's own ops, which every build of it for processors has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx import AttributeProto, FunctionProto, helper

from splitq_edge.exporters.functions.body import OPSET
from splitq_edge.exporters.specs import DOMAIN, VERSION, CachedAttentionSpec, SkipRMSNormSpec

MICROSOFT = "com.microsoft"


def contrib_function(
    spec: CachedAttentionSpec | SkipRMSNormSpec,
    op_type: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    references: Mapping[str, AttributeProto.AttributeType],
    explanation: str,
    **attributes: Any,
) -> FunctionProto:
    """The function of every node of an op.

    Args:
        spec: one of the nodes; gives name, inputs, outputs and attributes.
        op_type: of domain com.microsoft.
        inputs: of its node, names of the function's inputs or ''.
        outputs: likewise.
        references: attributes of its node that are those of the function, with their types.
        explanation: one line that Netron shows.
        attributes: its other attributes.
    """
    node = helper.make_node(op_type, inputs, outputs, domain=MICROSOFT, **attributes)
    for name, kind in references.items():
        node.attribute.append(AttributeProto(name=name, ref_attr_name=name, type=kind))
    return helper.make_function(
        DOMAIN,
        spec.op_type,
        spec.inputs,
        spec.outputs,
        [node],
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION), helper.make_opsetid(MICROSOFT, 1)],
        attributes=list(spec.attributes),
        doc_string=explanation,
    )
