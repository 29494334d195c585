"""A static float graph -> the same graph with a QuantizeLinear / DequantizeLinear pair at every activation.

Requires: `npu_forms`, `lower_sites`; a range for each value that `observed` names.
Ensures: every float activation and constant is read through a DequantizeLinear; an op that only moves values has one
quantizer on both sides; cache inputs and outputs are integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.qdq.builder import Writer, constant_of, replace
from splitq_edge.exporters.qdq.lower_sites import EIGHT_BITS, FACTOR_SUFFIX
from splitq_edge.quant.static_ranges import Range

# Ops whose outputs hold values of their first input and no others.
MOVES = frozenset(
    ("Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)
KNOWN_RANGES = {"Softmax": Range(0.0, 1.0), "Sigmoid": Range(0.0, 1.0)}
CACHE_INPUT, CACHE_OUTPUT = "past_key_values.", "present."
ACTIVATION_BITS = 16


def observed(model: ir.Model) -> list[str]:
    """Names of the values whose range must be measured, graph inputs among them."""
    names = [str(value.name) for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT]
    for node in model.graph:
        if _is_weight(node) or _moves(node) or node.op_type in KNOWN_RANGES or node.op_type == "Concat":
            continue
        names += [str(value.name) for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    return names


def insert_qdq(model: ir.Model, ranges: Mapping[str, Range]) -> None:
    """Quantize the graph in place.

    Args:
        model: static float graph.
        ranges: by value name, for all of `observed`. A cache input is concatenated with the new keys or values, so
            both, and the cache output, have one quantizer: the union of their ranges.

    Raises:
        SplitQError: a range is missing.
    """
    _Insertion(model, ranges).run()


def cache_ranges(model: ir.Model, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Range of every cache tensor by its input's name, as `insert_qdq` would work it out."""
    insertion = _Insertion(model, ranges)
    names = [str(value.name) for value in model.graph.inputs if str(value.name).startswith(CACHE_INPUT)]
    inputs = {str(value.name): value for value in model.graph.inputs}
    return {name: insertion.range_of(inputs[name]) for name in names}


class _Insertion:
    def __init__(self, model: ir.Model, ranges: Mapping[str, Range]) -> None:
        self.model = model
        self.ranges = ranges
        self._parent: dict[ir.Value, ir.Value] = {}
        self._members: dict[ir.Value, list[ir.Value]] = {}
        self._constants: dict[tuple[ir.Value, str], ir.Value] = {}
        for node in model.graph:
            if _is_weight(node):
                continue
            first = node.inputs[0] if node.inputs else None
            if _moves(node) and first is not None and first.dtype == ir.DataType.FLOAT:
                for output in node.outputs:
                    self._join(first, output)
            elif node.op_type == "Concat" and node.outputs[0].dtype == ir.DataType.FLOAT:
                for value in node.inputs:
                    assert value is not None
                    self._join(value, node.outputs[0])
        for value in self._activations():
            self._members.setdefault(self._root(value), []).append(value)
        for value in list(self._parent):
            if value.is_initializer():
                self._members.setdefault(self._root(value), []).append(value)

    def run(self) -> None:
        activations = self._activations()
        for node in list(self.model.graph):
            if not _is_weight(node):
                self._constant_inputs(node)
        for value in activations:
            self._activation(value)
        for node in [node for node in self.model.graph if node.op_type == "Identity"]:
            source = node.inputs[0]
            assert source is not None
            replace(node.outputs[0], source)
            self.model.graph.remove(node, safe=True)
        RemoveUnusedNodesPass()(self.model)  # and the float constants that have been quantized

    def range_of(self, value: ir.Value) -> Range:
        """Range of the group of values that share a quantizer."""
        found: Range | None = None
        for member in self._members.get(self._root(value), [value]):
            constant, producer = constant_of(member), member.producer()
            name = str(member.name)
            if constant is not None:
                part = Range.of(constant)
            elif producer is not None and producer.op_type in KNOWN_RANGES:
                part = KNOWN_RANGES[producer.op_type]
            elif name in self.ranges:
                part = self.ranges[name]
            else:
                continue
            found = part if found is None else found.union(part)
        if found is None:
            raise SplitQError(f"export: expected a range for the activation {value.name}, got none; please report it")
        return found

    def bits_of(self, value: ir.Value) -> int:
        """8 where the group begins at a requantizing Identity of 8 bits, else 16."""
        members = self._members.get(self._root(value), [value])
        return 8 if any(_eight_bits(member.producer()) for member in members) else ACTIVATION_BITS

    def _activations(self) -> list[ir.Value]:
        values = [value for value in self.model.graph.inputs if value.dtype == ir.DataType.FLOAT]
        for node in self.model.graph:
            if not _is_weight(node):
                values += [value for value in node.outputs if value.dtype == ir.DataType.FLOAT]
        return values

    def _root(self, value: ir.Value) -> ir.Value:
        while self._parent.get(value, value) is not value:
            value = self._parent[value]
        return value

    def _join(self, one: ir.Value, other: ir.Value) -> None:
        for value in (one, other):
            self._parent.setdefault(value, value)
        self._parent[self._root(one)] = self._root(other)

    def _quantizer(self, value: ir.Value, write: Writer) -> list[ir.Value]:
        """Scale and zero point of a value's group, one pair of initializers a value."""
        bits = self.bits_of(value)
        scale, zero = self.range_of(value).quantizer(bits)
        zero_point = np.array(zero, np.uint8 if bits == 8 else np.uint16)
        return [
            write.constant(np.array(scale), f"{value.name}.scale"),
            write.constant(zero_point, f"{value.name}.zero"),
        ]

    def _activation(self, value: ir.Value) -> None:
        producer = value.producer()
        write = Writer(self.model, producer, behind=producer is not None)
        scale_zero = self._quantizer(value, write)
        kind = ir.DataType.UINT8 if self.bits_of(value) == 8 else ir.DataType.UINT16
        name = str(value.name)
        shape = None if value.shape is None else value.shape.numpy()
        uses = list(value.uses())
        if producer is None and name.startswith(CACHE_INPUT):
            value.type = ir.TensorType(kind)
            codes = value
        else:
            codes = write.op("QuantizeLinear", [value, *scale_zero], f"{name}.codes", shape=shape, dtype=kind)
        last = codes
        if uses or not name.startswith(CACHE_OUTPUT):
            last = write.op("DequantizeLinear", [codes, *scale_zero], f"{name}.quantized", shape=shape)
        for node, index in uses:
            node.replace_input_with(index, last)
        if value.is_graph_output():
            output = codes if name.startswith(CACHE_OUTPUT) else last
            value.name, output.name = f"{name}.float", name
            outputs = self.model.graph.outputs
            outputs[list(outputs).index(value)] = output

    def _constant_inputs(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            array = constant_of(value)
            if value is None or array is None or array.dtype != np.float32:
                continue
            node.replace_input_with(index, self._constant(node, index, value, array))

    def _constant(self, node: ir.Node, index: int, value: ir.Value, array: np.ndarray) -> ir.Value:
        weight = (node.op_type == "MatMul" and index == 1 and array.ndim == 2) or (
            node.op_type == "Conv" and index == 1
        )
        if str(value.name).endswith(FACTOR_SUFFIX):
            weight = False
        kind = "weight" if weight else "bias" if node.op_type == "Conv" else "values"
        known = self._constants.get((value, kind))
        if known is not None and kind != "bias":
            return known
        write = Writer(self.model, None)
        name = f"{value.name}.{kind}"
        if kind == "weight":
            made = self._weight(write, array, name, axis=0 if node.op_type == "Conv" else 1)
        elif kind == "bias":
            made = self._bias(write, node, array, f"{node.name}.bias")
        else:
            made = self._values(write, value, array, name)
        self._constants[value, kind] = made
        return made

    def _weight(self, write: Writer, array: np.ndarray, name: str, *, axis: int) -> ir.Value:
        others = tuple(other for other in range(array.ndim) if other != axis)
        scale = np.maximum(np.abs(array).max(others, keepdims=True) / 127, 1e-9).astype(np.float32)
        codes = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
        return write.weight(codes, scale.reshape(-1), 8, name, axis=axis)

    def _bias(self, write: Writer, node: ir.Node, array: np.ndarray, name: str) -> ir.Value:
        """The bias of a convolution: int32 in steps of input scale times weight scale."""
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        producer = weight.producer()
        scales = constant_of(producer.inputs[1]) if producer is not None else None
        if scales is None:  # the weight has been replaced already: index 1 comes before 2
            raise SplitQError(f"export: {node.name}: expected a constant weight under a bias")
        step = (self.range_of(x).quantizer(self.bits_of(x))[0] * scales).astype(np.float32)
        codes = np.rint(array / step).astype(np.int32)
        values = [
            write.constant(codes, f"{name}.codes"),
            write.constant(step, f"{name}.scale"),
            write.constant(np.zeros(step.shape, np.int32), f"{name}.zero"),
        ]
        return write.op("DequantizeLinear", values, name, shape=array.shape, axis=0)

    def _values(self, write: Writer, value: ir.Value, array: np.ndarray, name: str) -> ir.Value:
        """A constant that is no weight, 16 bits; with the quantizer of its group where it is only moved."""
        group = self.range_of(value) if value in self._parent else Range.of(array)
        scale, zero = group.quantizer(ACTIVATION_BITS)
        codes = np.clip(np.rint(array / scale) + zero, 0, 2**ACTIVATION_BITS - 1).astype(np.uint16)
        values = [
            write.constant(codes, f"{name}.codes"),
            write.constant(np.array(scale), f"{name}.scale"),
            write.constant(np.array(zero, np.uint16), f"{name}.zero"),
        ]
        return write.op("DequantizeLinear", values, name, shape=array.shape)


def _is_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear"


def _moves(node: ir.Node) -> bool:
    """Whether the op only moves values; a requantizing Identity begins a new quantizer."""
    return node.op_type in MOVES


def _eight_bits(node: ir.Node | None) -> bool:
    return node is not None and EIGHT_BITS in node.metadata_props
