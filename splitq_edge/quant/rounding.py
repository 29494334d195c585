"""Weight rounding with error feedback (GPTQ): the error of a row is pushed into the rows not yet rounded."""

from __future__ import annotations

import logging

import torch

from splitq_edge.quant.affine import SLICE, code_range

logger = logging.getLogger(__name__)

BLOCK = 64  # rows whose feedback is applied at once to the rows behind them
DAMPING = 0.01  # share of the mean diagonal added to it
OUTPUT_DAMPING = 0.3  # the same where weights move towards outputs: as many unknowns as weights
FEW_ROWS = 0.25  # input channels a row from which on it grows with them: few rows would be learned by heart


def gptq_codes(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    bits: torch.Tensor,
    *,
    damping: float = DAMPING,
    name: str = "weight",
) -> torch.Tensor:
    """Codes that minimize |A (W - Q)|^2 greedily, input channel after input channel (GPTQ, arXiv 2210.17323).

    Args:
        weight: [K, N] float32, what the quantized activations A meet.
        hessian: [K, K] float32, A^T A.
        scale: [K, N] float32, scale of every element.
        bits: [K] integer, bit width of every input channel.
        damping: see `DAMPING`.
        name: of the weight, for messages.

    Returns:
        [K, N] int8.
    """
    feedback = inverse_factor(hessian, damping, name)
    columns = max(1, SLICE // max(1, weight.shape[0]))
    parts = zip(weight.split(columns, 1), scale.split(columns, 1), strict=True)
    return torch.cat([_codes_of_columns(part, feedback, part_scale, bits) for part, part_scale in parts], 1)


def weight_towards(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, rows: int) -> torch.Tensor:
    """The weight that minimizes |E - A D|^2 + damping * mean diagonal * |D|^2 as `weight + D`: ridge regression.

    GPTQ rounds as if the activations were what the float layer received. They are not: they are rounded, and what made
    them was rounded, too. Part of that error is a linear function of them, which the weight can take back before it is
    rounded itself (the idea of GPTAQ, arXiv 2504.02692, here in closed form).

    Args:
        weight: [K, N] float32.
        hessian: [K, K] float32, A^T A.
        cross: [K, N] float32, A^T E with the error E of the output.
        rows: of A; the damping follows them, see `output_damping`.

    Returns:
        [K, N] float32; the weight itself where nothing was seen.
    """
    mean = float(hessian.diagonal().mean())
    if mean == 0:
        return weight
    damped = hessian.double()
    damped.diagonal().add_(output_damping(weight.shape[0], rows) * mean)
    return weight + torch.cholesky_solve(cross.double(), torch.linalg.cholesky(damped)).float()


def output_damping(channels: int, rows: int) -> float:
    """`OUTPUT_DAMPING`, more of it where there are more than `FEW_ROWS` input channels for a row."""
    return OUTPUT_DAMPING * max(1.0, channels / max(rows, 1) / FEW_ROWS)


def _codes_of_columns(
    weight: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, bits: torch.Tensor
) -> torch.Tensor:
    """Of some output channels, which know nothing of each other."""
    low, high = _ranges(bits, weight.device)
    rest = weight.clone()
    codes = torch.empty_like(weight)
    for begin in range(0, weight.shape[0], BLOCK):
        end = min(begin + BLOCK, weight.shape[0])
        errors = torch.empty_like(rest[begin:end])
        for k in range(begin, end):
            row_scale = scale[k]
            code = torch.round(rest[k] * (1.0 / row_scale)).clamp_(low[k], high[k])
            codes[k] = code
            error = (rest[k] - code * row_scale) / feedback[k, k]
            errors[k - begin] = error
            if k + 1 < end:
                rest[k + 1 : end] -= feedback[k, k + 1 : end, None] * error
        if end < weight.shape[0]:
            rest[end:] -= feedback[begin:end, end:].T @ errors
    return codes.to(torch.int8)


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING, name: str = "weight") -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix, [K, K] float32; the damping grows until it exists.

    Where it never does the identity stands for it, which is rounding to nearest, and a warning says so.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # nothing was seen: no feedback
        return torch.eye(hessian.shape[0], device=hessian.device)
    for strength in (damping, 10 * damping, 100 * damping):
        damped = hessian.clone()
        damped.diagonal().add_(strength * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper
    logger.warning("%s: GPTQ's matrix is not positive definite, however damped; rounded to nearest", name)
    return torch.eye(hessian.shape[0], device=hessian.device)


def _ranges(bits: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = [code_range(int(b)) for b in bits.tolist()]
    low, high = torch.tensor(bounds, dtype=torch.float32, device=device).unbind(1)
    return low, high
