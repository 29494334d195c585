"""Scale per input channel that moves difficulty from activations to weights: `x / s` meets `s W`.

SmoothQuant's closed form (arXiv 2211.10438), AWQ's search on the weight error (2306.00978) and MBQ's search on the
output error with each modality weighted by its gradient (2412.19509).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from splitq_edge.config import QuantConfig
from splitq_edge.quant.affine import dequantize_weight, quantize_rows, quantize_weight

FLOOR = 1e-4
ALPHAS = tuple(step / 20 for step in range(20))  # the exponents that AWQ and MBQ try
SEARCH_ROWS = 512  # rows of each modality that a search looks at


@dataclass(frozen=True)
class ScaleInputs:
    """What a scale is chosen from.

    Attributes:
        weight: [K, N] float32.
        absmax: [K] float32, largest magnitude of every input channel.
        text_rows: [T, K] float32, input rows of text tokens.
        vision_rows: [V, K] float32.
        sensitivity: mean absolute gradient of the loss at the site's output over text and over vision tokens.
    """

    weight: torch.Tensor
    absmax: torch.Tensor
    text_rows: torch.Tensor
    vision_rows: torch.Tensor
    sensitivity: tuple[float, float] = (1.0, 1.0)


def start_scale(inputs: ScaleInputs, config: QuantConfig) -> torch.Tensor:
    """Logarithm of the scale that `config.scale` names: [K] float32, geometric mean one."""
    searches: dict[str, Callable[[ScaleInputs, QuantConfig], torch.Tensor]] = {
        "none": lambda given, _: torch.zeros_like(given.absmax),
        "smoothquant": lambda given, _: smoothquant_scale(given),
        "awq": awq_scale,
        "mbq": mbq_scale,
    }
    return searches[config.scale](inputs, config)


def smoothquant_scale(inputs: ScaleInputs) -> torch.Tensor:
    """sqrt(max |x| / max |w|) per channel (alpha 0.5), as a centred logarithm [K]."""
    weight_absmax = inputs.weight.abs().amax(1)
    return _centred(0.5 * (inputs.absmax.clamp(min=FLOOR).log() - weight_absmax.clamp(min=FLOOR).log()))


def awq_scale(inputs: ScaleInputs, config: QuantConfig) -> torch.Tensor:
    """mean|x|^alpha with the alpha whose rounded weight keeps the output best; activations stay float in the search."""
    rows = torch.cat([_sample(inputs.text_rows), _sample(inputs.vision_rows)])
    target = rows @ inputs.weight

    def error(log_scale: torch.Tensor) -> float:
        weight = _rounded(inputs.weight * log_scale.exp()[:, None], config)
        return float((rows / log_scale.exp() @ weight - target).square().mean())

    return _best(_exponents(rows), error)


def mbq_scale(inputs: ScaleInputs, config: QuantConfig) -> torch.Tensor:
    """mean|x|^alpha with the smallest sum over modalities of sensitivity times mean absolute output error.

    Weights and activations are both quantized in the search, as they will be.
    """
    parts = [
        (rows, rows @ inputs.weight, strength)
        for rows, strength in zip(
            (_sample(inputs.text_rows), _sample(inputs.vision_rows)), inputs.sensitivity, strict=True
        )
        if rows.shape[0]
    ]

    def error(log_scale: torch.Tensor) -> float:
        scale = log_scale.exp()
        weight = _rounded(inputs.weight * scale[:, None], config)
        total = 0.0
        for rows, target, strength in parts:
            codes, row_scale = quantize_rows(
                rows / scale, config.activation_bits, symmetric=config.activation_symmetric
            )
            total += strength * float(((codes * row_scale) @ weight - target).abs().mean())
        return total

    return _best(_exponents(torch.cat([rows for rows, _, _ in parts])), error)


def _exponents(rows: torch.Tensor) -> list[torch.Tensor]:
    """Candidates: mean|x|^alpha, as centred logarithms."""
    magnitude = rows.abs().mean(0).clamp(min=FLOOR).log()
    return [_centred(alpha * magnitude) for alpha in ALPHAS]


def _best(candidates: list[torch.Tensor], error: Callable[[torch.Tensor], float]) -> torch.Tensor:
    return min(candidates, key=error)


def _rounded(weight: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    qweight, scale = quantize_weight(weight, config.bits, group_size=config.group_size)
    return dequantize_weight(qweight, scale, config.group_size)


def _sample(rows: torch.Tensor) -> torch.Tensor:
    return rows[:: max(1, -(-rows.shape[0] // SEARCH_ROWS))]


def _centred(log_scale: torch.Tensor) -> torch.Tensor:
    return log_scale - log_scale.mean()
