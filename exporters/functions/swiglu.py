"""The body of `SwiGLU`."""

from __future__ import annotations

from onnx import FunctionProto

from splitq_edge.exporters.functions.body import Body
from splitq_edge.exporters.specs import SwiGLUSpec

EXPLANATION = "y = gate * sigmoid(gate) * up of the halves [gate | up] of x."


def swiglu_function(spec: SwiGLUSpec) -> FunctionProto:
    """The function of every such node: the halves of x tell the width."""
    body = Body()
    body.halves("x", ("gate", "up"))
    body.op("Sigmoid", ["gate"], "gate_sigmoid")
    body.op("Mul", ["gate", "gate_sigmoid"], "gate_silu")
    body.op("Mul", ["gate_silu", "up"], "y")
    return body.function(spec, spec.op_type, overload="", outputs=spec.outputs, explanation=EXPLANATION)
