"""The flavour `qdq`: static graphs, their activation ranges measured on the calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from splitq_edge.config import QuantConfig
from splitq_edge.convert import QuantizedModel
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.export_folder import ExportRequest
from splitq_edge.exporters.layouts.layout import Flat, Layout
from splitq_edge.exporters.layouts.registry import layout_named
from splitq_edge.exporters.parts import CacheShape, EmbedTokens
from splitq_edge.exporters.qdq.static_graphs import (
    StaticGraph,
    decoder_graph,
    quantize,
    reads_text_rows,
    vision_graph,
)
from splitq_edge.exporters.qdq.static_parts import BLOCKED, StaticSizes, static_model
from splitq_edge.exporters.qdq.target_check import check_target
from splitq_edge.exporters.qdq.write_folder import StaticExport, write_static_folder
from splitq_edge.loading import LoadedModel
from splitq_edge.quant.static_ranges import Range
from splitq_edge.runtime_ops.observe import Observer
from splitq_edge.runtime_ops.static_calls import PREFILL, STEP, StaticCache, StaticShape, store
from splitq_edge.targets import Target

STATIC_PIXELS = ("images", "tiles")
RANGE_SAMPLES = 64  # of the calibration samples that measure ranges
STEP_TOKENS = 4  # last tokens of a sample that the one-token graph sees


@dataclass(frozen=True)
class StaticOptions:
    """Options of the flavour `qdq`, as typed.

    Attributes:
        context: tokens that the cache holds.
        chunk: tokens of one prefill call.
        ranges: how ranges are chosen, see `choose_range`.
        activation_bits: 16 or 8, of the quantized sites' activations.
        target: an NPU whose compiler must take every node.
    """

    context: int = 256
    chunk: int = 64
    ranges: str = "minmax"
    activation_bits: int = 16
    target: str | None = None


def write_static(
    loaded: LoadedModel,
    quantized: QuantizedModel | None,
    request: ExportRequest,
    samples: Sequence[dict[str, torch.Tensor]],
    options: StaticOptions,
    folder: Path,
) -> None:
    """Write all files of a static export.

    Args:
        loaded: the model; already changed in place when `quantized` is given.
        quantized: its quantized sites, None for a float model, whose linears get 8-bit weights.
        request: sample and provenance.
        samples: model inputs that measure the ranges.
        options: sizes, ranges, target.
        folder: existing empty folder.

    Raises:
        SplitQError: a graph cannot be made static, or the target rejects a node.
    """
    sizes = StaticSizes(options.context, options.chunk)
    bits = options.activation_bits
    shape = StaticShape(sizes.context, sizes.chunk, BLOCKED, reads_text_rows(quantized, bits))
    pixels = _images(loaded, request.sample)[:1]
    with static_model(loaded, sizes):
        graphs = {"vision_encoder": vision_graph(loaded, quantized, pixels, bits)}
        for part, tokens in ((PREFILL, sizes.chunk), (STEP, 1)):
            graphs[part] = decoder_graph(loaded, quantized, sizes, tokens=tokens, activation_bits=bits)
        ranges = _measure(loaded, graphs, shape, samples[:RANGE_SAMPLES], options)
        cache = quantize(graphs, ranges)
        if options.target is not None:
            check_target(graphs, Target.parse(options.target))
        export = StaticExport(graphs, shape, cache, bits, options.ranges)
        write_static_folder(loaded, quantized, request, export, folder)


def static_layout(loaded: LoadedModel, config: QuantConfig | None, wanted: str | None) -> Layout:
    """The layout of a static export; called before long work.

    Raises:
        SplitQError: the model, the recipe or the layout that was asked for does not fit the flavour.
    """
    adapter = loaded.adapter
    if adapter.pixel_layout not in STATIC_PIXELS or adapter.bidirectional or adapter.mrope or adapter.deepstack:
        raise SplitQError(
            f"--flavour qdq: expected pictures or tiles of one size, causal attention and positions of one axis, "
            f"got model type '{adapter.model_type}'; it has no static graphs yet"
        )
    if config is not None and config.kv_cache_bits:
        raise SplitQError(
            "--flavour qdq: expected a recipe with kv_cache_bits 0, because its cache has 16 bits, "
            f"got {config.kv_cache_bits}; change the recipe"
        )
    if wanted not in (None, Flat.name):
        raise SplitQError(f"--flavour qdq: expected --layout {Flat.name}, got {wanted}; leave it out")
    return layout_named(Flat.name)


def _images(loaded: LoadedModel, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """[images or tiles, 3, height, width] float32; none of a chat without a picture."""
    pictures = loaded.image_layout.pictures(sample)
    return torch.from_numpy(pictures["pixel_values"]) if pictures else torch.zeros(0, 3, 1, 1)


def _measure(
    loaded: LoadedModel,
    graphs: dict[str, StaticGraph],
    shape: StaticShape,
    samples: Sequence[dict[str, torch.Tensor]],
    options: StaticOptions,
) -> dict[str, dict[str, Range]]:
    """Ranges by part and value name: the float graphs run over the samples, once for extents, once for histograms."""
    observers = {part: Observer(graph.probe(), graph.names) for part, graph in graphs.items()}
    passes = [Observer.extend] if options.ranges == "minmax" else [Observer.extend, Observer.count]
    for note in passes:
        for sample in samples:
            _run_sample(loaded, observers, shape, sample, note)
    return {part: observer.ranges(options.ranges, options.activation_bits) for part, observer in observers.items()}


def _run_sample(
    loaded: LoadedModel,
    observers: dict[str, Observer],
    shape: StaticShape,
    sample: dict[str, torch.Tensor],
    note: Callable[[Observer, dict[str, np.ndarray]], None],
) -> None:
    """One conversation through vision encoder, chunks and, for its last tokens, single steps."""

    def run(part: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = observers[part].run(feeds)
        note(observers[part], {**feeds, **outputs})
        return outputs

    images = (image[None].numpy() for image in _images(loaded, sample))
    features = [run("vision_encoder", {"pixel_values": image})["image_features"] for image in images]
    text = loaded.model.config.get_text_config()
    with torch.inference_mode():
        embed = EmbedTokens(loaded.model.get_input_embeddings(), int(loaded.image_token_id or 0))
        rows = torch.from_numpy(np.concatenate(features)) if features else torch.zeros(0, 1, text.hidden_size)
        embeds, modality = (part[0].numpy() for part in embed(sample["input_ids"], rows))
    kv = CacheShape.of(text)
    size = (1, kv.heads, shape.context, kv.head_dim)
    cache = StaticCache({name: np.zeros(size, np.float32) for name in kv.names("past_key_values")})
    prefill = max(1, len(embeds) - STEP_TOKENS)
    for begin, end in ((0, prefill), *((at, at + 1) for at in range(prefill, len(embeds)))):
        at = begin
        for call in shape.calls(embeds[begin:end], modality[begin:end], np.ones(end, np.int64), cache, 0):
            store(cache, 0, at, run(call.part, call.feeds), call.used)
            at += call.used
        cache.filled = end
