"""The ops of `ai.splitq` as plain numpy, straight from docs/ops.md: the oracle of bodies and kernels.

It works on logical tensors, sums integers in int64 and shares no code with exporters/ or runtime_ops/.
The classes at the end put it in place of the bodies: `ReferenceEvaluator(model, new_ops=OPS)`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from onnx.reference.op_run import OpRun

F32 = np.float32
GROUPS = ("main", "text", "vision")


@dataclass
class Quantized:
    """Rows of codes [T, width] int64 with one scale a row, [T, 1] float32."""

    codes: np.ndarray
    scale: np.ndarray


def unpack(packed: np.ndarray) -> np.ndarray:
    """Packed weight, 1-D uint8 -> [K, N] int64, one code at a time."""
    data = packed.tobytes()
    bits, _ = struct.unpack_from("<II", data, 16)
    N, K = struct.unpack_from("<QQ", data, 24)
    fields = {8: 1, 6: 4, 4: 2, 3: 8, 2: 4}[bits]
    vectors = 3 if bits in (3, 6) else 1
    blocks = -(-K // (4 * fields))
    q = np.zeros((K, N), np.int64)
    for n in range(N):
        for k in range(K):
            panel, block, field = n // 16, k // (4 * fields), k % (4 * fields) // 4
            start = 64 + (panel * blocks + block) * vectors * 64 + 4 * (n % 16) + k % 4
            q[k, n] = _field(data[start : start + 64 * vectors : 64], bits, field) - 2 ** (bits - 1)
    return q


def _field(of_vectors: bytes, bits: int, field: int) -> int:
    """Stored code of one field, from the bytes that hold it (one of each vector)."""
    if bits not in (3, 6):
        return of_vectors[0] >> (bits * field) & (2**bits - 1)
    top = [byte >> 6 for byte in of_vectors]
    if bits == 6:
        return of_vectors[field] & 63 if field < 3 else top[0] + 4 * top[1] + 16 * top[2]
    if field < 6:
        return of_vectors[field // 2] >> (3 * (field % 2)) & 7
    if field == 6:
        return top[0] + 4 * (top[1] & 1)
    return (top[1] >> 1) + 2 * top[2]


def integers(weight: np.ndarray) -> np.ndarray:
    """Any stored weight -> [K, N] int64."""
    return unpack(weight) if weight.ndim == 1 else weight.astype(np.int8).astype(np.int64)


def quantize_symmetric(a: np.ndarray, bits: int, clip: float = 1.0) -> Quantized:
    """Symmetric quantization (eq. 1) of rows a, [T, width] float32."""
    high = 2 ** (bits - 1) - 1
    largest = np.abs(a).max(axis=1, keepdims=True) * F32(clip)
    scale = np.maximum(largest / F32(high), F32(1e-12))
    inverse = F32(1) / scale
    codes = np.clip(np.rint(a * inverse), -high - 1, high)
    return Quantized(codes.astype(np.int64), scale)


def quantize_asymmetric(a: np.ndarray, bits: int, clip: float = 1.0) -> Quantized:
    """Asymmetric quantization (eq. 1) of rows a, [T, width] float32; codes less zero point."""
    levels = F32(2**bits - 1)
    high = np.maximum(a.max(axis=1, keepdims=True), F32(0)) * F32(clip)
    low = np.minimum(a.min(axis=1, keepdims=True), F32(0)) * F32(clip)
    scale = np.maximum((high - low) / levels, F32(1e-12))
    inverse = F32(1) / scale
    zero = np.clip(np.rint(-low * inverse), F32(0), levels)
    codes = np.clip(np.rint(a * inverse) + zero, F32(0), levels) - zero
    return Quantized(codes.astype(np.int64), scale)


def transform(rows: np.ndarray, p1: np.ndarray | None, p2: np.ndarray | None) -> np.ndarray:
    """Rows [T, B*a*b] times P1 ⊗ P2 (eq. 2), summed in float64 and rounded once; P1 has the rows of p1 [B*a, a] in B
    blocks on its diagonal."""
    if p1 is None or p2 is None:
        return rows
    size, a = p1.shape
    diagonal = np.zeros((size, size))
    for row in range(size):
        first = row // a * a
        diagonal[row, first : first + a] = p1[row]
    return (rows.astype(np.float64) @ np.kron(diagonal, p2.astype(np.float64))).astype(F32)


def transformed_groups(
    x: np.ndarray,
    group_widths: list[int],
    channel_order: np.ndarray | None = None,
    channel_scale: np.ndarray | None = None,
    factors: list[np.ndarray | None] | None = None,
) -> list[np.ndarray]:
    """Rows [T, K] -> transformed rows of main, text and vision; factors are p1, p2 of the three in turn."""
    factors = factors or [None] * 6
    order = np.arange(x.shape[1]) if channel_order is None else channel_order
    grouped = x[:, order]
    if channel_scale is not None:
        grouped = grouped * channel_scale
    ends = np.cumsum(group_widths)
    groups = [grouped[:, end - width : end] for width, end in zip(group_widths, ends, strict=True)]
    return [transform(rows, factors[2 * g], factors[2 * g + 1]) for g, rows in enumerate(groups)]


def split_quantize(x: np.ndarray, split_inputs: list[np.ndarray | None], attributes: dict) -> list[Quantized | None]:
    """ChannelSplitQuantize on rows x [T, K].

    Args:
        x: [T, K] float32.
        split_inputs: inputs 1-9 of the op.
        attributes: the attributes of the op.

    Returns:
        Main, text, vision (None where the group is empty) and residual.
    """
    order, scale, *factors, clip = split_inputs
    clip = np.ones(3, F32) if clip is None else clip
    main, text, vision = transformed_groups(x, attributes["group_widths"], order, scale, factors)
    by_symmetry = quantize_symmetric if attributes.get("activation_symmetric", 1) else quantize_asymmetric
    quantized: list[Quantized | None] = [by_symmetry(main, attributes["activation_bits"], clip[0])]
    for rows, factor in ((text, clip[1]), (vision, clip[2])):
        bits = attributes.get("outlier_activation_bits", 8)
        quantized.append(quantize_symmetric(rows, bits, factor) if rows.shape[1] else None)
    kept = quantized[0].codes.astype(F32) * quantized[0].scale
    return [*quantized, quantize_symmetric(main - kept, attributes.get("residual_bits", 8))]


def low_rank_correction(
    main: Quantized,
    residual: Quantized | None,
    takes_mac: np.ndarray,
    factors: list[np.ndarray],
    gates: list[np.ndarray | None],
) -> np.ndarray:
    """CrossModalCorrection.

    Args:
        main: codes [T, K_m].
        residual: the same, None without MAC.
        takes_mac: [T] bool.
        factors: u [K_m, R] int64, u_scale [R], v [R, N] int64, v_scale [N].
        gates: gate_cws [cws_rank] or None, gate_mac [mac_rank] or None.

    Returns:
        [T, N] float32.
    """
    u, u_scale, v, v_scale = factors
    z = np.zeros((len(main.codes), u.shape[1]), F32)
    all_rows = np.full_like(takes_mac, True)
    for operand, gate, rows in ((main, gates[0], all_rows), (residual, gates[1], takes_mac)):
        if gate is not None:
            rank = len(gate)
            product = (operand.codes @ u[:, :rank]).astype(F32) * operand.scale * u_scale[:rank]
            z[:, :rank] += np.where(rows[:, None], product * gate, F32(0))
    latent = quantize_symmetric(z, 8)
    return (latent.codes @ v).astype(F32) * latent.scale * v_scale


def products(activation: Quantized, q: np.ndarray, scale: np.ndarray, block_size: int = 0) -> list[np.ndarray]:
    """Codes [T, K] times q [K, N], scale [N] or [blocks, N] -> terms [T, N] float32, one a block."""
    terms = []
    block_size = block_size or len(q)
    for start, block_scale in zip(range(0, len(q), block_size), np.atleast_2d(scale), strict=True):
        block = slice(start, start + block_size)
        sums = activation.codes[:, block] @ q[block]
        terms.append(sums.astype(F32) * activation.scale * block_scale)
    return terms


def linear(inputs: dict[str, np.ndarray | None], attributes: dict) -> np.ndarray:
    """SplitQLinear on x [..., K] -> y [..., N]; inputs by the contract's names."""
    return sum_terms(linear_terms(inputs, attributes)).reshape(*inputs["x"].shape[:-1], attributes["N"])


def linear_terms(inputs: dict[str, np.ndarray | None], attributes: dict) -> list[np.ndarray]:
    """The terms of SplitQLinear in their order, each [T, N] (the bias [N]); every block is a term."""
    rows = inputs["x"].reshape(-1, attributes["K"])
    split_names = ["channel_order", "channel_scale"]
    split_names += [f"{p}_{group}" for group in ("main", "text", "vision") for p in ("p1", "p2")]
    split_inputs = [inputs.get(name) for name in [*split_names, "activation_clip"]]
    main, text, vision, residual = split_quantize(rows, split_inputs, attributes)
    block_size = attributes.get("block_size", 0)
    terms = products(main, integers(inputs["weight_main"]), inputs["scale_main"], block_size)
    for name, quantized in (("text", text), ("vision", vision)):
        if quantized is not None:
            terms += products(quantized, integers(inputs[f"weight_{name}"]), inputs[f"scale_{name}"])
    if inputs.get("u") is not None:
        factors = [integers(inputs["u"]), inputs["u_scale"], integers(inputs["v"]), inputs["v_scale"]]
        gates = [inputs.get("gate_cws"), inputs.get("gate_mac")]
        takes_mac = mac_rows(inputs.get("modality"), attributes.get("mac_rows", "text"), len(rows))
        terms.append(low_rank_correction(main, residual, takes_mac, factors, gates))
    if inputs.get("bias") is not None:
        terms.append(inputs["bias"])
    return terms


def sum_terms(terms: list[np.ndarray]) -> np.ndarray:
    """Terms added from the left in float32."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def mac_rows(modality: np.ndarray | None, rows: str, count: int) -> np.ndarray:
    """Which of `count` rows take MAC, [T] bool."""
    if rows == "all" or modality is None:
        return np.full(count, True)
    return modality.reshape(-1) == 0


class _SplitQOp(OpRun):
    """Common part: inputs by name, attributes as a dictionary."""

    op_domain = "ai.splitq"
    input_names: tuple[str, ...] = ()

    def _given(self, args: tuple, attributes: dict) -> tuple[dict[str, np.ndarray | None], dict]:
        values = dict(zip(self.input_names, args, strict=False))
        return values, {name: value for name, value in attributes.items() if value is not None}


class ChannelSplitQuantize(_SplitQOp):
    """The op for onnx.reference."""

    input_names = (
        "x", "channel_order", "channel_scale", "p1_main", "p2_main", "p1_text", "p2_text", "p1_vision",
        "p2_vision", "activation_clip",
    )  # fmt: skip

    def _run(self, *args, **attributes):
        values, attributes = self._given(args, attributes)
        x = values["x"]
        split_inputs = [values.get(name) for name in self.input_names[1:]]
        outputs = []
        for quantized in split_quantize(x.reshape(-1, x.shape[-1]), split_inputs, attributes):
            if quantized is None:
                outputs += [np.zeros(0, np.int8), np.zeros(0, F32)]
            else:
                leading, width = x.shape[:-1], quantized.codes.shape[1]
                outputs.append(quantized.codes.astype(np.int8).reshape(*leading, width))
                outputs.append(quantized.scale.reshape(*leading, 1))
        return tuple(outputs[: len(self.onnx_node.output)])


class CrossModalCorrection(_SplitQOp):
    """The op for onnx.reference."""

    input_names = (
        "main_codes", "main_scale", "residual_codes", "residual_scale", "modality", "u", "u_scale", "v",
        "v_scale", "gate_cws", "gate_mac",
    )  # fmt: skip

    def _run(self, *args, **attributes):
        values, attributes = self._given(args, attributes)
        leading = values["main_codes"].shape[:-1]
        operands = [
            None
            if values.get(f"{name}_codes") is None
            else Quantized(
                values[f"{name}_codes"].reshape(-1, attributes["K"]).astype(np.int64),
                values[f"{name}_scale"].reshape(-1, 1),
            )
            for name in ("main", "residual")
        ]
        rows = mac_rows(values.get("modality"), attributes.get("mac_rows", "text"), len(operands[0].codes))
        factors = [integers(values["u"]), values["u_scale"], integers(values["v"]), values["v_scale"]]
        gates = [values.get("gate_cws"), values.get("gate_mac")]
        correction = low_rank_correction(*operands, rows, factors, gates)
        return (correction.reshape(*leading, attributes["N"]),)


class SplitQLinear(_SplitQOp):
    """The op for onnx.reference."""

    input_names = (
        "x", "modality", *ChannelSplitQuantize.input_names[1:], "weight_main", "scale_main", "weight_text",
        "scale_text", "weight_vision", "scale_vision", "u", "u_scale", "v", "v_scale", "gate_cws", "gate_mac",
        "bias",
    )  # fmt: skip

    def _run(self, *args, **attributes):
        return (linear(*self._given(args, attributes)),)


OPS = [SplitQLinear, ChannelSplitQuantize, CrossModalCorrection]
