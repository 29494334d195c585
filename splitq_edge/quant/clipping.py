"""Clip factors by grid search: the start of learning, and all there is when nothing is learned."""

from __future__ import annotations

import torch

from splitq_edge.quant.affine import SLICE, dequantize_weight, quantize_rows, quantize_weight

WEIGHT_GRID = tuple(1 - 0.05 * step for step in range(14))  # 1.0 .. 0.35
ACTIVATION_GRID = tuple(1 - 0.05 * step for step in range(17))  # 1.0 .. 0.2


def search_weight_clip(
    weight: torch.Tensor, bits: int, *, group_size: int = 0, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The factor of every weight scale with the smallest squared error.

    Args:
        weight: [K, N] float32.
        bits: 2, 3, 4, 6 or 8.
        group_size: 0 or input channels a scale.
        importance: [K] float32, weight of an input channel's error (its mean squared activation), None for ones.

    Returns:
        Shape of the scale: [N] or [ceil(K / group_size), N] float32.
    """
    columns = max(1, SLICE // max(1, weight.shape[0]))
    if weight.shape[1] > columns:  # output channels know nothing of each other
        parts = [
            search_weight_clip(part, bits, group_size=group_size, importance=importance)
            for part in weight.split(columns, 1)
        ]
        return torch.cat(parts, -1)
    best_error: torch.Tensor | None = None
    best = torch.empty(0)
    for factor in WEIGHT_GRID:
        qweight, scale = quantize_weight(weight, bits, group_size=group_size, clip=factor)
        error = (dequantize_weight(qweight, scale, group_size) - weight).square()
        if importance is not None:
            error = error * importance[:, None]
        parts = [part.sum(0) for part in error.split(group_size or error.shape[0])]
        error = torch.stack(parts) if group_size else parts[0]
        if best_error is None:
            best_error, best = error, torch.full_like(error, factor)
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, torch.full_like(best, factor), best)
    return best


def search_activation_clip(rows: torch.Tensor, bits: int, *, symmetric: bool, largest: float = 1.0) -> float:
    """The one factor with the smallest squared error relative to each row's energy.

    Args:
        rows: [T, K] float32, transformed calibration rows of one channel group.
        bits: 2, 3, 4, 6 or 8.
        symmetric: of the quantizer.
        largest: factors above it are not tried.
    """
    if rows.shape[0] == 0:
        return largest
    weight = 1 / rows.square().sum(-1, keepdim=True).clamp(min=1e-12)
    best, best_error = largest, float("inf")
    for factor in (largest, *(f for f in ACTIVATION_GRID if f < largest)):
        codes, scale = quantize_rows(rows, bits, clip=factor, symmetric=symmetric)
        error = float(((codes * scale - rows).square() * weight).sum())
        if error < best_error:
            best, best_error = factor, error
    return best
