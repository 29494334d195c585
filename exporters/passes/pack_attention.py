"""Attention that reads the three pieces of one projection -> attention that reads the projection itself.

Requires: `GroupQueryAttention` nodes; queries, keys and values of a site cut apart by one Split in this order.
Ensures: such a node takes the whole projection as its packed query, and the Split is unused.
"""

from __future__ import annotations

import onnx_ir as ir


def pack_attention(model: ir.Model) -> int:
    """Pack where it can be done; returns how many nodes were changed."""
    packed = 0
    for node in model.graph:
        if node.op_type != "GroupQueryAttention":
            continue
        split = node.inputs[0].producer() if node.inputs[0] is not None else None
        if split is None or split.op_type != "Split" or tuple(split.outputs) != tuple(node.inputs[:3]):
            continue
        for index, value in enumerate((split.inputs[0], None, None)):
            node.replace_input_with(index, value)
        packed += 1
    return packed
