"""Differentiable quantize-dequantize: the arithmetic of `affine.py` with straight-through rounding.

Inside the range the gradient passes unchanged; outside it vanishes. Through the scale it reaches the clip factor and
the largest element, so clips and transforms can be learned.
"""

from __future__ import annotations

import torch

from splitq_edge.quant.affine import SCALE_FLOOR, code_range, expand_scale, symmetric_scale


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round half to even with gradient 1."""
    return x + (torch.round(x) - x).detach()


def fake_quantize_rows(
    x: torch.Tensor, bits: int, *, clip: torch.Tensor | float = 1.0, symmetric: bool = True
) -> torch.Tensor:
    """`quantize_rows` followed by dequantization. x: [..., K] float32, same shape back."""
    if symmetric:
        scale = symmetric_scale(x.abs().amax(-1, keepdim=True), bits, clip)
        low, high = code_range(bits)
        return round_through(x * (1.0 / scale)).clamp(low, high) * scale
    top = float((1 << bits) - 1)
    high_value = x.amax(-1, keepdim=True).clamp(min=0) * clip
    low_value = x.amin(-1, keepdim=True).clamp(max=0) * clip
    scale = ((high_value - low_value) / top).clamp(min=SCALE_FLOOR)
    inverse = 1.0 / scale
    zero = torch.round(-low_value * inverse).clamp(0, top).detach()
    return ((round_through(x * inverse) + zero).clamp(0, top) - zero) * scale


def fake_quantize_weight(
    weight: torch.Tensor, bits: int, *, group_size: int = 0, clip: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """`quantize_weight` followed by dequantization.

    Args:
        weight: [K, N] float32.
        bits: 2, 3, 4 or 8.
        group_size: 0 or input channels a scale.
        clip: clip factor, broadcastable to the scale ([N] or [groups, N]).

    Returns:
        [K, N] float32.
    """
    low, high = code_range(bits)
    if group_size == 0:
        scale = symmetric_scale(weight.abs().amax(0), bits, clip)
    else:
        absmax = torch.stack([part.abs().amax(0) for part in weight.split(group_size)])
        scale = expand_scale(symmetric_scale(absmax, bits, clip), weight.shape[0], group_size)
    return round_through(weight * (1.0 / scale)).clamp(low, high) * scale
