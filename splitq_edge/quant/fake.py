"""Differentiable quantize-dequantize: the arithmetic of `affine.py` with straight-through rounding.

Inside the range the gradient passes unchanged; outside it vanishes. Through the scale it reaches the clip factor and
the largest element, so clips and transforms can be learned.
"""

from __future__ import annotations

from typing import Any

import torch

from splitq_edge.quant.affine import SCALE_FLOOR, code_range, expand_scale, symmetric_scale, weight_scale


class _FakeQuantize(torch.autograd.Function):
    """round(x / scale) clamped to [low, high], times scale; written out because autograd would keep five tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: float | torch.Tensor, high: float | torch.Tensor
    ) -> torch.Tensor:
        ratio = x * (1.0 / scale)
        ctx.save_for_backward(ratio, scale, *(v for v in (low, high) if isinstance(v, torch.Tensor)))
        ctx.bounds = None if isinstance(low, torch.Tensor) else (low, high)
        return torch.round(ratio).clamp_(low, high).mul_(scale)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        ratio, scale, *tensors = ctx.saved_tensors
        low, high = ctx.bounds or tensors
        codes = torch.round(ratio)
        inside = (codes >= low) & (codes <= high)
        passed = gradient * inside
        to_scale: torch.Tensor | None = None
        if ctx.needs_input_grad[1]:
            # d/d scale = code - ratio inside the range, the clamped code outside
            slope = codes.clamp_(low, high).sub_(ratio * inside)
            to_scale = (gradient * slope).sum_to_size(scale.shape)
        return passed, to_scale, None, None


def fake_quantize_rows(
    x: torch.Tensor, bits: int, *, clip: torch.Tensor | float = 1.0, symmetric: bool = True
) -> torch.Tensor:
    """`quantize_rows` followed by dequantization. x: [..., K] float32, same shape back."""
    if symmetric:
        scale = symmetric_scale(x.abs().amax(-1, keepdim=True), bits, clip)
        return _FakeQuantize.apply(x, scale, *code_range(bits))
    top = float((1 << bits) - 1)
    high_value = x.amax(-1, keepdim=True).clamp(min=0) * clip
    low_value = x.amin(-1, keepdim=True).clamp(max=0) * clip
    scale = ((high_value - low_value) / top).clamp(min=SCALE_FLOOR)
    zero = torch.round(-low_value * (1.0 / scale)).clamp(0, top).detach()
    return _FakeQuantize.apply(x, scale, -zero, top - zero)


def fake_quantize_weight(
    weight: torch.Tensor, bits: int, *, group_size: int = 0, clip: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """`quantize_weight` followed by dequantization.

    Args:
        weight: [K, N] float32.
        bits: 2, 3, 4, 6 or 8.
        group_size: 0 or input channels a scale.
        clip: clip factor, broadcastable to the scale ([N] or [groups, N]).

    Returns:
        [K, N] float32.
    """
    scale = weight_scale(weight, bits, group_size=group_size, clip=clip)
    return _FakeQuantize.apply(weight, expand_scale(scale, weight.shape[0], group_size), *code_range(bits))
