"""`com.microsoft::GroupQueryAttention` -> `ai.splitq::CachedAttention`, which our kernels run.

Requires: nodes of `fuse_attention`, whose sites `pack_attention` has given them whole.
Ensures: those with a cache of floats are ours, their body to be attached; the others stay.
"""

from __future__ import annotations

import onnx_ir as ir

from splitq_edge.exporters.nodes import DOMAIN, CachedAttentionSpec
from splitq_edge.exporters.passes.walk import NoMatch, take_place, width_of

PLACES = (0, 3, 4, 5, 6, 7, 8, 9, 10, 16)  # of our inputs among those of the old node


def cache_attention(model: ir.Model) -> set[CachedAttentionSpec]:
    """Change every node that can be, in place; returns the specs of the nodes written."""
    written = set()
    for old in list(model.graph):
        if old.op_type != "GroupQueryAttention":
            continue
        try:
            spec = _read(old)
        except NoMatch:
            continue
        node = ir.node(
            spec.op_type,
            [old.inputs[place] for place in PLACES],
            attributes=spec.attributes,
            domain=DOMAIN,
            num_outputs=len(spec.outputs),
            name=old.name,
        )
        model.graph.insert_before(old, node)
        for before, after in zip(old.outputs, node.outputs, strict=True):
            after.name = before.name
            take_place(before, after)
        model.graph.remove(old, safe=True)
        written.add(spec)
    return written


def _read(old: ir.Node) -> CachedAttentionSpec:
    given = [place for place, value in enumerate(old.inputs) if value is not None]
    if given != list(PLACES):
        raise NoMatch(f"expected inputs {PLACES}, got {given}")
    qkv, past_key = old.inputs[0], old.inputs[3]
    assert qkv is not None
    assert past_key is not None
    if past_key.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise NoMatch(f"expected a cache in float32 or float16, got {past_key.dtype}")
    heads, kv_heads = (old.attributes.get_int(name) for name in ("num_heads", "kv_num_heads"))
    known = {"num_heads", "kv_num_heads", "scale", "do_rotary"}
    if set(old.attributes) != known or not heads or not kv_heads:
        raise NoMatch(f"expected attributes {sorted(known)}, got {sorted(old.attributes)}")
    return CachedAttentionSpec(
        num_heads=heads,
        kv_num_heads=kv_heads,
        head_size=width_of(qkv) // (heads + 2 * kv_heads),
        scale=float(old.attributes.get_float("scale", 0.0)),
    )
