"""Pieces that several bodies share: quantization of rows, weights as integers, exact integer products.

Integer products are `MatMulInteger` of uint8 codes (code + 128, zero point 128) with int8 weights of up to 6
bits or uint8 weights (code + 128) of 8 bits: uint8 x int8 with 8-bit weights may saturate on AVX2 machines.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from splitq_edge.exporters.functions.body import Body

SMALLEST_SCALE = np.float32(1e-12)
HEADER_BYTES = 64
PANEL = 16
FIELDS = {8: 1, 6: 4, 4: 2, 3: 8, 2: 4}


def symmetric_codes(body: Body, name: str, value: str, bits: int, clip: str = "") -> tuple[str, str]:
    """Appends the symmetric quantization of rows (eq. 1).

    Args:
        body: receives the nodes.
        name: prefix of the values.
        value: [..., width] float32.
        bits: 2, 3, 4, 6 or 8.
        clip: scalar or [1] float32 clip factor; '' for 1.

    Returns:
        The codes [..., width] as whole float32 numbers, and `<name>_scale` [..., 1] float32.
    """
    last_axis = body.constant("last_axis", [-1])
    smallest_scale = body.constant("smallest_scale", SMALLEST_SCALE)
    low = body.constant(f"min_code_{bits}bit", np.float32(-(2 ** (bits - 1))))
    high = body.constant(f"max_code_{bits}bit", np.float32(2 ** (bits - 1) - 1))
    magnitude = body.op("Abs", [value], f"{name}_magnitude")
    largest = body.op("ReduceMax", [magnitude, last_axis], f"{name}_largest", keepdims=1)
    if clip:
        largest = body.op("Mul", [largest, clip], f"{name}_clipped_largest")
    step = body.op("Div", [largest, high], f"{name}_step")
    scale = body.op("Max", [step, smallest_scale], f"{name}_scale")
    inverse = inverse_scale(body, name, scale)
    scaled = body.op("Mul", [value, inverse], f"{name}_scaled")
    rounded = body.op("Round", [scaled], f"{name}_rounded")
    return body.op("Clip", [rounded, low, high], f"{name}_float_codes"), scale


def inverse_scale(body: Body, name: str, scale: str) -> str:
    """Appends 1 / scale, [..., 1].

    Abs changes nothing, but without it ONNX Runtime (DivMulFusion) rewrites a * (1 / scale) into a / scale,
    which rounds differently from the kernels.
    """
    one = body.constant("one", np.float32(1))
    inverse = body.op("Div", [one, scale], f"{name}_one_by_scale")
    return body.op("Abs", [inverse], f"{name}_inverse_scale")


def offset_codes(body: Body, name: str, codes: str) -> str:
    """Appends int8 -> uint8, code -> code + 128 (flipping the sign bit is adding 128)."""
    sign_bit = body.constant("sign_bit", np.uint8(128))
    raw = body.op("Cast", [codes], f"{name}_bits", to=TensorProto.UINT8)
    return body.op("BitwiseXor", [raw, sign_bit], f"{name}_plus_128")


def weight_integers(body: Body, name: str, bits: int, packed: bool, shape: tuple[int, int]) -> str:
    """Appends what turns the stored weight `name` into int8 [K, N]; ONNX Runtime folds it into a constant."""
    if packed:
        return _unpack(body, name, bits, shape)
    return name if bits > 4 else body.op("Cast", [name], f"{name}_int8", to=TensorProto.INT8)


def product_operand(body: Body, weight: str, bits: int) -> str:
    """Appends what makes int8 weights safe for the integer product; see the module's docstring."""
    return offset_codes(body, weight, weight) if bits == 8 else weight


def code_sums(body: Body, name: str, codes: str, weight: str, bits: int) -> str:
    """Appends the exact product of codes and weight.

    Args:
        body: receives the nodes.
        name: prefix of the values.
        codes: [..., K] uint8, code + 128.
        weight: [K, N] or [blocks, K, N], of `product_operand`.
        bits: bits of the weight.

    Returns:
        `<name>_sums`, [..., N] float32 (the int32 sums, converted).
    """
    zero_point = body.constant("code_zero_point", np.uint8(128))
    zero_points = [zero_point, zero_point] if bits == 8 else [zero_point]
    sums = body.op("MatMulInteger", [codes, weight, *zero_points], f"{name}_integer_sums")
    return body.op("Cast", [sums], f"{name}_sums", to=TensorProto.FLOAT)


def rescale(body: Body, name: str, sums: str, row_scale: str, channel_scale: str) -> str:
    """Appends `sums * row scale [..., 1] * channel scale [N]`, in this order."""
    per_row = body.op("Mul", [sums, row_scale], f"{name}_row_scaled")
    return body.op("Mul", [per_row, channel_scale], f"{name}_product")


def _unpack(body: Body, name: str, bits: int, shape: tuple[int, int]) -> str:
    """Layout 1 of docs/ops.md -> int8 [K, N]: every byte is looked up in a table of the codes it holds."""
    K, N = shape
    panels, blocks = -(-N // PANEL), -(-K // (4 * FIELDS[bits]))
    start = body.constant("header_bytes", [HEADER_BYTES])
    end = body.constant("end_of_tensor", [np.iinfo(np.int64).max])
    payload = body.op("Slice", [name, start, end], f"{name}_payload")
    vectors_shape = body.constant(f"{name}_vectors_shape", [panels, blocks, -1, PANEL, 4])
    vectors = body.op("Reshape", [payload, vectors_shape], f"{name}_vectors")
    if bits in (3, 6):
        vectors = _append_top_bits(body, name, vectors)
    index = body.op("Cast", [vectors], f"{name}_byte_values", to=TensorProto.INT32)
    table = body.constant(f"codes_of_a_byte_{bits}bit", _codes_of_a_byte(bits))
    codes = body.op("Gather", [table, index], f"{name}_codes", axis=0)
    # panel, block, vector, n, i, field of the vector -> k = (block, vector, field, i), n = (panel, n)
    by_channel = body.op("Transpose", [codes], f"{name}_by_channel", perm=[1, 2, 5, 4, 0, 3])
    padded_shape = body.constant(f"{name}_padded_shape", [-1, panels * PANEL])
    padded = body.op("Reshape", [by_channel, padded_shape], f"{name}_padded")
    origin, size = body.constant("origin", [0, 0]), body.constant(f"{name}_shape", [K, N])
    return body.op("Slice", [padded, origin, size], f"{name}_int8")


def _append_top_bits(body: Body, name: str, vectors: str) -> str:
    """Adds a fourth vector to a block's three: their bits 6-7, put side by side, are the last 6 bits of codes."""
    shifts = [body.constant(f"shift_{count}", np.uint8(count)) for count in (2, 4, 6)]
    top = body.op("BitShift", [vectors, shifts[2]], f"{name}_top_bits", direction="RIGHT")
    parts = [f"{name}_top_bits_{vector}" for vector in range(3)]
    body.split(top, body.constant("one_by_one", [1, 1, 1]), parts, axis=2)
    moved = [
        body.op("BitShift", [part, shift], f"{part}_moved", direction="LEFT")
        for part, shift in zip(parts[1:], shifts, strict=False)
    ]
    lower = body.op("BitwiseOr", [parts[0], moved[0]], f"{name}_fourth_lower")
    fourth = body.op("BitwiseOr", [lower, moved[1]], f"{name}_fourth")
    return body.op("Concat", [vectors, fourth], f"{name}_four_vectors", axis=2)


def _codes_of_a_byte(bits: int) -> np.ndarray:
    """[256, fields] int8: the codes in a byte, lowest bits first; 3 and 6 bits leave the two top bits unread."""
    shifts = np.arange(0, 8 - bits + 1, bits)
    fields = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return (fields - 2 ** (bits - 1)).astype(np.int8)
