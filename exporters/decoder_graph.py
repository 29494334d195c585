"""The decoder's graph: traced, its attention and norms fused, its quantized sites filled in."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from splitq_edge.convert import QuantizedModel
from splitq_edge.exporters.nodes import Spec
from splitq_edge.exporters.onnx_export import check_axes, trace
from splitq_edge.exporters.parts import CacheShape, Decoder
from splitq_edge.exporters.passes.attach_functions import attach_functions
from splitq_edge.exporters.passes.cache_attention import cache_attention
from splitq_edge.exporters.passes.expand_sites import expand_sites
from splitq_edge.exporters.passes.fuse_attention import fuse_attention
from splitq_edge.exporters.passes.fuse_norm import fuse_norms
from splitq_edge.exporters.passes.fuse_swiglu import fuse_swiglu
from splitq_edge.exporters.passes.half_cache import halve_cache
from splitq_edge.exporters.passes.pack_attention import pack_attention
from splitq_edge.exporters.passes.skip_norm import skip_norms
from splitq_edge.exporters.passes.trim_logits import trim_logits
from splitq_edge.loading import LoadedModel
from splitq_edge.modules.split_linear import SplitLinear
from splitq_edge.quant.kv_cache import HALF_BITS, cache_tensors

logger = logging.getLogger(__name__)


def trace_decoder(
    loaded: LoadedModel, cache: CacheShape, attention: str, *, width: int, with_modality: bool
) -> ir.Model:
    """The decoder with dynamic batch, sequence and past.

    Args:
        loaded: the model; placeholders stand where its linears are quantized.
        cache: shape of the key-value cache.
        attention: "fused" or "standard", see `ExportRequest`; `splitq.attention` of the graph's metadata says "fused"
            if it is.
        width: of inputs_embeds, more than the hidden size with deepstack (`parts.Decoder`).
        with_modality: whether a site reads the modality mask.

    Raises:
        SplitQError: a size that should be dynamic came out fixed.
    """
    half = cache.bits == HALF_BITS
    cache = replace(cache, bits=0) if half else cache
    generator = torch.Generator().manual_seed(0)
    batch, sequence, past = 2, 3, 5  # 0 and 1 would be taken as constants
    positions = torch.arange(past, past + sequence).expand(batch, sequence).contiguous()
    step: dict[int, str] = {0: "batch", 1: "sequence"}
    counted = step
    if loaded.adapter.mrope:
        positions, counted = positions.repeat(3, 1, 1), {1: "batch", 2: "sequence"}
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.randn(batch, sequence, width, generator=generator),
        "attention_mask": torch.ones(batch, past + sequence, dtype=torch.long),
        "position_ids": positions,
        "past": cache.random(batch, past, generator),
    }
    kv = {0: "batch", 2: "past_sequence"}
    axes: dict[str, dict[int, str]] = {
        "inputs_embeds": step,
        "attention_mask": {0: "batch", 1: "total_sequence"},
        "position_ids": counted,
    }
    dynamic: dict[str, Any] = {**axes, "past": [(kv,) * len(cache_tensors(cache.bits))] * cache.layers}
    axes |= dict.fromkeys(cache.names("past_key_values"), kv)
    if with_modality:
        inputs["modality"] = torch.zeros(batch, sequence, dtype=torch.int8)
        dynamic["modality"] = axes["modality"] = step
    if loaded.adapter.bidirectional == "prompt":
        inputs["prompt"] = torch.zeros(batch, sequence, dtype=torch.int8)
        dynamic["prompt"] = axes["prompt"] = step
    model = trace(
        Decoder(loaded, with_modality=with_modality, kv_cache_bits=cache.bits),
        inputs,
        input_names=list(axes),
        output_names=["logits", *cache.names("present")],
        dynamic=dynamic,
    )
    check_axes(model, axes)
    trim_logits(model)
    if attention == "fused":
        _fuse(model, max_positions=int(loaded.text_config.max_position_embeddings))
    if half:
        halve_cache(model)
    RemoveUnusedNodesPass()(model)
    return model


def _fuse(model: ir.Model, *, max_positions: int) -> None:
    """Fused nodes in place of what ONNX Runtime would run as many, where the model is of a shape that has them."""
    reason = fuse_attention(model, max_positions=max_positions)
    if reason is not None:
        logger.warning("decoder: attention stays in standard ops: %s", reason)
        return
    fuse_norms(model)
    model.metadata_props["splitq.attention"] = "fused"


def finish_decoder(model: ir.Model, sites: dict[str, SplitLinear], *, packed: bool) -> None:
    """Put the quantized sites in place of their placeholders, with function bodies.

    Args:
        model: of `trace_decoder`.
        sites: quantized sites by name, the output projection's among them.
        packed: weights in kernel layout instead of int4 tensors.
    """
    if not sites:
        return
    specs: list[Spec] = [*expand_sites(model, sites, packed=packed)]
    pack_attention(model)
    attach_functions(model, [*specs, *fuse_swiglu(model), *cache_attention(model), *skip_norms(model)])
    RemoveUnusedNodesPass()(model)


def cache_shape(loaded: LoadedModel, quantized: QuantizedModel | None) -> CacheShape:
    """The exported decoder's cache."""
    bits = 0 if quantized is None else quantized.config.kv_cache_bits
    return CacheShape.of(loaded.model.config.get_text_config(), bits)
