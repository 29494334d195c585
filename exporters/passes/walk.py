"""Walking a graph backwards from a value, for passes that look for a shape of nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class NoMatch(Exception):
    """The graph is not of the shape that a pass looks for; the message says where it differs."""


def made_by(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node that computes a value.

    Raises:
        NoMatch: it is computed by something else.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        name = "nothing" if value is None else value.name
        raise NoMatch(f"expected {op_type}, got {'an input' if node is None else node.op_type} at '{name}'")
    return node


def is_made_by(value: ir.Value | None, op_type: str) -> bool:
    """Whether a node of this type computes the value."""
    node = None if value is None else value.producer()
    return node is not None and node.op_type == op_type


def constant(value: ir.Value | None) -> np.ndarray:
    """The numbers of a constant.

    Raises:
        NoMatch: the value is computed.
    """
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None:
        raise NoMatch(f"expected a constant, got '{'nothing' if value is None else value.name}'")
    return tensor.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is known without running the graph."""
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def with_constant(node: ir.Node) -> tuple[ir.Value, np.ndarray]:
    """The computed and the constant input of a node of two inputs, in whichever order.

    Raises:
        NoMatch: not exactly one of them is constant.
    """
    first, second = node.inputs
    if is_constant(second) and first is not None and not is_constant(first):
        return first, constant(second)
    if is_constant(first) and second is not None and not is_constant(second):
        return second, constant(first)
    raise NoMatch(f"expected {node.op_type} with one constant, got '{node.name}'")


def width_of(value: ir.Value) -> int:
    """Size of the last axis.

    Raises:
        NoMatch: it is unknown.
    """
    size = None if value.shape is None else value.shape[-1]
    if not isinstance(size, int):
        raise NoMatch(f"expected a fixed last axis of '{value.name}', got {size}")
    return size


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to the graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Put a value in place of another; type and shape go with it, and a graph output keeps its name."""
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output():
        name = old.name
        old.name, new.name = f"{name}.replaced", name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
