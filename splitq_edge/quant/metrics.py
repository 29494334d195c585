"""Measures of a quantized tensor against its float self."""

from __future__ import annotations

import torch

MAX_DB = 200.0  # of an exact result


def sqnr_db(target: torch.Tensor, got: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio 10 log10(sum target^2 / sum (got - target)^2) in dB, at most `MAX_DB`."""
    return decibel(*energies(target, got))


def energies(target: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """Sum target^2 and sum (got - target)^2."""
    return float(target.double().square().sum()), float((got.double() - target.double()).square().sum())


def decibel(signal: float, noise: float) -> float:
    """Ratio of two energies, `sqnr_db`'s."""
    if noise == 0 or signal == 0:
        return MAX_DB if noise == 0 else -MAX_DB
    return min(10 * float(torch.log10(torch.tensor(signal / noise))), MAX_DB)
