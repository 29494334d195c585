"""Which nodes of a graph an NPU's compiler would reject (or silently get wrong), and what to do about each.

The rules are what the compiler of onnxruntime-qnn 2.7 did with CPU fallback disabled, one test a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.qdq.builder import constant_of
from splitq_edge.exporters.qdq.insert_qdq import MOVES
from splitq_edge.exporters.qdq.static_graphs import StaticGraph
from splitq_edge.targets import Target

# Ops that the static graphs are made of; each was compiled and run.
COMPUTES = frozenset(("Add", "Concat", "Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Neg"))
COMPUTES |= {"RMSNormalization", "Sigmoid", "Softmax", "Sub"}
REMEDIES = {
    "Erf": "export Gelu as one node (opset 20 or newer)",
    "SplitQLinear": "export with --flavour qdq",
    "GroupQueryAttention": "export with --flavour qdq",
}
BLOCKWISE_ARCH = 69


@dataclass(frozen=True)
class Rejection:
    """One node that an NPU does not take.

    Attributes:
        node: its name.
        op_type: its op.
        reason: what is wrong with it.
        remedy: what to do.
    """

    node: str
    op_type: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.op_type} {self.node}: {self.reason}; {self.remedy}"


def check_target(graphs: Mapping[str, StaticGraph], target: Target) -> None:
    """Check all graphs of a static export.

    Raises:
        SplitQError: nodes that the target rejects, all of them, each with the remedy.
    """
    found = [f"{part}: {rejection}" for part, graph in graphs.items() for rejection in rejected(graph.model, target)]
    if found:
        raise SplitQError(f"{target.name} rejects {len(found)} nodes. " + ". ".join(found))


def rejected(model: ir.Model, target: Target) -> list[Rejection]:
    """Every node of a graph that the target rejects.

    Args:
        model: any graph, shapes inferred where it has them.
        target: the NPU.
    """
    found = list(_dynamic(model))
    for node in model.graph:
        for rule in _RULES:
            reason = rule(node, target)
            if reason is not None:
                found.append(Rejection(str(node.name or node.outputs[0].name), node.op_type, *reason))
                break
    return found


_Reason = tuple[str, str] | None


def _dynamic(model: ir.Model) -> Iterator[Rejection]:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or not value.shape.is_static():
            kind = "input" if value in model.graph.inputs else "output"
            reason = f"expected a static shape, got {value.shape}"
            yield Rejection(str(value.name), kind, reason, "export with --flavour qdq, which fixes all sizes")


def _known(node: ir.Node, _target: Target) -> _Reason:
    if not node.domain and (node.op_type in COMPUTES | MOVES or _quantizes(node)):
        return None
    where = f" of domain {node.domain}" if node.domain else ""
    return f"the compiler has no such op{where}", REMEDIES.get(node.op_type, "replace it with ops that it has")


def _weight_only(node: ir.Node, _target: Target) -> _Reason:
    if node.op_type not in ("MatMul", "Gemm", "Conv") or not any(map(_weight, node.inputs)):
        return None
    if all(value is None or _dequantized(value) or constant_of(value) is not None for value in node.inputs):
        return None
    return "integer weights with float activations", "quantize the activations (uint8 or uint16 QDQ)"


def _blockwise(node: ir.Node, target: Target) -> _Reason:
    weight = next((source for value in node.inputs if (source := _weight(value)) is not None), None)
    if weight is None or not weight.attributes.get_int("block_size", 0):
        return None
    if target.arch < BLOCKWISE_ARCH:
        return f"blockwise weights need v{BLOCKWISE_ARCH}", "set group_size 0 in the recipe"
    if _bits(node.inputs[0]) == 8:
        return "blockwise weights with 8-bit activations", "use uint16 activations or set group_size 0 in the recipe"
    return None


def _int4_zero(node: ir.Node, _target: Target) -> _Reason:
    codes = node.inputs[0]
    if node.op_type != "DequantizeLinear" or codes is None or codes.dtype != ir.DataType.INT4:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return None
    return "INT4 without a zero point is taken for unsigned: wrong results", "give a zero point of zeros"


def _mixed_bits(node: ir.Node, _target: Target) -> _Reason:
    if node.op_type not in ("MatMul", "Gemm", "Conv") or not any(map(_weight, node.inputs)):
        return None
    given, wanted = _bits(node.inputs[0]), _bits_behind(node.outputs[0])
    if given is None or wanted is None or given == wanted:
        return None
    return f"{given}-bit activations in, {wanted}-bit out", "give both the same bits and requantize behind it"


def _moved(node: ir.Node, _target: Target) -> _Reason:
    if node.op_type not in ("Gather", "Reshape", "Transpose"):
        return None
    before = _quantizer(node.inputs[0])
    after = [_quantizer(use.node.outputs[0]) for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"]
    if before is None or not after or after[0] is None or np.allclose(before, after[0], rtol=1e-6):
        return None
    return (
        "another quantizer behind an op that only moves values",
        "requantize behind it with a pair of its own",
    )


def _unquantized(node: ir.Node, _target: Target) -> _Reason:
    if node.op_type == "RMSNormalization" and not all(map(_dequantized, node.inputs)):
        return "float scale beside a quantized input", "quantize the scale (uint16 QDQ)"
    if node.op_type == "LayerNormalization" and (len(node.inputs) < 3 or node.inputs[2] is None):
        quantizer = _quantizer(node.inputs[1])
        if quantizer is not None and quantizer[1] not in (1 << 7, 1 << 15):
            return "no bias beside a scale whose zero point is not in the middle", "give a bias of zeros"
    return None


_RULES: tuple[Callable[[ir.Node, Target], _Reason], ...] = (
    _known,
    _weight_only,
    _blockwise,
    _int4_zero,
    _mixed_bits,
    _moved,
    _unquantized,
)


def _quantizes(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _dequantized(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _weight(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a constant of signed integers."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    codes = producer.inputs[0]
    signed = codes is not None and codes.dtype in (ir.DataType.INT4, ir.DataType.INT8)
    return producer if signed and codes is not None and codes.is_initializer() else None


def _bits(value: ir.Value | None) -> int | None:
    """Bits of the codes behind a dequantized activation."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return _code_bits(producer)


def _bits_behind(value: ir.Value) -> int | None:
    users = [use.node for use in value.uses() if use.node.op_type == "QuantizeLinear"]
    return _code_bits(users[0]) if users else None


def _code_bits(node: ir.Node) -> int | None:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return {ir.DataType.UINT8: 8, ir.DataType.UINT16: 16}.get(zero.dtype) if zero is not None and zero.dtype else None


def _quantizer(value: ir.Value | None) -> np.ndarray | None:
    """Scale and zero point of the pair that a value comes from, if they are scalars."""
    producer = None if value is None else value.producer()
    if producer is None or not _quantizes(producer) or len(producer.inputs) < 3:
        return None
    scale, zero = constant_of(producer.inputs[1]), constant_of(producer.inputs[2])
    if scale is None or zero is None or scale.size != 1:
        return None
    return np.array([float(scale.reshape(-1)[0]), float(zero.reshape(-1)[0])])
