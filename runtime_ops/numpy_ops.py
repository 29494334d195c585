"""The ops of `ai.splitq` (docs/ops.md) in numpy, one object a node, its constants made ready once.

Sums of codes are exact as in the contract: products run in float32 where every partial sum is a whole number of at most
2^24, else in float64. tests/oracle.py, which these are tested against, shares no code with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PYTHON_DOMAIN = "ai.splitq.python"
NUMBER = "number"  # attribute of a rewritten node, `PythonNode.number`
GROUPS = ("main", "text", "vision")
SMALLEST_SCALE = np.float32(1e-12)
LATENT_BITS = 8  # of what lies between u and v
EXACT_FLOAT32 = 1 << 24
LARGEST_CODE = 128  # of activations, whatever their bits

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PythonNode:
    """A node whose op runs in Python.

    Attributes:
        number: the node's own in the process.
        name: op type of the node in the rewritten graph, the same for nodes of the same inputs and outputs.
        op_type: op of the contract.
        inputs: names of the inputs that the graph gives, by the contract.
        outputs: names of the outputs that the graph takes, by the contract.
        attributes: of the contract, those that the node states.
        constants: the other inputs; weights as codes [K, N] int8.
    """

    number: int
    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    constants: dict[str, np.ndarray]


@dataclass(frozen=True)
class Codes:
    """Quantized rows: codes [T, width] float32, whole numbers; scale [T, 1] float32."""

    values: np.ndarray
    scale: np.ndarray


class CodeProduct:
    """Products of row codes with the codes of a weight, exact.

    Args:
        weight: [K, N] int8.
    """

    def __init__(self, weight: np.ndarray) -> None:
        largest = int(np.abs(weight.astype(np.int16)).max(initial=0)) * LARGEST_CODE * len(weight)
        self._weight = weight.astype(np.float32 if largest <= EXACT_FLOAT32 else np.float64)

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Codes [T, K] -> sums [T, N] float32, rounded once."""
        return (codes.astype(self._weight.dtype, copy=False) @ self._weight).astype(np.float32)


def quantize_symmetric(rows: np.ndarray, bits: int, clip: np.float32) -> Codes:
    """Per token, eq. 1; rows: [T, width] float32, width > 0."""
    high = np.float32(2 ** (bits - 1) - 1)
    scale = np.maximum(np.abs(rows).max(1, keepdims=True) * clip / high, SMALLEST_SCALE)
    return Codes(np.clip(np.rint(rows * (np.float32(1) / scale)), -high - 1, high), scale)


def quantize_asymmetric(rows: np.ndarray, bits: int, clip: np.float32) -> Codes:
    """Per token, eq. 1, less the zero point; rows: [T, width] float32, width > 0."""
    levels = np.float32(2**bits - 1)
    high = np.maximum(rows.max(1, keepdims=True), 0) * clip
    low = np.minimum(rows.min(1, keepdims=True), 0) * clip
    scale = np.maximum((high - low) / levels, SMALLEST_SCALE)
    inverse = np.float32(1) / scale
    zero = np.clip(np.rint(-low * inverse), 0, levels)
    return Codes(np.clip(np.rint(rows * inverse) + zero, 0, levels) - zero, scale)


class SplitQuantizer:
    """ChannelSplitQuantize on rows.

    Args:
        attributes: of the op.
        constants: its inputs behind x, by name.
    """

    def __init__(self, attributes: Mapping[str, Any], constants: Arrays) -> None:
        self._order, self._scale = constants.get("channel_order"), constants.get("channel_scale")
        self._ends = np.cumsum(attributes["group_widths"])[:-1]
        self._factors = [(constants.get(f"p1_{group}"), constants.get(f"p2_{group}")) for group in GROUPS]
        self._clip = constants.get("activation_clip", np.ones(3, np.float32))
        self._bits = attributes["activation_bits"], *(attributes.get("outlier_activation_bits", 8),) * 2
        self._symmetric = bool(attributes.get("activation_symmetric", 1))
        self._residual_bits = attributes.get("residual_bits", 8)

    def __call__(self, rows: np.ndarray, *, residual: bool) -> dict[str, Codes]:
        """Rows [T, K] float32 -> codes of the groups that have channels and, if wanted, of the residual, by name."""
        ordered = rows if self._order is None else rows[:, self._order]
        scaled = ordered if self._scale is None else ordered * self._scale
        found = {}
        for index, (group, channels) in enumerate(zip(GROUPS, np.split(scaled, self._ends, 1), strict=True)):
            if not channels.shape[1]:
                continue
            part = _transformed(channels, *self._factors[index])
            symmetric = self._symmetric or group != "main"
            quantize = quantize_symmetric if symmetric else quantize_asymmetric
            codes = quantize(part, self._bits[index], self._clip[index])
            found[group] = codes
            if group == "main" and residual:
                error = part - codes.values * codes.scale
                found["residual"] = quantize_symmetric(error, self._residual_bits, np.float32(1))
        return found


def _transformed(rows: np.ndarray, p1: np.ndarray | None, p2: np.ndarray | None) -> np.ndarray:
    """Rows [T, B*a*b] times P1 ⊗ P2, eq. 2; P1 [B*a, a] are B matrices, one under the other."""
    if p1 is None or p2 is None:
        return rows
    a, b = p1.shape[1], len(p2)
    blocks = p1.reshape(-1, a, a)
    matrices = rows.reshape(len(rows), len(blocks), a, b)
    return np.asarray(blocks.swapaxes(1, 2) @ (matrices @ p2)).reshape(rows.shape)


class Correction:
    """CrossModalCorrection on rows, eq. 16-19.

    Args:
        attributes: cws_rank, mac_rank and mac_rows.
        constants: u, v, their scales and the gates, by name.
    """

    def __init__(self, attributes: Mapping[str, Any], constants: Arrays) -> None:
        self._rank = constants["u"].shape[1]
        self._branches = {}
        for operand, name in (("main", "cws"), ("residual", "mac")):
            rank = attributes.get(f"{name}_rank", 0)
            if rank:
                columns = CodeProduct(constants["u"][:, :rank]), constants["u_scale"][:rank]
                self._branches[operand] = (*columns, constants[f"gate_{name}"])
        self._text_only = attributes.get("mac_rows", "text") == "text"
        self._v, self._v_scale = CodeProduct(constants["v"]), constants["v_scale"]

    def __call__(self, found: Mapping[str, Codes], modality: np.ndarray | None) -> np.ndarray:
        """Codes of main and residual, modality [T] int8 -> [T, N] float32."""
        latent = np.zeros((len(found["main"].scale), self._rank), np.float32)
        for operand, (product, scale, gate) in self._branches.items():
            codes = found[operand]
            branch = product(codes.values) * codes.scale * scale * gate
            if operand == "residual" and self._text_only and modality is not None:
                branch = np.where(modality[:, None] == 0, branch, np.float32(0))
            latent[:, : branch.shape[1]] += branch
        codes = quantize_symmetric(latent, LATENT_BITS, np.float32(1))
        return self._v(codes.values) * codes.scale * self._v_scale


class _Linear:
    """SplitQLinear."""

    def __init__(self, node: PythonNode) -> None:
        attributes, constants = node.attributes, node.constants
        self._quantizer = SplitQuantizer(attributes, constants)
        size = attributes.get("block_size", 0) or len(constants["weight_main"])
        starts = range(0, len(constants["weight_main"]), size)
        main = [constants["weight_main"][start : start + size] for start in starts]
        self._blocks = [
            (slice(start, start + size), CodeProduct(weight), scale)
            for start, weight, scale in zip(starts, main, np.atleast_2d(constants["scale_main"]), strict=True)
        ]
        self._outliers = {
            group: (CodeProduct(constants[f"weight_{group}"]), constants[f"scale_{group}"])
            for group in GROUPS[1:]
            if f"weight_{group}" in constants
        }
        self._mac = attributes.get("mac_rank", 0) > 0
        self._correction = Correction(attributes, constants) if "u" in constants else None
        self._bias = constants.get("bias")

    def __call__(self, x: np.ndarray, modality: np.ndarray | None = None) -> np.ndarray:
        found = self._quantizer(x.reshape(-1, x.shape[-1]), residual=self._mac)
        main = found["main"]
        if len(self._blocks) == 1:
            _, product, scale = self._blocks[0]
            y = product(main.values) * main.scale * scale
        else:
            sums = sum(product(main.values[:, block]) * scale for block, product, scale in self._blocks)
            y = sums * main.scale
        for group, (product, scale) in self._outliers.items():
            y = y + product(found[group].values) * found[group].scale * scale
        if self._correction is not None:
            y = y + self._correction(found, None if modality is None else modality.reshape(-1))
        if self._bias is not None:
            y = y + self._bias
        return np.asarray(y, np.float32).reshape(*x.shape[:-1], y.shape[-1])


class _Quantize:
    """ChannelSplitQuantize."""

    def __init__(self, node: PythonNode) -> None:
        self._quantizer = SplitQuantizer(node.attributes, node.constants)
        self._outputs = node.outputs

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        wanted = "residual_codes" in self._outputs or "residual_scale" in self._outputs
        found = self._quantizer(x.reshape(-1, x.shape[-1]), residual=wanted)
        arrays = {}
        for group, codes in found.items():
            width = codes.values.shape[1]
            arrays[f"{group}_codes"] = codes.values.astype(np.int8).reshape(*x.shape[:-1], width)
            arrays[f"{group}_scale"] = codes.scale.reshape(*x.shape[:-1], 1)
        return tuple(arrays[name] for name in self._outputs)


class _Correct:
    """CrossModalCorrection."""

    def __init__(self, node: PythonNode) -> None:
        self._correction, self._inputs = Correction(node.attributes, node.constants), node.inputs

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        given = dict(zip(self._inputs, arrays, strict=True))
        found = {
            operand: Codes(
                given[f"{operand}_codes"].reshape(-1, given[f"{operand}_codes"].shape[-1]).astype(np.float32),
                given[f"{operand}_scale"].reshape(-1, 1),
            )
            for operand in ("main", "residual")
            if f"{operand}_codes" in given
        }
        modality = given.get("modality")
        correction = self._correction(found, None if modality is None else modality.reshape(-1))
        return correction.reshape(*given["main_codes"].shape[:-1], correction.shape[-1])


class _SwiGlu:
    """SwiGLU."""

    def __init__(self, _node: PythonNode) -> None:
        pass

    def __call__(self, x: np.ndarray) -> np.ndarray:
        gate, up = np.split(x, 2, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # e^-gate beyond float32 makes the product 0
            return gate / (1 + np.exp(-gate)) * up


OPS: dict[str, Callable[[PythonNode], Callable[..., Any]]] = {
    "SplitQLinear": _Linear,
    "ChannelSplitQuantize": _Quantize,
    "CrossModalCorrection": _Correct,
    "SwiGLU": _SwiGlu,
}
