"""Rewrites a traced float graph into the forms that NPU compilers know.

Requires: static shapes; placeholders of sites not lowered yet, whose Identity nodes folding would take away.
Ensures: constants are initializers; RMS norms are one RMSNormalization; matrix products with a constant are MatMul (not
Gemm) and Add; no Cast between floats, no Identity; opset 23.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript import optimizer

from splitq_edge.exporters.qdq.builder import Writer, constant_of, replace

OPSET = 23  # first opset with RMSNormalization
FOLDED_BYTES = 1 << 26  # constants that folding may read and make: position tables, not weights


def npu_forms(model: ir.Model) -> None:
    """Apply all rewrites in place."""
    optimizer.fold_constants(model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if node.op_type == "Cast" and _same_type(node):
            _bypass(model, node)
        elif node.op_type == "Gemm":
            _split_gemm(model, node)
        elif node.op_type == "ReduceMean":
            _fuse_rms_norm(model, node)
        elif node.op_type == "Div":
            _multiply(model, node)
        elif node.op_type == "Identity" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            _bypass(model, node)
    RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = OPSET


def _same_type(node: ir.Node) -> bool:
    source, target = node.inputs[0], node.outputs[0]
    return source is not None and source.dtype is not None and source.dtype == target.dtype


def _bypass(model: ir.Model, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    replace(node.outputs[0], source)
    model.graph.remove(node, safe=True)


def _split_gemm(model: ir.Model, node: ir.Node) -> None:
    """Gemm with a constant second factor -> MatMul and Add."""
    x, weight, *rest = node.inputs
    matrix = constant_of(weight)
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    if matrix is None or settings.get("transA", 0) or settings.get("alpha", 1.0) != 1.0:
        return
    output = node.outputs[0]
    shape = output.shape.numpy() if output.shape is not None else None
    write = Writer(model, node)
    if settings.get("transB", 0):
        matrix = matrix.T
    name = str(output.name)
    value = write.op("MatMul", [x, write.constant(matrix, f"{name}.weight")], f"{name}.product", shape=shape)
    if rest and rest[0] is not None:
        value = write.op("Add", [value, rest[0]], f"{name}.sum", shape=shape)
    replace(output, value)
    model.graph.remove(node, safe=True)


def _fuse_rms_norm(model: ir.Model, mean: ir.Node) -> None:
    """x * Reciprocal(Sqrt(ReduceMean(x * x) + eps)) * weight -> RMSNormalization."""
    square = _producer(mean.inputs[0])
    if square is None or square.op_type not in ("Pow", "Mul"):
        return
    x = square.inputs[0]
    if square.op_type == "Mul" and square.inputs[1] is not x:
        return
    add = _only_user(mean.outputs[0], "Add")
    root = _only_user(add.outputs[0], "Sqrt") if add is not None else None
    inverse = _only_user(root.outputs[0], "Reciprocal", "Div") if root is not None else None
    normed = _only_user(inverse.outputs[0], "Mul") if inverse is not None else None
    scaled = _only_user(normed.outputs[0], "Mul") if normed is not None else None
    if add is None or normed is None or scaled is None or x not in normed.inputs or x is None:
        return
    epsilon = next((value for value in map(constant_of, add.inputs) if value is not None), None)
    weight = next((value for value in scaled.inputs if constant_of(value) is not None), None)
    axes = constant_of(mean.inputs[1]) if len(mean.inputs) > 1 else None
    last = len(x.shape) - 1 if x.shape is not None else None
    if epsilon is None or weight is None or axes is None or axes.reshape(-1).tolist() not in ([-1], [last]):
        return
    output = scaled.outputs[0]
    fused = Writer(model, scaled).op(
        "RMSNormalization",
        [x, weight],
        f"{output.name}.norm",
        shape=output.shape.numpy() if output.shape is not None else None,
        axis=-1,
        epsilon=float(epsilon.reshape(-1)[0]),
    )
    replace(output, fused)


def _multiply(model: ir.Model, node: ir.Node) -> None:
    """Division by a constant -> multiplication."""
    divisor = constant_of(node.inputs[1])
    if divisor is None or divisor.dtype != np.float32:
        return
    output = node.outputs[0]
    write = Writer(model, node)
    factor = write.constant(np.float32(1) / divisor, f"{output.name}.factor16")
    shape = output.shape.numpy() if output.shape is not None else None
    replace(output, write.op("Mul", [node.inputs[0], factor], f"{output.name}.product", shape=shape))
    model.graph.remove(node, safe=True)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type in op_types else None
