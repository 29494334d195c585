"""Root mean square normalization of a residual sum -> `com.microsoft::SkipSimplifiedLayerNormalization`.

Requires: `x / sqrt(mean(x^2) + eps) * weight` as torch's exporter writes it.
Ensures: where x is a sum of two values of the same shape, one node adds them, gives the sum to its other readers and
normalizes it. A norm of anything else stays as it is: ONNX has no node for it before opset 23.
"""

from __future__ import annotations

import onnx_ir as ir

from splitq_edge.exporters.passes.fuse_attention import MICROSOFT
from splitq_edge.exporters.passes.walk import NoMatch, constant, is_constant, made_by, take_place, with_constant


def fuse_norms(model: ir.Model) -> int:
    """Fuse every such norm in place; returns how many there were."""
    found = [_read(node) for node in list(model.graph) if node.op_type == "Reciprocal"]
    norms = [norm for norm in found if norm is not None]
    for number, (place, output, added, weight, epsilon) in enumerate(norms):
        node = ir.node(
            "SkipSimplifiedLayerNormalization",
            [added.inputs[0], added.inputs[1], weight],
            attributes={"epsilon": epsilon},
            domain=MICROSOFT,
            num_outputs=4,
            name=f"norm.{number}",
        )
        for value, name in zip(node.outputs, ("y", "", "", "sum"), strict=True):
            value.name = f"norm.{number}.{name}" if name else ""
        model.graph.insert_before(place, node)
        take_place(output, node.outputs[0])
        take_place(added.outputs[0], node.outputs[3])
    if norms:
        model.opset_imports[MICROSOFT] = 1
    return len(norms)


def _read(reciprocal: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node, ir.Value, float] | None:
    """Where a norm's first node stands, its output, the Add before it, its weight and epsilon."""
    try:
        shifted = made_by(made_by(reciprocal.inputs[0], "Sqrt").inputs[0], "Add")
        mean, epsilon = with_constant(shifted)
        average = made_by(mean, "ReduceMean")
        power = made_by(average.inputs[0], "Pow")
        if float(constant(power.inputs[1])) != 2.0 or constant(average.inputs[1]).tolist() != [-1]:
            return None
        added = made_by(power.inputs[0], "Add")
        scaled = _user(reciprocal.outputs[0], power.inputs[0])
        weighted = _user(scaled.outputs[0], None)
    except NoMatch:
        return None
    weight = next((value for value in weighted.inputs if is_constant(value)), None)
    shapes = {str(value.shape) for value in added.inputs if value is not None}
    if weight is None or len(constant(weight).shape) != 1 or len(shapes) != 1:
        return None
    return power, weighted.outputs[0], added, weight, float(epsilon)


def _user(value: ir.Value, other: ir.Value | None) -> ir.Node:
    """The one Mul behind a value, whose other input is `other` if that is given."""
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != "Mul" or (other is not None and other not in users[0].inputs):
        raise NoMatch(f"expected one Mul behind '{value.name}'")
    return users[0]
