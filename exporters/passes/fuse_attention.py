"""Attention over a key-value cache -> one `com.microsoft::GroupQueryAttention` a layer, its rotary embedding inside.

Requires: a decoder traced from transformers' SDPA attention: inputs `attention_mask` [batch, total] and
`position_ids` [batch, sequence]; rotary embedding of the whole head by half rotation; causal, with padding masked; past
keys and values joined to the new ones along the sequence. Grouped heads may be repeated by Expand.
Ensures: all layers are fused, or none and the reason is returned. Padding and positions mean what they meant before:
the mask comes as a bias, the positions as they are, and `query_seqlens` (onnxruntime 1.32) lets several rows of a
batch bring several tokens to a filled cache. The cache may then be one buffer for past and present, longer than the
tokens in it. What the old layers computed is left for `RemoveUnusedNodesPass`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitq_edge.exporters.passes.walk import (
    NoMatch,
    constant,
    initializer,
    is_constant,
    is_made_by,
    made_by,
    take_place,
    width_of,
    with_constant,
)

MICROSOFT = "com.microsoft"
MASKED = -1e30  # added to the score of what may not be seen; finite, so that a row that sees nothing stays a number
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class _Rotary:
    """inverse_frequency [head_dim / 2] and the factor on cosine and sine."""

    inverse_frequency: np.ndarray
    factor: float


@dataclass(frozen=True)
class _Layer:
    """What a layer's attention reads and gives.

    Projections and output: [batch, sequence, heads * head_dim]; past and present [batch, kv_heads, tokens, head_dim].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    output: ir.Value
    scale: float
    rotary: _Rotary
    place: ir.Node

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return 2 * len(self.rotary.inverse_frequency)


def fuse_attention(model: ir.Model, *, max_positions: int) -> str | None:
    """Fuse every attention of a decoder in place.

    Args:
        model: traced decoder.
        max_positions: positions that the tables of cosines and sines hold.

    Returns:
        None, or why the graph was left as it was.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    try:
        layers = [_layer(node, inputs) for node in model.graph if node.op_type == "Softmax"]
        if not layers:
            raise NoMatch("expected attention, found no Softmax")
        for layer in layers:
            if (layer.rotary.inverse_frequency != layers[0].rotary.inverse_frequency).any():
                raise NoMatch("expected one rotary embedding for all layers")
    except NoMatch as reason:
        return str(reason)
    shared = _Shared(model, layers[0].rotary, inputs, max_positions)
    for number, layer in enumerate(layers):
        _fuse(model, layer, shared, f"attention.{number}")
    model.opset_imports[MICROSOFT] = 1
    return None


def _layer(softmax: ir.Node, inputs: dict[str | None, ir.Value]) -> _Layer:
    """Read the attention around a Softmax, from scores to output and back to the projections."""
    scores, mask = made_by(softmax.inputs[0], "Add").inputs
    _check_mask(mask, inputs["attention_mask"])
    product = made_by(scores, "MatMul")
    query, query_scale = with_constant(made_by(product.inputs[0], "Mul"))
    transposed, key_scale = with_constant(made_by(product.inputs[1], "Mul"))
    present_key = _unrepeated(_untransposed(transposed))
    weighted = _only_user(_behind_nan_guard(softmax.outputs[0]), "MatMul")
    present_value = _unrepeated(weighted.inputs[1])
    merged = _only_user(_only_user(weighted.outputs[0], "Transpose").outputs[0], "Reshape")
    past_key, new_key = made_by(present_key, "Concat").inputs
    past_value, new_value = made_by(present_value, "Concat").inputs
    rotated_query, rotary = _unrotated(query, inputs["position_ids"])
    rotated_key, key_rotary = _unrotated(new_key, inputs["position_ids"])
    if (rotary.inverse_frequency != key_rotary.inverse_frequency).any() or rotary.factor != key_rotary.factor:
        raise NoMatch("expected one rotary embedding for queries and keys")
    if past_key is None or past_value is None or present_key is None or present_value is None:
        raise NoMatch("expected past keys and values")
    return _Layer(
        query=_flat(rotated_query),
        key=_flat(rotated_key),
        value=_flat(new_value),
        past_key=past_key,
        past_value=past_value,
        present_key=present_key,
        present_value=present_value,
        output=merged.outputs[0],
        scale=float(query_scale) * float(key_scale),
        rotary=rotary,
        place=merged,
    )


def _only_user(value: ir.Value, op_type: str) -> ir.Node:
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != op_type:
        raise NoMatch(f"expected one {op_type} behind '{value.name}', got {[user.op_type for user in users]}")
    return users[0]


def _behind_nan_guard(weights: ir.Value) -> ir.Value:
    """Softmax's weights behind the Where that turns rows without any key into zeros."""
    for user in weights.consumers():
        if user.op_type == "IsNaN":
            return _only_user(user.outputs[0], "Where").outputs[0]
    return weights


def _untransposed(value: ir.Value) -> ir.Value:
    """Keys before their last two axes were exchanged: by one Transpose, or by one between two Reshapes."""
    flat = is_made_by(value, "Reshape")
    transpose = made_by(made_by(value, "Reshape").inputs[0] if flat else value, "Transpose")
    order = list(transpose.attributes["perm"].as_ints())
    if order != ([0, 2, 1] if flat else [0, 1, 3, 2]):
        raise NoMatch(f"expected the keys' last two axes exchanged, got {order}")
    source = made_by(transpose.inputs[0], "Reshape").inputs[0] if flat else transpose.inputs[0]
    assert source is not None
    return source


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """Keys or values before each head was repeated for its group of queries."""
    if not is_made_by(value, "Reshape"):
        return value
    expand = made_by(made_by(value, "Reshape").inputs[0], "Expand")
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze")
    if constant(unsqueeze.inputs[1]).tolist() != [2]:
        raise NoMatch("expected heads repeated behind their own axis")
    return unsqueeze.inputs[0]


def _flat(heads: ir.Value | None) -> ir.Value:
    """The projection [batch, sequence, heads * head_dim] behind [batch, heads, sequence, head_dim]."""
    transpose = made_by(heads, "Transpose")
    if list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        raise NoMatch("expected heads in front of the sequence")
    source = made_by(transpose.inputs[0], "Reshape").inputs[0]
    assert source is not None
    width_of(source)
    return source


def _unrotated(value: ir.Value | None, position_ids: ir.Value) -> tuple[ir.Value, _Rotary]:
    """x of `x * cos + rotate_half(x) * sin`, and what cos and sin are."""
    straight, turned = (made_by(term, "Mul") for term in made_by(value, "Add").inputs)
    if is_made_by(straight.inputs[0], "Concat"):
        straight, turned = turned, straight
    source, cosine = straight.inputs
    half_turn, sine = turned.inputs
    negated, first = made_by(half_turn, "Concat").inputs
    second_slice, first_slice = made_by(made_by(negated, "Neg").inputs[0], "Slice"), made_by(first, "Slice")
    found, other = _rotary(cosine, "Cos", position_ids), _rotary(sine, "Sin", position_ids)
    if found.factor != other.factor or (found.inverse_frequency != other.inverse_frequency).any():
        raise NoMatch("expected cosine and sine of one angle")
    half = len(found.inverse_frequency)
    for node, bounds in ((first_slice, (0, half)), (second_slice, (half, 2 * half))):
        start, end = int(constant(node.inputs[1])[0]), int(constant(node.inputs[2])[0])
        if node.inputs[0] is not source or (start, min(end, 2 * half)) != bounds:
            raise NoMatch(f"expected the rotary embedding of {2 * half} channels by halves")
    assert source is not None
    if source.shape is None or source.shape[-1] != 2 * half:
        raise NoMatch(f"expected a rotary embedding of the whole head, got {2 * half} channels of {source.shape}")
    return source, found


def _rotary(value: ir.Value | None, op_type: str, position_ids: ir.Value) -> _Rotary:
    """Frequencies and factor of a cosine or sine [batch, 1, sequence, head_dim]."""
    value = made_by(value, "Unsqueeze").inputs[0]
    factor = 1.0
    if is_made_by(value, "Mul"):
        value, number = with_constant(made_by(value, "Mul"))
        factor = float(number)
    first, second = made_by(made_by(value, op_type).inputs[0], "Concat").inputs
    if first is not second:
        raise NoMatch("expected the same angles in both halves of a head")
    positions, frequency = with_constant(made_by(first, "Mul"))
    unsqueezed = made_by(made_by(positions, "Cast").inputs[0], "Unsqueeze").inputs[0]
    if unsqueezed is not position_ids:
        raise NoMatch("expected angles of position_ids alone")
    return _Rotary(frequency.astype(np.float32).reshape(-1), factor)


def _check_mask(mask: ir.Value | None, attention_mask: ir.Value) -> None:
    """Check that a score is masked just where a key is padding or lies behind the query."""
    where = made_by(mask, "Where")
    if constant(where.inputs[1]).any():
        raise NoMatch("expected a mask that adds nothing where a key is seen")
    terms = list(_terms(where.inputs[0]))
    causal = [term for term in terms if is_made_by(term, "LessOrEqual")]
    padding = [term for term in terms if is_made_by(term, "GatherND")]
    if len(causal) != 1 or len(terms) != 1 + len(padding) or len(padding) > 1:
        raise NoMatch("expected a causal mask with padding, got other terms (a sliding window?)")
    for term in padding:
        if made_by(made_by(term, "GatherND").inputs[0], "Cast").inputs[0] is not attention_mask:
            raise NoMatch("expected padding of attention_mask")


def _terms(condition: ir.Value | None) -> Iterator[ir.Value]:
    """What must hold together for a key to be seen; constants that always hold are left out."""
    if is_made_by(condition, "Expand"):
        yield from _terms(made_by(condition, "Expand").inputs[0])
    elif is_made_by(condition, "And"):
        for part in made_by(condition, "And").inputs:
            yield from _terms(part)
    elif is_constant(condition):
        if not constant(condition).all():
            raise NoMatch("expected a mask without fixed gaps")
    elif condition is not None:
        yield condition


class _Shared:
    """What all layers read: lengths, tables of cosines and sines, positions, bias of the mask."""

    def __init__(
        self, model: ir.Model, rotary: _Rotary, inputs: dict[str | None, ir.Value], max_positions: int
    ) -> None:
        self._model = model
        self._first = model.graph[0]
        angles = np.outer(np.arange(max_positions, dtype=np.float64), rotary.inverse_frequency.astype(np.float64))
        self.cosine = initializer(model, "attention.cosine", (np.cos(angles) * rotary.factor).astype(np.float32))
        self.sine = initializer(model, "attention.sine", (np.sin(angles) * rotary.factor).astype(np.float32))
        self.position_ids = inputs["position_ids"]
        mask = inputs["attention_mask"]
        batch = self._node("Shape", [mask], INT64, "batch", start=0, end=1)
        total = self._node("Shape", [mask], INT64, "total", start=1, end=2)
        sequence = self._node("Shape", [self.position_ids], INT64, "sequence", start=1, end=2)
        nothing = initializer(model, "attention.nothing", np.array([], np.int64))
        self.total = self._node(
            "Cast", [self._node("Reshape", [total, nothing], INT64, "total0")], INT32, "total_length", to=INT32
        )
        one = initializer(model, "attention.one", np.array([1], np.int64))
        last = self._node("Cast", [self._node("Sub", [total, one], INT64, "last")], INT32, "last_key", to=INT32)
        self.seqlens = self._node("Expand", [last, batch], INT32, "seqlens")
        new = self._node("Cast", [sequence], INT32, "new_tokens", to=INT32)
        self.query_seqlens = self._node("Expand", [new, batch], INT32, "query_seqlens")
        self.bias = self._bias(mask, batch, total, sequence, one)

    def _bias(self, mask: ir.Value, batch: ir.Value, total: ir.Value, sequence: ir.Value, one: ir.Value) -> ir.Value:
        """[batch, 1, sequence, total]: 0 where a token is, `MASKED` where padding is."""
        kept = self._node("Cast", [mask], ir.DataType.FLOAT, "kept", to=ir.DataType.FLOAT)
        unit = initializer(self._model, "attention.unit", np.array(1, np.float32))
        masked = initializer(self._model, "attention.masked", np.array(-MASKED, np.float32))
        absent = self._node("Sub", [kept, unit], ir.DataType.FLOAT, "absent")  # 0 or -1
        row = self._node("Mul", [absent, masked], ir.DataType.FLOAT, "mask_row")
        axes = initializer(self._model, "attention.mask_axes", np.array([1, 2], np.int64))
        rows = self._node("Unsqueeze", [row, axes], ir.DataType.FLOAT, "mask_rows")
        shape = self._node("Concat", [batch, one, sequence, total], INT64, "mask_shape", axis=0)
        return self._node("Expand", [rows, shape], ir.DataType.FLOAT, "mask_bias")

    def _node(self, op_type: str, inputs: list[ir.Value], dtype: ir.DataType, name: str, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"attention.{name}")
        node.outputs[0].name = f"attention.{name}"
        node.outputs[0].type = ir.TensorType(dtype)
        self._model.graph.insert_before(self._first, node)
        return node.outputs[0]


def _fuse(model: ir.Model, layer: _Layer, shared: _Shared, name: str) -> None:
    """Put one node in place of a layer's."""
    node = ir.node(
        "GroupQueryAttention",
        [
            layer.query,
            layer.key,
            layer.value,
            layer.past_key,
            layer.past_value,
            shared.seqlens,
            shared.total,
            shared.cosine,
            shared.sine,
            shared.position_ids,
            shared.bias,
            *[None] * 5,  # head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
            shared.query_seqlens,
        ],
        attributes={
            "num_heads": width_of(layer.query) // layer.head_dim,
            "kv_num_heads": width_of(layer.key) // layer.head_dim,
            "do_rotary": 1,
            "scale": layer.scale,
        },
        domain=MICROSOFT,
        num_outputs=3,
        name=name,
    )
    for value, suffix in zip(node.outputs, ("y", "key", "value"), strict=True):
        value.name = f"{name}.{suffix}"
    model.graph.insert_before(layer.place, node)
    for old, new in zip((layer.output, layer.present_key, layer.present_value), node.outputs, strict=True):
        take_place(old, new)
