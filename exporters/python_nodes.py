"""Rewrites an exported graph so that its `ai.splitq` nodes can be Python functions (`runtime_ops/python_session.py`).

Requires: weights and all other inputs of those nodes that the graph does not compute are initializers.
Ensures: no node, function or tensor of the domain `ai.splitq` is left; everything else is as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from splitq_edge.errors import ArtifactError
from splitq_edge.exporters.joined_constants import is_weight, take_apart
from splitq_edge.exporters.specs import (
    DOMAIN,
    ChannelSplitQuantizeSpec,
    CrossModalCorrectionSpec,
    SplitQLinearSpec,
    SwiGLUSpec,
)
from splitq_edge.runtime_ops.numpy_ops import NUMBER, PYTHON_DOMAIN, PythonNode
from splitq_edge.runtime_ops.packing import unpack

CONTRACTS = {
    spec.op_type: spec for spec in (SplitQLinearSpec, ChannelSplitQuantizeSpec, CrossModalCorrectionSpec, SwiGLUSpec)
}
COMPUTED = {"x", "modality", "main_codes", "main_scale", "residual_codes", "residual_scale"}

_numbers = itertools.count()


def python_graph(path: Path) -> tuple[bytes, list[PythonNode]]:
    """A graph with its `ai.splitq` nodes in `PYTHON_DOMAIN`, and these.

    Args:
        path: portable or packed graph; tensors that it keeps outside itself stay there.

    Returns:
        The serialized graph and its rewritten nodes.

    Raises:
        ArtifactError: the file cannot be read, or an input of a node is neither computed nor an initializer.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError(f"{path}: expected an ONNX graph ({error}); export the model again") from error
    return rewrite(model, path.parent)


def rewrite(model: onnx.ModelProto, folder: Path) -> tuple[bytes, list[PythonNode]]:
    """See `python_graph`; changes the model in place.

    Args:
        model: the graph.
        folder: where the tensors lie that it keeps outside itself.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [
        _rewritten(node, tensors, folder)
        for node in graph.node
        if node.domain == DOMAIN and node.op_type in CONTRACTS  # others run as their bodies
    ]
    needed = {name for node in _nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    left = {node.op_type for node in graph.node if node.domain == DOMAIN}
    functions = [function for function in model.functions if function.domain != DOMAIN or function.name in left]
    opsets = [opset for opset in model.opset_import if opset.domain != DOMAIN or left]
    del graph.initializer[:], model.functions[:], model.opset_import[:]
    graph.initializer.extend(kept)
    model.functions.extend(functions)
    model.opset_import.extend([*opsets, helper.make_opsetid(PYTHON_DOMAIN, 1)])
    return model.SerializeToString(), nodes


def _rewritten(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], folder: Path) -> PythonNode:
    """Turn a node into one that takes what the graph computes and names its constants by its number."""
    contract = CONTRACTS[node.op_type]
    named = {name: value for name, value in zip(contract.inputs, node.input, strict=False) if value}
    computed = {name: value for name, value in named.items() if value not in tensors}
    strange = next((name for name in computed if name not in COMPUTED), None)
    if strange is not None:
        raise ArtifactError(
            f"{node.name}: expected an initializer as {strange}, got a computed value; export the model again"
        )
    outputs = {name: value for name, value in zip(contract.outputs, node.output, strict=False) if value}
    attributes = {attribute.name: _value(attribute) for attribute in node.attribute}
    constants = {name: _array(name, tensors[value], folder) for name, value in named.items() if name not in computed}
    if "constants" in constants:
        joined = constants.pop("constants")
        sizes, widths = attributes["constant_sizes"], attributes["group_widths"]
        constants |= take_apart(joined, sizes, widths, attributes.get("block_size", 0), attributes["N"])
    found = PythonNode(
        number=next(_numbers),
        name="_".join((node.op_type, *computed, "to", *outputs)),
        op_type=node.op_type,
        inputs=tuple(computed),
        outputs=tuple(outputs),
        attributes=attributes,
        constants=constants,
    )
    rewritten = helper.make_node(
        found.name, list(computed.values()), list(outputs.values()), name=node.name, domain=PYTHON_DOMAIN
    )
    rewritten.attribute.append(helper.make_attribute(NUMBER, found.number))
    node.CopyFrom(rewritten)
    return found


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _array(name: str, tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """An initializer as the Python op takes it: weights as codes [K, N] int8, packed or not."""
    array = numpy_helper.to_array(tensor, base_dir=str(folder))
    if not is_weight(name):
        return array
    return unpack(array)[0] if array.ndim == 1 else array.astype(np.int8)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of inner graphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
