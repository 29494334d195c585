"""A float32 key-value cache -> one of float16.

Requires: graph inputs `past_key_values.*` and outputs `present.*` in float32, and no other pass behind that looks at
their types.
Ensures: both are float16. `GroupQueryAttention` keeps a cache of another type than its queries by itself; elsewhere a
Cast stands behind an input and before an output.
"""

from __future__ import annotations

import onnx_ir as ir

HALF = ir.TensorType(ir.DataType.FLOAT16)


def halve_cache(model: ir.Model) -> None:
    """Change the types in place."""
    graph = model.graph
    for value in [value for value in graph.inputs if str(value.name).startswith("past_key_values.")]:
        readers = [node for node in value.consumers() if node.op_type != "GroupQueryAttention"]
        if readers:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.cast")
            wide = cast.outputs[0]
            wide.name, wide.type, wide.shape = f"{value.name}.float", value.type, value.shape
            for node in readers:
                for index, read in enumerate(node.inputs):
                    if read is value:
                        node.replace_input_with(index, wide)
            graph.insert_before(graph[0], cast)
        value.type = HALF
    for index, value in enumerate(graph.outputs):
        if not str(value.name).startswith("present."):
            continue
        maker = value.producer()
        if maker is None or maker.op_type != "GroupQueryAttention":
            graph.outputs[index] = _narrowed(graph, value)
        else:
            value.type = HALF


def _narrowed(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """What a new node makes of an output, under its name."""
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}, name=f"{value.name}.cast")
    half = cast.outputs[0]
    half.name, half.type, half.shape = value.name, HALF, value.shape
    value.name = f"{value.name}.float"
    graph.append(cast)
    return half
