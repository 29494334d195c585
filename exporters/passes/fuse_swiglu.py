"""silu(gate) * up of the two halves of one site's output -> one `SwiGLU` node.

Requires: a Split of one value into gate and up, of equal width, as `expand_sites` writes it; nothing else reads them.
Ensures: one node in place of Split, Sigmoid and both Mul, its body to be attached.
"""

from __future__ import annotations

import onnx_ir as ir

from splitq_edge.exporters.nodes import DOMAIN, SwiGLUSpec
from splitq_edge.exporters.passes.walk import NoMatch, take_place, width_of


def fuse_swiglu(model: ir.Model) -> set[SwiGLUSpec]:
    """Fuse wherever it can be done, in place; returns the specs of the nodes written."""
    written = set()
    for split in list(model.graph):
        if split.op_type != "Split" or len(split.outputs) != 2:
            continue
        try:
            spec, old, product = _read(split)
        except NoMatch:
            continue
        node = ir.node(
            spec.op_type, [split.inputs[0]], attributes=spec.attributes, domain=DOMAIN, name=f"{split.name}.swiglu"
        )
        node.outputs[0].name = f"{split.name}.swiglu.y"
        model.graph.insert_before(product, node)
        take_place(product.outputs[0], node.outputs[0])
        model.graph.remove(old, safe=True)
        written.add(spec)
    return written


def _read(split: ir.Node) -> tuple[SwiGLUSpec, list[ir.Node], ir.Node]:
    """The node to write, the nodes it replaces, and the last of them."""
    gate, up = split.outputs
    if width_of(gate) != width_of(up):
        raise NoMatch("expected halves")
    sigmoid = next((node for node in gate.consumers() if node.op_type == "Sigmoid"), None)
    if sigmoid is None:
        raise NoMatch("expected the sigmoid of the first half")
    silu = _only_product(sigmoid.outputs[0], gate)
    product = _only_product(silu.outputs[0], up)
    if set(gate.consumers()) != {sigmoid, silu} or set(up.consumers()) != {product}:
        raise NoMatch("expected nothing else to read the halves")
    return SwiGLUSpec(N=width_of(gate)), [product, silu, sigmoid, split], product


def _only_product(value: ir.Value, other: ir.Value) -> ir.Node:
    """The one node that reads a value: its product with another."""
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != "Mul" or other not in users[0].inputs:
        raise NoMatch(f"expected '{value.name}' times '{other.name}' and no other use")
    return users[0]
