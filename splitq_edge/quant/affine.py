"""Uniform quantization to integers (paper eq. 1): pure functions on tensors, the arithmetic of docs/ops.md."""

from __future__ import annotations

import torch

SLICE = 1 << 24  # elements of a weight that searches and GPTQ hold copies of at a time

SCALE_FLOOR = 1e-12  # keeps the inverse scale of an all-zero row finite


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of a bit width."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def symmetric_scale(absmax: torch.Tensor, bits: int, clip: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Scale that maps `absmax * clip` to the largest code.

    Args:
        absmax: any shape, float32, maximum magnitudes.
        bits: 2, 3, 4, 6 or 8.
        clip: clip factor in (0, 1].

    Returns:
        float32 of absmax's shape, at least `SCALE_FLOOR`.
    """
    return (absmax * clip / ((1 << (bits - 1)) - 1)).clamp(min=SCALE_FLOOR)


def quantize_symmetric(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes round(x * (1 / scale)), clamped to the signed range.

    Args:
        x: float32.
        scale: float32, broadcastable to x.
        bits: 2, 3, 4, 6 or 8.

    Returns:
        Integer-valued float32 of x's shape (float, so that it can be multiplied without conversion).
    """
    low, high = code_range(bits)
    return torch.round(x * (1.0 / scale)).clamp(low, high)


def quantize_rows(
    x: torch.Tensor, bits: int, *, clip: float | torch.Tensor = 1.0, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic per-token quantization (granularity PerToken).

    Args:
        x: [..., K] float32.
        bits: 2, 3, 4, 6 or 8.
        clip: clip factor in (0, 1].
        symmetric: False shifts the range by an integer zero point, which is already subtracted from the codes returned
            (below 8 bits only, so that they fit int8).

    Returns:
        Codes [..., K], integer-valued float32, and scale [..., 1] float32; the value is `codes * scale`.
    """
    if symmetric:
        scale = symmetric_scale(x.abs().amax(-1, keepdim=True), bits, clip)
        return quantize_symmetric(x, scale, bits), scale
    top = float((1 << bits) - 1)
    high = x.amax(-1, keepdim=True).clamp(min=0) * clip
    low = x.amin(-1, keepdim=True).clamp(max=0) * clip
    scale = ((high - low) / top).clamp(min=SCALE_FLOOR)
    inverse = 1.0 / scale
    zero = torch.round(-low * inverse).clamp(0, top)
    return (torch.round(x * inverse) + zero).clamp(0, top) - zero, scale


def quantize_weight(
    weight: torch.Tensor, bits: int, *, group_size: int = 0, clip: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric weight quantization, per output channel or per group of input channels.

    Args:
        weight: [K, N] float32 (K input channels).
        bits: 2, 3, 4, 6 or 8.
        group_size: 0 for one scale an output channel; else consecutive input channels a scale, the last group may be
            shorter.
        clip: clip factor in (0, 1], scalar or broadcastable to the scale.

    Returns:
        qweight [K, N] int8 and scale [N] or [ceil(K / group_size), N] float32.
    """
    scale = weight_scale(weight, bits, group_size=group_size, clip=clip)
    codes = quantize_symmetric(weight, expand_scale(scale, weight.shape[0], group_size), bits)
    return codes.to(torch.int8), scale


def weight_scale(
    weight: torch.Tensor, bits: int, *, group_size: int = 0, clip: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """The scale of `quantize_weight`, [N] or [ceil(K / group_size), N] float32."""
    if group_size == 0:
        return symmetric_scale(weight.abs().amax(0), bits, clip)
    absmax = torch.stack([part.abs().amax(0) for part in weight.split(group_size)])
    return symmetric_scale(absmax, bits, clip)


def expand_scale(scale: torch.Tensor, rows: int, group_size: int) -> torch.Tensor:
    """Scale of every weight element: [N] stays, [groups, N] becomes [rows, N]."""
    if scale.dim() == 1:
        return scale
    return scale.repeat_interleave(group_size, 0)[:rows]


def dequantize_weight(qweight: torch.Tensor, scale: torch.Tensor, group_size: int = 0) -> torch.Tensor:
    """qweight [K, N] int8 and its scale back to float32 [K, N]."""
    return qweight.float() * expand_scale(scale, qweight.shape[0], group_size)
