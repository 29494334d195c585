"""Placeholder nodes -> one `SplitQLinear` node a site, its linears cut apart by a Split.

Requires: `SitePart` placeholders, all parts of a site reading the same value.
Ensures: no placeholder is left; every site of the model is one node with its initializers.
"""

from __future__ import annotations

import onnx_ir as ir

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.nodes import SplitQLinearSpec, make_node
from splitq_edge.exporters.site_weights import site_node
from splitq_edge.exporters.symbolic import DOMAIN, PLACEHOLDER
from splitq_edge.modules.split_linear import SplitLinear


def expand_sites(model: ir.Model, sites: dict[str, SplitLinear], *, packed: bool) -> list[SplitQLinearSpec]:
    """Expand all placeholders in place.

    Args:
        model: traced graph.
        sites: its quantized sites by name.
        packed: weights in kernel layout instead of int4 tensors.

    Returns:
        The specs of the nodes written.

    Raises:
        SplitQError: a site is missing from the graph or its parts read different values.
    """
    parts: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == PLACEHOLDER:
            parts.setdefault(node.attributes["site"].as_string(), []).append(node)
    if set(parts) != set(sites):
        lost = sorted(set(sites) - set(parts)) or sorted(set(parts) - set(sites))
        raise SplitQError(f"export: expected every quantized site in the traced graph, {lost[0]} differs")
    specs = [_expand(model, sites[name], nodes, packed=packed) for name, nodes in parts.items()]
    model.opset_imports[DOMAIN] = 1
    return specs


def _expand(model: ir.Model, site: SplitLinear, parts: list[ir.Node], *, packed: bool) -> SplitQLinearSpec:
    if any(tuple(part.inputs) != tuple(parts[0].inputs) for part in parts):
        raise SplitQError(f"export: {site.name}: expected its linears to read one value, they read several")
    spec, tensors = site_node(site, packed=packed)
    values: dict[str, ir.Value | None] = dict(zip(("x", "modality"), parts[0].inputs, strict=False))
    for input_name, proto in tensors.items():
        values[input_name] = _initializer(model, ir.serde.deserialize_tensor(proto))
    values = {name: values[name] for name in spec.present_inputs}
    proto_node = make_node(spec, {name: name for name in values}, "y", name=site.name)
    node = ir.Node(
        proto_node.domain,
        proto_node.op_type,
        inputs=[values[name] if name else None for name in proto_node.input],
        attributes=[ir.serde.deserialize_attribute(attribute) for attribute in proto_node.attribute],
        overload=proto_node.overload,
        name=site.name,
        num_outputs=1,
        metadata_props={"splitq.site": site.name},
    )
    output = node.outputs[0]
    output.name = f"{site.name}.y"
    source = parts[0].outputs[0]
    output.type = source.type
    if source.shape is not None:
        output.shape = ir.Shape([*source.shape[:-1], site.out_features])
    model.graph.insert_before(parts[0], node)
    pieces = _split(model, site, node, parts) if len(parts) > 1 else [output]
    for part, piece in zip(parts, pieces, strict=True):
        _replace(part.outputs[0], piece)
    model.graph.remove(parts, safe=True)
    return spec


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Put a value in place of another; an output of the graph keeps its name."""
    name = old.name
    if old.is_graph_output():
        old.name, new.name = f"{name}.placeholder", name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _split(model: ir.Model, site: SplitLinear, node: ir.Node, parts: list[ir.Node]) -> list[ir.Value]:
    """The linears' outputs out of the site's."""
    widths = [part.attributes["width"].as_int() for part in parts]
    sizes = _initializer(model, ir.tensor(widths, dtype=ir.DataType.INT64, name=f"{site.name}.widths"))
    split = ir.Node(
        "",
        "Split",
        inputs=[node.outputs[0], sizes],
        attributes=[ir.AttrInt64("axis", -1)],
        num_outputs=len(parts),
        name=f"{site.name}.split",
    )
    for piece, part in zip(split.outputs, parts, strict=True):
        linear = part.attributes["part"].as_string().rpartition(".")[2]
        piece.name = f"{site.name}.{linear}"
        piece.shape, piece.type = part.outputs[0].shape, part.outputs[0].type
    model.graph.insert_after(node, split)
    return list(split.outputs)


def _initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value
