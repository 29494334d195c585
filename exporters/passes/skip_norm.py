"""`com.microsoft::SkipSimplifiedLayerNormalization` -> `ai.splitq::SkipRMSNorm`, which our kernels run.

Requires: nodes of `fuse_norms`.
Ensures: all of them are ours, their body to be attached.
"""

from __future__ import annotations

import onnx_ir as ir

from splitq_edge.exporters.nodes import DOMAIN, SkipRMSNormSpec
from splitq_edge.exporters.passes.walk import constant, take_place


def skip_norms(model: ir.Model) -> set[SkipRMSNormSpec]:
    """Change every such node in place; returns the specs of the nodes written."""
    written = set()
    for old in list(model.graph):
        if old.op_type != "SkipSimplifiedLayerNormalization":
            continue
        spec = SkipRMSNormSpec(N=constant(old.inputs[2]).shape[0], epsilon=old.attributes["epsilon"].as_float())
        node = ir.node(
            spec.op_type,
            old.inputs,
            attributes=spec.attributes,
            domain=DOMAIN,
            num_outputs=len(spec.outputs),
            name=old.name,
        )
        model.graph.insert_before(old, node)
        for before, after in zip((old.outputs[0], old.outputs[3]), node.outputs, strict=True):
            after.name = before.name
            take_place(before, after)
        model.graph.remove(old, safe=True)
        written.add(spec)
    return written
