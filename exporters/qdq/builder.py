"""Small writer of onnx_ir nodes in front of a node of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from splitq_edge.runtime_ops.packing import int4_bytes


class Writer:
    """Writes nodes and initializers before (or behind) an anchor node.

    Args:
        model: graph to write into.
        anchor: node beside which new nodes go; None: in front of the first node of the graph.
        behind: True: behind the anchor, in the order of writing.
    """

    def __init__(self, model: ir.Model, anchor: ir.Node | None, *, behind: bool = False) -> None:
        self.model = model
        self._behind = behind
        self._anchor = next(iter(model.graph)) if anchor is None else anchor

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        shape: Sequence[int] | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """One node with one output, both called `name`."""
        node = ir.node(op_type, list(inputs), attributes, num_outputs=1, name=name)
        self._insert(node)
        output = node.outputs[0]
        output.name, output.type = name, ir.TensorType(dtype)
        if shape is not None:
            output.shape = ir.Shape(list(shape))
        return output

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer."""
        return register(self.model, ir.tensor(np.asarray(array, order="C"), name=name))

    def integers(self, codes: np.ndarray, bits: int, name: str) -> ir.Value:
        """Signed integers as INT4 (bits up to 4) or INT8."""
        if bits > 4:
            return self.constant(codes.astype(np.int8), name)
        proto = onnx.TensorProto(
            name=name, data_type=onnx.TensorProto.INT4, dims=codes.shape, raw_data=int4_bytes(codes.astype(np.int8))
        )
        return register(self.model, ir.serde.deserialize_tensor(proto))

    def weight(self, codes: np.ndarray, scale: np.ndarray, bits: int, name: str, *, axis: int = 1) -> ir.Value:
        """A weight of symmetric integers behind its DequantizeLinear.

        Args:
            codes: integers of any shape.
            scale: [channels] float32 along `axis`, or [blocks, channels] for blocks along the other axis of a matrix.
            bits: 4 or fewer are stored as INT4, more as INT8.
            name: of the float value; the integers are called `<name>.codes`.
            axis: output channels of `codes`.
        """
        blocks = scale.ndim > 1
        values = [
            self.integers(codes, bits, f"{name}.codes"),
            self.constant(scale.astype(np.float32), f"{name}.scale"),
            # The HTP compiler takes INT4 without a zero point for unsigned: the result is wrong, without a message.
            self.integers(np.zeros(scale.shape, np.int8), bits, f"{name}.zero"),
        ]
        size = {"block_size": -(-codes.shape[1 - axis] // scale.shape[1 - axis])} if blocks else {}
        return self.op("DequantizeLinear", values, name, shape=codes.shape, axis=1 - axis if blocks else axis, **size)

    def _insert(self, node: ir.Node) -> None:
        if self._behind:
            self.model.graph.insert_after(self._anchor, node)
            self._anchor = node
        else:
            self.model.graph.insert_before(self._anchor, node)


def register(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """A tensor as an initializer of the graph."""
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def replace(old: ir.Value, new: ir.Value) -> None:
    """Put a value in place of another; an output of the graph keeps its name."""
    name = old.name
    if old.is_graph_output():
        old.name, new.name = f"{name}.replaced", name
        if new.shape is None:
            new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer, None for anything else."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()
