"""Write the folder of a static export: graphs, embedding, parity samples, manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from splitq_edge.artifacts import EXPORT_FILE, file_table, write_json
from splitq_edge.convert import QuantizedModel, effective_bits
from splitq_edge.exporters.export_folder import (
    EXTERNAL_BYTES,
    FLOAT_LIMIT_DB,
    PARITY_FILE,
    PARITY_POSITIONS,
    ExportRequest,
    describe_graph,
    embed_graph,
    manifest_of,
    parity_embed,
    parity_vision,
    store_parity,
    write_companions,
)
from splitq_edge.exporters.parts import CacheShape
from splitq_edge.exporters.qdq.insert_qdq import ACTIVATION_BITS
from splitq_edge.exporters.qdq.static_graphs import StaticGraph
from splitq_edge.exporters.qdq.static_parts import StaticDecoder, StaticSizes, float_sites
from splitq_edge.loading import LoadedModel
from splitq_edge.quant.static_ranges import Range
from splitq_edge.report.quality_report import REPORT_FILE, build_report
from splitq_edge.runtime_ops.static_calls import PREFILL, STEP, StaticCache, StaticShape, present_name, store

LIMITS_DB = {16: 25.0, 8: 10.0}  # asked of static activations of so many bits against float ones, SQNR in dB


@dataclass(frozen=True)
class StaticExport:
    """What a static export consists of.

    Attributes:
        graphs: quantized graphs by part.
        shape: their sizes.
        cache: range of every cache tensor by the decoder input's name.
        activation_bits: of the quantized sites' activations.
        ranges: how the ranges were chosen.
    """

    graphs: dict[str, StaticGraph]
    shape: StaticShape
    cache: dict[str, Range]
    activation_bits: int
    ranges: str


def write_static_folder(
    loaded: LoadedModel, quantized: QuantizedModel | None, request: ExportRequest, export: StaticExport, folder: Path
) -> None:
    """Write all files.

    Args:
        loaded: the model, inside `static_model`.
        quantized: its sites or None.
        request: sample and provenance.
        export: the graphs.
        folder: existing empty folder.
    """
    parity: dict[str, np.ndarray] = {}
    with torch.inference_mode(), float_sites(quantized):
        features = parity_vision(loaded, request, parity)
        embeds, modality = parity_embed(loaded, request, features, parity)
        _parity_decoder(loaded, export, embeds, modality, parity)
    models = {"embed_tokens": embed_graph(loaded, features), **{k: graph.model for k, graph in export.graphs.items()}}
    for name, model in models.items():
        describe_graph(model, name, quantized, request)
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx.data", size_threshold_bytes=EXTERNAL_BYTES)
    for kind, name in (("in", "pixel_values"), ("out", "image_features")):  # the graph takes one image
        key = f"vision_encoder/image/{kind}/{name}"
        parity[key] = parity[key][:1]
    np.savez(folder / PARITY_FILE, **parity)  # type: ignore[arg-type]
    write_companions(loaded, quantized, folder)
    if quantized is not None:
        bits = effective_bits(quantized.sites)
        report = build_report(quantized.config.to_dict(), bits, quantized.reports, quantized.extra_reports)
        write_json(folder / REPORT_FILE, report)
    manifest = _static_manifest(manifest_of(loaded, quantized, request, features, {}, "standard"), export)
    write_json(folder / EXPORT_FILE, {**manifest, "files": file_table(folder)})


def _static_manifest(manifest: dict[str, Any], export: StaticExport) -> dict[str, Any]:
    """The manifest of a dynamic export with the static one's parts, cache and sizes."""
    limit = LIMITS_DB[export.activation_bits]
    parts = ("vision_encoder", "embed_tokens", PREFILL, STEP)
    zero_points = {name: chosen.quantizer(ACTIVATION_BITS)[1] for name, chosen in export.cache.items()}
    shape = export.shape
    return manifest | {
        "flavour": "qdq",
        "parts": {
            part: {
                "file": f"{part}.onnx",
                "parity_limit_db": FLOAT_LIMIT_DB if part == "embed_tokens" else limit,
            }
            for part in parts
        },
        "logits_to_keep": False,
        "modality_input": shape.text_rows,
        "cache": manifest["cache"] | {"dtype": "uint16", "bits": ACTIVATION_BITS, "zero_points": zero_points},
        "static": {
            "context": shape.context,
            "chunk": shape.chunk,
            "blocked": shape.blocked,
            "text_rows": shape.text_rows,
        },
        "activations": {"bits": export.activation_bits, "ranges": export.ranges},
    }


def _parity_decoder(
    loaded: LoadedModel,
    export: StaticExport,
    embeds: torch.Tensor,
    modality: torch.Tensor,
    parity: dict[str, np.ndarray],
) -> None:
    """The last chunk of the sample without its last token, then a step with that; float activations, coded cache."""
    shape = export.shape
    decoder = StaticDecoder(loaded, StaticSizes(shape.context, shape.chunk))
    quantizers = {name: chosen.quantizer(ACTIVATION_BITS) for name, chosen in export.cache.items()}
    kv = CacheShape.of(loaded.model.config.get_text_config())
    size = (1, kv.heads, shape.context, kv.head_dim)
    cache = StaticCache({name: np.full(size, zero, np.uint16) for name, (_, zero) in quantizers.items()})
    tokens = embeds.shape[1]
    for case, begin, end in (("prompt", 0, tokens - 1), ("step", tokens - 1, tokens)):
        at = begin
        rows, mask = embeds[0, begin:end].numpy(), modality[0, begin:end].numpy()
        for call in shape.calls(rows, mask, np.ones(end, np.int64), cache, 0):
            feeds = call.feeds
            values = {
                name: (feeds[name].astype(np.float32) - np.float32(zero)) * scale
                for name, (scale, zero) in quantizers.items()
            }
            pairs = [torch.from_numpy(value) for value in values.values()]
            outputs = decoder(
                torch.from_numpy(feeds["inputs_embeds"]),
                torch.from_numpy(feeds["attention_bias"]),
                torch.from_numpy(feeds["position_ids"]),
                list(zip(pairs[::2], pairs[1::2], strict=True)),
            )
            present = {
                present_name(name): np.clip(np.rint(tensor.numpy() / scale) + zero, 0, 2**ACTIVATION_BITS - 1)
                for (name, (scale, zero)), tensor in zip(quantizers.items(), outputs[1:], strict=True)
            }
            inputs = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
            last = (f"{call.part}/{case}", inputs, {"logits": outputs[0][:, -PARITY_POSITIONS:]})
            store(cache, 0, at, present, call.used)
            at += call.used
        cache.filled = end
        store_parity(parity, *last)
