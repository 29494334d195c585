"""The body of `ChannelSplitQuantize`: channel groups, transform, integer codes, residual."""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, TensorProto

from splitq_edge.exporters.functions.arithmetic import SMALLEST_SCALE, inverse_scale, symmetric_codes
from splitq_edge.exporters.functions.body import Body
from splitq_edge.exporters.specs import GROUPS, ChannelSplitQuantizeSpec

EXPLANATION = "Per group and token: codes = clamp(round(group(x * channel_scale) P / scale))."


def quantize_function(spec: ChannelSplitQuantizeSpec, name: str, overload: str) -> FunctionProto:
    """The function of a node of this spec; it depends on `quantize_structure(spec)` only, not on widths."""
    body = Body()
    clips = _clips(body, spec)
    for group, rows in _group_rows(body, spec).items():
        value = _transform(body, group, rows) if spec.transforms[GROUPS.index(group)] else rows
        if group == "main" and not spec.activation_symmetric:
            codes, scale = _asymmetric_codes(body, value, spec.activation_bits, clips[group])
        else:
            bits = spec.activation_bits if group == "main" else spec.outlier_activation_bits
            codes, scale = symmetric_codes(body, group, value, bits, clips[group])
        body.op("Cast", [codes], f"{group}_codes", to=TensorProto.INT8)
        if group == "main" and spec.residual:
            kept = body.op("Mul", [codes, scale], "main_dequantized")
            residual = body.op("Sub", [value, kept], "residual")
            codes, _ = symmetric_codes(body, "residual", residual, spec.residual_bits)
            body.op("Cast", [codes], "residual_codes", to=TensorProto.INT8)
    # An output that no node of this structure wants still needs a name in the function's signature.
    last = max(spec.outputs.index(output) for output in spec.present_outputs)
    for output in spec.outputs[: last + 1]:
        if output not in spec.present_outputs:
            body.op("Identity", ["x"], output)
    outputs = spec.outputs[: last + 1]
    return body.function(spec, name, overload=overload, outputs=outputs, explanation=EXPLANATION)


def quantize_structure(spec: ChannelSplitQuantizeSpec) -> str:
    """What the body depends on: specs of one structure share a nested function."""
    overload = spec.overload.split("_")
    return "_".join([overload[0], ".".join(spec.groups), *overload[2:]])


def _clips(body: Body, spec: ChannelSplitQuantizeSpec) -> dict[str, str]:
    """The clip factor [1] of each group, '' where none is given (a factor of 1 changes nothing)."""
    clips = dict.fromkeys(GROUPS, "")
    if spec.activation_clip:
        clips = {group: f"{group}_clip" for group in GROUPS}
        body.split("activation_clip", body.constant("one_by_one", [1, 1, 1]), list(clips.values()), axis=0)
    return clips


def _group_rows(body: Body, spec: ChannelSplitQuantizeSpec) -> dict[str, str]:
    """The rows of each group that has channels: [..., K_g] float32."""
    value = "x"
    if spec.channel_order:
        value = body.op("Gather", [value, "channel_order"], "x_ordered", axis=-1)
    if spec.channel_scale:
        value = body.op("Mul", [value, "channel_scale"], "x_scaled")
    if spec.groups == ("main",):
        return {"main": value}
    # An empty group is a Split output of width 0 that nothing reads.
    rows = {group: f"{group}_rows" for group in GROUPS}
    body.split(value, body.attribute_ints("group_widths"), list(rows.values()), axis=-1)
    return {group: rows[group] for group in spec.groups}


def _transform(body: Body, group: str, rows: str) -> str:
    """P1ᵀ (g P2) of each row g seen as B matrices [a, b]; leading axes of any rank pass through."""
    p1, p2 = f"p1_{group}", f"p2_{group}"
    any_rows = body.constant("any_rows", [-1])
    a = body.op("Shape", [p1], f"{group}_a", start=1)
    b = body.op("Shape", [p2], f"{group}_b", start=1)
    blocks_shape = body.op("Concat", [any_rows, a, a], f"{p1}_blocks_shape", axis=0)
    blocks = body.op("Reshape", [p1, blocks_shape], f"{p1}_blocks")
    p1_transposed = body.op("Transpose", [blocks], f"{p1}_transposed", perm=[0, 2, 1])
    count = body.op("Shape", [blocks], f"{group}_blocks", end=1)
    matrix_shape = body.op("Concat", [any_rows, count, a, b], f"{group}_matrix_shape", axis=0)
    matrix = body.op("Reshape", [rows, matrix_shape], f"{group}_matrix")
    right = body.op("MatMul", [matrix, p2], f"{group}_times_p2")
    both = body.op("MatMul", [p1_transposed, right], f"{group}_times_p1_p2")
    rows_shape = body.op("Shape", [rows], f"{group}_rows_shape")
    return body.op("Reshape", [both, rows_shape], f"{group}_transformed", allowzero=1)


def _asymmetric_codes(body: Body, value: str, bits: int, clip: str) -> tuple[str, str]:
    """The asymmetric quantization of main rows (eq. 1): codes with the zero point already subtracted."""
    last_axis = body.constant("last_axis", [-1])
    smallest_scale = body.constant("smallest_scale", SMALLEST_SCALE)
    zero = body.constant("zero", np.float32(0))
    levels = body.constant(f"levels_{bits}bit", np.float32(2**bits - 1))
    ends = {}
    for end, reduce, bound in (("high", "ReduceMax", "Max"), ("low", "ReduceMin", "Min")):
        extreme = body.op(reduce, [value, last_axis], f"main_{end}est", keepdims=1)
        ends[end] = body.op(bound, [extreme, zero], f"main_{end}")
        if clip:
            ends[end] = body.op("Mul", [ends[end], clip], f"main_clipped_{end}")
    span = body.op("Sub", [ends["high"], ends["low"]], "main_span")
    step = body.op("Div", [span, levels], "main_step")
    scale = body.op("Max", [step, smallest_scale], "main_scale")
    inverse = inverse_scale(body, "main", scale)
    below = body.op("Neg", [ends["low"]], "main_below_zero")
    steps_below = body.op("Mul", [below, inverse], "main_steps_below_zero")
    rounded_below = body.op("Round", [steps_below], "main_rounded_zero_point")
    zero_point = body.op("Clip", [rounded_below, zero, levels], "main_zero_point")
    scaled = body.op("Mul", [value, inverse], "main_scaled")
    rounded = body.op("Round", [scaled], "main_rounded")
    shifted = body.op("Add", [rounded, zero_point], "main_shifted")
    clamped = body.op("Clip", [shifted, zero, levels], "main_clamped")
    return body.op("Sub", [clamped, zero_point], "main_float_codes"), scale
