"""The static graphs of a model: float ones to measure ranges with, then quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from splitq_edge.convert import QuantizedModel
from splitq_edge.exporters.onnx_export import trace
from splitq_edge.exporters.parts import CacheShape, vision_encoder
from splitq_edge.exporters.qdq.insert_qdq import CACHE_INPUT, cache_ranges, insert_qdq, observed
from splitq_edge.exporters.qdq.lower_sites import lower_sites
from splitq_edge.exporters.qdq.npu_forms import npu_forms
from splitq_edge.exporters.qdq.static_parts import StaticDecoder, StaticSizes, causal_bias
from splitq_edge.exporters.symbolic import placeholders, reads_modality
from splitq_edge.loading import LoadedModel
from splitq_edge.modules.split_linear import SplitLinear
from splitq_edge.quant.static_ranges import Range


@dataclass
class StaticGraph:
    """One static graph, float until `quantize`.

    Attributes:
        model: the graph; every value that is measured has a name.
        names: values whose ranges are wanted.
    """

    model: ir.Model
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = observed(self.model)

    def probe(self) -> bytes:
        """The graph serialized, all observed values as outputs behind its own."""
        probe = ir.from_proto(ir.to_proto(self.model))
        known = {value.name: value for node in probe.graph for value in node.outputs}
        present = {value.name for value in probe.graph.outputs}
        probe.graph.outputs.extend(known[name] for name in self.names if name in known and name not in present)
        return bytes(ir.to_proto(probe).SerializeToString())


def reads_text_rows(quantized: QuantizedModel | None, activation_bits: int) -> bool:
    """Whether the static decoder takes `text_rows`: MAC on text rows works on 8-bit activations only."""
    return activation_bits == 8 and quantized is not None and reads_modality(quantized)


def vision_graph(
    loaded: LoadedModel, quantized: QuantizedModel | None, pixels: torch.Tensor, activation_bits: int
) -> StaticGraph:
    """The vision encoder for one image or tile; pixels [1, 3, height, width] float32."""
    with placeholders(quantized) if quantized is not None else nullcontext():
        model = trace(
            vision_encoder(loaded),
            {"pixel_values": pixels},
            input_names=["pixel_values"],
            output_names=["image_features"],
            dynamic={"pixel_values": None},
        )
    sites = {} if quantized is None else quantized.extras.get("vision", {})
    return _finish(model, sites, activation_bits)


def decoder_graph(
    loaded: LoadedModel,
    quantized: QuantizedModel | None,
    sizes: StaticSizes,
    *,
    tokens: int,
    activation_bits: int,
) -> StaticGraph:
    """The decoder for calls of `tokens` tokens; see `StaticDecoder`. The model is inside `static_model`."""
    config = loaded.model.config.get_text_config()
    cache = CacheShape.of(config)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.randn(1, tokens, config.hidden_size, generator=torch.Generator().manual_seed(0)),
        "attention_bias": causal_bias(sizes.context // 2, tokens, sizes.context),
        "position_ids": torch.arange(tokens, dtype=torch.int32)[None],
        "past": [tuple(layer) for layer in cache.random(1, sizes.context, torch.Generator().manual_seed(0))],
    }
    names = ["inputs_embeds", "attention_bias", "position_ids", *cache.names("past_key_values")]
    if reads_text_rows(quantized, activation_bits):
        inputs["text_rows"] = torch.ones(1, tokens, 1)
        names.append("text_rows")
    with placeholders(quantized) if quantized is not None else nullcontext():
        model = trace(
            StaticDecoder(loaded, sizes),
            inputs,
            input_names=names,
            output_names=["logits", *cache.names("present")],
            dynamic={name: None for name in inputs} | {"past": [(None, None)] * cache.layers},
        )
    sites = {} if quantized is None else quantized.sites | quantized.extras.get("lm_head", {})
    return _finish(model, sites, activation_bits)


def _finish(model: ir.Model, sites: dict[str, SplitLinear], activation_bits: int) -> StaticGraph:
    npu_forms(model)
    lower_sites(model, sites, activation_bits=activation_bits)
    return StaticGraph(model)


def quantize(graphs: Mapping[str, StaticGraph], ranges: Mapping[str, dict[str, Range]]) -> dict[str, Range]:
    """Insert the quantizers in place; the decoder's graphs share those of the cache, and all if they are built alike.

    Args:
        graphs: by part.
        ranges: by part and value name.

    Returns:
        The range of every cache tensor by the decoder input's name.
    """
    shared: dict[str, Range] = {}
    decoders = [part for part, graph in graphs.items() if _cache_inputs(graph.model)]
    alike = len({tuple(_structure(graphs[part].model)) for part in decoders}) == 1
    for part in decoders:
        model = graphs[part].model
        # Graphs that differ in the number of tokens alone agree on every activation: one token sees the prompt's range.
        found = (
            {name: ranges[part][name] for name in graphs[part].names} if alike else cache_ranges(model, ranges[part])
        )
        for name, value in found.items():
            shared[name] = value if name not in shared else shared[name].union(value)
    cache = cache_ranges(graphs[decoders[0]].model, ranges[decoders[0]] | shared)
    for part, graph in graphs.items():
        own = {name: value for name, value in ranges[part].items() if not name.startswith(CACHE_INPUT)}
        insert_qdq(graph.model, own | (shared | cache if part in decoders else {}))
    return cache


def _cache_inputs(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs if str(value.name).startswith(CACHE_INPUT)]


def _structure(model: ir.Model) -> Iterator[tuple[str, ...]]:
    """Ops and names of all nodes."""
    for node in model.graph:
        values = (*node.inputs, *node.outputs)
        yield (node.op_type, *(str(value.name) for value in values if value is not None))
