"""What a calibration will cost and give, from shapes alone: no weight is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from splitq_edge.calibration.extra_sites import check_extras, extra_config, extra_sites, wanted_extras
from splitq_edge.config import QuantConfig
from splitq_edge.correction.low_rank import rank_of
from splitq_edge.loading import LoadedModel, tied
from splitq_edge.modules.quantized_embedding import SHARED_BITS
from splitq_edge.quant.transforms import transform_shape
from splitq_edge.splitting.plan import outlier_width

# Passes over a block's weight that one learning step makes (fake quantization, transform, CWS, and their gradients).
WEIGHT_PASSES = 45
GATE_PASSES = 50  # of `settle_gates`, about: each gate against its start, those that lose against more places
PROBE = 768  # side of the square product that measures the processor


@dataclass(frozen=True)
class SiteShape:
    """K input and N output channels of a site."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Estimate:
    """What to expect.

    Attributes:
        effective_bits: stored bits a weight of the quantized linears, as `convert.effective_bits` will report.
        decoder_bytes: of the language blocks' quantized linears: codes, scales, transforms, factors.
        extra_bytes: the same by "vision", "lm_head" and "embedding", only what the recipe quantizes.
        float_bytes: of everything that stays float32 (norms, what the recipe does not quantize).
        block_seconds: calibration of one block on this machine.
        blocks: number of blocks.
        tokens: tokens of the calibration samples.
    """

    effective_bits: float
    decoder_bytes: int
    extra_bytes: dict[str, int]
    float_bytes: int
    block_seconds: float
    blocks: int
    tokens: int


def estimate(loaded: LoadedModel, config: QuantConfig, *, tokens: int, samples: int, packed: bool) -> Estimate:
    """Estimate a run.

    Args:
        loaded: may be lazy; only shapes are read.
        config: the recipe.
        tokens: tokens of all samples.
        samples: number of samples.
        packed: flavour; the portable one stores 2- and 3-bit codes in 4 bits, 6-bit ones in 8.

    Raises:
        SplitQError: a width cannot be planned, or the recipe quantizes what the model does not have.
    """
    check_extras(loaded, config)
    shapes = site_shapes(loaded)
    stored, size = 0, 0
    for shape in shapes:
        bits, extra = _site_storage(shape, config, packed=packed)
        stored += bits
        size += extra
    weights = sum(shape.inputs * shape.outputs for shape in shapes)
    everything = sum(parameter.numel() for parameter in loaded.model.parameters())
    blocks = loaded.block_count
    extra_bytes: dict[str, int] = {}
    for name in wanted_extras(config):
        extra_shapes = [_shape(loaded.model, site.linears) for site in extra_sites(loaded, name)]
        extra_bytes[name] = sum(
            _site_storage(shape, extra_config(config, name, shape.inputs), packed=packed)[1] for shape in extra_shapes
        )
        if name != "lm_head" or not tied(loaded):  # a tied weight stays as embedding
            everything -= sum(shape.inputs * shape.outputs for shape in extra_shapes)
    if config.embedding != "none":
        rows, hidden = loaded.model.get_input_embeddings().weight.shape
        everything -= rows * hidden
        bits = int(config.embedding[1:])
        shared = tied(loaded) and config.lm_head.startswith(tuple(f"W{head}" for head in SHARED_BITS[bits]))
        shared = shared and (packed or bits == 8)  # of integers of 4 bits, other files hold a copy
        extra_bytes["embedding"] = 0 if shared else rows * (hidden * bits // 8 + 4)
    return Estimate(
        effective_bits=stored / weights,
        decoder_bytes=size * blocks,
        extra_bytes=extra_bytes,
        float_bytes=4 * (everything - weights * blocks),
        block_seconds=_block_seconds(weights, config, tokens, samples),
        blocks=blocks,
        tokens=tokens,
    )


def site_shapes(loaded: LoadedModel) -> list[SiteShape]:
    """Shapes of the sites of one block."""
    block = loaded.language_blocks()[0]
    return [_shape(block, site.linears) for site in loaded.adapter.language_block]


def _shape(root: nn.Module, paths: Sequence[str]) -> SiteShape:
    linears = [root.get_submodule(path) for path in paths]
    widths = [linear.out_features for linear in linears if isinstance(linear, nn.Linear)]
    first = linears[0]
    assert isinstance(first, nn.Linear)
    return SiteShape(first.in_features, sum(widths))


def _site_storage(shape: SiteShape, config: QuantConfig, *, packed: bool) -> tuple[int, int]:
    """Stored bits of codes and factors, and bytes of all the site's tensors."""
    k, n = shape.inputs, shape.outputs
    outliers = outlier_width(k, config.split.ratio, balanced=config.transform != "identity")
    main = k - outliers
    full = min(main, n)
    rank = max(rank_of(config.correction.cws_ratio, full), rank_of(config.correction.mac_ratio, full))
    factors = rank * (main + n)
    bits = main * n * config.bits + outliers * n * config.split.bits + factors * config.correction.bits
    width = {2: 4, 3: 4, 6: 8}.get(config.bits, config.bits) if not packed else config.bits
    codes = (main * n * width + outliers * n * config.split.bits + factors * config.correction.bits) // 8
    groups = [main, outliers // 2, outliers - outliers // 2] if outliers else [main]
    blocks = -(-main // config.group_size) if config.group_size else 1
    floats = n * (blocks + len(groups) - 1) + 2 * k + 4 * rank
    if config.transform != "identity":
        shapes = (transform_shape(width, config.transform_width) for width in groups)
        floats += sum(blocks * a * a + b * b for blocks, a, b in shapes)
    return bits, codes + 4 * floats


def _block_seconds(weights: int, config: QuantConfig, tokens: int, samples: int) -> float:
    """Products by the measured rate of a matrix product, passes over weights by that of an addition."""
    epochs = config.learning.epochs
    steps = epochs * -(-samples // config.learning.batch)
    passes = 3 + 3 * epochs + {"nearest": 0, "gptq": 1, "gptaq": 6}[config.rounding]  # forward, and twice that backward
    if epochs and config.learning.balance != "none":
        passes += 4  # forward, and once more to go back
    if epochs and (config.correction.cws_ratio or config.correction.mac_ratio):
        passes += GATE_PASSES
    a = torch.ones(PROBE, PROBE)
    product = _seconds(lambda: a @ a) / (2 * PROBE**3)
    addition = _seconds(lambda: a + a) / PROBE**2
    return 2.0 * weights * tokens * passes * product + weights * WEIGHT_PASSES * (steps + 2) * addition


def _seconds(action: object) -> float:
    assert callable(action)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)
