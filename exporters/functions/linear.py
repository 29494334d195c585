"""The body of `SplitQLinear`: the other two functions and the products of the groups."""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, TensorProto

from splitq_edge.exporters.functions.arithmetic import (
    code_sums,
    offset_codes,
    product_operand,
    rescale,
    weight_integers,
)
from splitq_edge.exporters.functions.body import Body
from splitq_edge.exporters.joined_constants import places, shape_of
from splitq_edge.exporters.nodes import place
from splitq_edge.exporters.specs import ChannelSplitQuantizeSpec, CrossModalCorrectionSpec, SplitQLinearSpec

EXPLANATION = "y = sum over groups of Q(x_g P_g) Q(P_g^-1 W_g), + correction + bias."


def linear_function(spec: SplitQLinearSpec, quantize_name: str, correction_name: str) -> FunctionProto:
    """The function of a node of this spec.

    Args:
        spec: the variant; sizes are baked in.
        quantize_name: the nested ChannelSplitQuantize function of this structure.
        correction_name: the nested CrossModalCorrection function; unused without a rank.
    """
    body = Body()
    _take_apart(body, spec)
    _call(body, quantize_name, spec.quantize)
    total = ""
    for group, width in zip(spec.groups, filter(None, spec.group_widths), strict=True):
        bits = spec.bits if group == "main" else spec.outlier_bits
        integers = weight_integers(body, f"weight_{group}", bits, spec.packed, (width, spec.N))
        weight = product_operand(body, integers, bits)
        codes = offset_codes(body, f"{group}_codes", f"{group}_codes")
        if group == "main" and spec.block_size:
            term = _blockwise_product(body, spec, codes, weight)
        else:
            sums = code_sums(body, group, codes, weight, bits)
            term = rescale(body, group, sums, f"{group}_scale", f"scale_{group}")
        total = body.op("Add", [total, term], f"sum_with_{group}") if total else term
    nested = nested_correction(spec)
    if nested:
        bits = spec.correction_bits
        u = weight_integers(body, "u", bits, spec.packed, (nested.K, nested.rank))
        v = weight_integers(body, "v", bits, spec.packed, (nested.rank, spec.N))
        _call(body, correction_name, nested, u=u, v=v)
        total = body.op("Add", [total, "correction"], "sum_with_correction")
    body.op("Add", [total, "bias"], "y") if spec.bias else body.op("Identity", [total], "y")
    return body.function(spec, spec.op_type, overload=spec.overload, outputs=spec.outputs, explanation=EXPLANATION)


def _take_apart(body: Body, spec: SplitQLinearSpec) -> None:
    """Appends what makes the arrays in `constants` values of their names."""
    for name, start, size in places(spec.constant_sizes):
        shape = shape_of(name, spec.constant_sizes, spec.group_widths, spec.block_size, spec.N)
        whole = len(shape) == 1 and name != "channel_order"
        first, end = (body.constant(f"{name}_{edge}", [at]) for edge, at in (("from", start), ("to", start + size)))
        value = body.op("Slice", ["constants", first, end], name if whole else f"{name}_numbers")
        if name == "channel_order":
            body.op("Cast", [value], name, to=TensorProto.INT32)
        elif not whole:
            body.op("Reshape", [value, body.constant(f"{name}_shape", list(shape))], name)


def nested_correction(spec: SplitQLinearSpec) -> CrossModalCorrectionSpec | None:
    """The correction as the body calls it: on int8 factors, so that one function serves every weight form."""
    correction = spec.correction
    if not correction:
        return None
    return CrossModalCorrectionSpec(
        K=correction.K,
        N=correction.N,
        bits=8,
        cws_rank=correction.cws_rank,
        mac_rank=correction.mac_rank,
        mac_rows=correction.mac_rows,
    )


def _call(body: Body, name: str, spec: ChannelSplitQuantizeSpec | CrossModalCorrectionSpec, **renamed: str) -> None:
    """Appends a nested node; values carry the names of the op's own inputs and outputs."""
    inputs = {value: renamed.get(value, value) for value in spec.present_inputs}
    outputs = {value: value for value in spec.present_outputs}
    body.call(
        name,
        place(name, spec.inputs, spec.present_inputs, inputs),
        place(name, spec.outputs, spec.present_outputs, outputs),
        **spec.attributes,
    )


def _blockwise_product(body: Body, spec: SplitQLinearSpec, codes: str, weight: str) -> str:
    """Appends row scale * sum over blocks of (codes times weight of the block) * scale_main of the block.

    Integer sums stay exact: one batched integer product with the blocks as its batch axis.
    """
    K, size = spec.group_widths[0], spec.block_size
    blocks = -(-K // size)
    if K % size:
        codes, weight = _pad_last_block(body, codes, weight, blocks * size - K)
    codes_shape = body.constant("codes_by_block_shape", [-1, blocks, size])
    by_row = body.op("Reshape", [codes, codes_shape], "codes_by_row_and_block")
    by_block = body.op("Transpose", [by_row], "codes_by_block", perm=[1, 0, 2])  # [blocks, T, size]
    weight_shape = body.constant("weight_by_block_shape", [blocks, size, spec.N])
    weight = body.op("Reshape", [weight, weight_shape], "weight_by_block")
    sums = code_sums(body, "block", by_block, weight, spec.bits)  # [blocks, T, N]
    rows_axis = body.constant("rows_axis", [1])
    scales = body.op("Unsqueeze", ["scale_main", rows_axis], "block_scales")
    scaled = body.op("Mul", [sums, scales], "block_scaled")
    blocks_axis = body.constant("blocks_axis", [0])
    rows = body.op("ReduceSum", [scaled, blocks_axis], "sum_of_blocks", keepdims=0)  # [T, N]
    leading = body.op("Shape", ["main_codes"], "leading_shape", end=-1)
    output_shape = body.op("Concat", [leading, body.constant("channels", [spec.N])], "y_shape", axis=0)
    total = body.op("Reshape", [rows, output_shape], "main_sums", allowzero=1)
    return body.op("Mul", [total, "main_scale"], "main_product")


def _pad_last_block(body: Body, codes: str, weight: str, missing: int) -> tuple[str, str]:
    """Fills the last block with codes of value 0 (stored 128), whatever the weight holds there."""
    zero_code = body.constant("code_zero_point", np.uint8(128))
    last_axis = body.constant("last_axis", [-1])
    code_pads = body.constant("code_pads", [0, missing])
    codes = body.op("Pad", [codes, code_pads, zero_code, last_axis], "codes_with_whole_blocks")
    weight_pads = body.constant("weight_pads", [0, 0, missing, 0])
    return codes, body.op("Pad", [weight, weight_pads], "weight_with_whole_blocks")
