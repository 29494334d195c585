"""The layout of the hub's onnx-community, which transformers.js loads in Node and in browsers.

transformers.js puts the image rows in the places of the image tokens itself, so `embed_tokens` is the bare table, and
prepares pictures itself, with settings that it reads from other files than transformers does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.artifacts import write_json
from splitq_edge.config import QuantConfig
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.layouts.layout import ExportParts, check_cache
from splitq_edge.exporters.layouts.modality_channel import (
    add_modality_channel,
    append_channel,
    fixed,
    with_channel,
)
from splitq_edge.exporters.onnx_export import check_axes, trace
from splitq_edge.exporters.packed_embedding import stored_embedding
from splitq_edge.exporters.passes.walk import initializer

SESSIONS = {  # names of transformers.js
    "vision_encoder": "vision_encoder",
    "embed_tokens": "embed_tokens",
    "decoder": "decoder_model_merged",
}
SUFFIXES = {"fp32": "", "q4": "_q4", "int8": "_int8"}  # behind a session's name, by the dtype that is asked for


class OnnxCommunity:
    """See the module."""

    name = "onnx-community"
    data_suffix = "_data"
    attention = "standard"

    def check(self, adapter: ModelAdapter, config: QuantConfig | None, *, flavour: str, attention: str) -> None:
        """See `Layout.check`."""
        if not adapter.transformers_js:
            raise SplitQError(
                "--layout onnx-community: expected a model type that transformers.js prepares pictures for as the "
                f"exported graphs take them, got '{adapter.model_type}'; use --layout flat"
            )
        if config is not None and flavour != "portable":
            raise SplitQError(
                "--layout onnx-community: expected --flavour portable, because transformers.js cannot load the native "
                f"kernels, got {flavour}"
            )
        check_cache(self.name, config, (0,))
        if attention != self.attention:
            raise SplitQError(
                "--layout onnx-community: expected --attention standard, because the onnxruntime of transformers.js "
                f"knows no fused attention of this form, got {attention}"
            )

    def file(self, part: str, manifest: dict[str, Any]) -> str:
        """See `Layout.file`."""
        return f"onnx/{SESSIONS[part]}{SUFFIXES[dtype_of(part, manifest)]}.onnx"

    def adapt(self, parts: ExportParts) -> None:
        """See `Layout.adapt`."""
        masked = parts.manifest["modality_input"]
        add_modality_channel(parts)
        _bare_embedding(parts, with_modality=masked)
        if parts.loaded.adapter.pixel_layout == "tiles":
            _tiles_of_chats(parts)
        for model in parts.graphs.values():
            _rename_axis(model, "batch", "batch_size")

    def write_companions(self, parts: ExportParts, folder: Path) -> None:
        """See `Layout.write_companions`."""
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        dtypes = {SESSIONS[part]: dtype_of(part, parts.manifest) for part in SESSIONS}
        files = {SESSIONS[part]: Path(entry["file"]) for part, entry in parts.manifest["parts"].items()}
        external = {session: 1 for session, file in files.items() if (folder / f"{file}{self.data_suffix}").is_file()}
        write_json(path, {**config, "transformers.js_config": {"dtype": dtypes, "use_external_data_format": external}})
        _write_processor(parts.loaded.processor, folder)
        _write_tokenizer(parts.loaded.processor, folder)
        path = folder / "generation_config.json"
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        # As our own loop: a placeholder without an image has no meaning.
        write_json(path, {**generation, "suppress_tokens": [parts.manifest["image_token_id"]]})


def dtype_of(part: str, manifest: dict[str, Any]) -> str:
    """What transformers.js calls the storage of a part's weights; 3 and 2 bits are stored as 4."""
    schemes = {"decoder": manifest["scheme"], "vision_encoder": manifest["vision"]["scheme"], "embed_tokens": "none"}
    if schemes[part] == "none":
        return "fp32"
    recipe = manifest["recipe"]
    bits = recipe["bits"] if part == "decoder" else int(schemes[part][1])
    return "int8" if bits > 4 else "q4"


def _bare_embedding(parts: ExportParts, *, with_modality: bool) -> None:
    """`embed_tokens` without the merge; the channel of the modality, if there is one, is that of text."""
    table = stored_embedding(parts.loaded.model.get_input_embeddings(), packed=False)
    axes = {"input_ids": {0: "batch", 1: "sequence"}}
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    model = trace(_Table(table), inputs, input_names=["input_ids"], output_names=["inputs_embeds"], dynamic=axes)
    check_axes(model, axes)
    prompt = "embed_tokens/prompt"
    ids = parts.parity[f"{prompt}/in/input_ids"]
    with torch.inference_mode():
        rows = table(torch.from_numpy(ids)).numpy()
    if with_modality:
        append_channel(model, "inputs_embeds", 0.0)
        rows = with_channel(rows, 0.0)
    parts.graphs["embed_tokens"] = model
    for name in [name for name in parts.parity if name.startswith("embed_tokens/")]:
        del parts.parity[name]
    parts.parity[f"{prompt}/in/input_ids"] = ids
    parts.parity[f"{prompt}/out/inputs_embeds"] = rows


class _Table(torch.nn.Module):
    """The embedding with an argument name that the graph can have."""

    def __init__(self, table: torch.nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] int64 -> [batch, sequence, hidden] float32."""
        return self.table(input_ids)


def _tiles_of_chats(parts: ExportParts) -> None:
    """pixel_values [chats, tiles, 3, height, width] with the mask of their pixels, as transformers.js makes them.

    The graph lays the tiles flat and drops those that the mask says are empty (`splitq_edge.tiles`).
    """
    model = parts.graphs["vision_encoder"]
    graph = model.graph
    flat = graph.inputs[0]
    size = [fixed(flat, axis) for axis in (1, 2, 3)]  # 3, height, width
    pixels = ir.Value(name="pixel_values", type=flat.type, shape=ir.Shape(["chats", "tiles", *size]))
    mask = ir.Value(
        name="pixel_attention_mask",
        type=ir.TensorType(ir.DataType.BOOL),
        shape=ir.Shape(["chats", "tiles", *size[1:]]),
    )
    tiles = initializer(model, "pixel_values.tiles", np.array([-1, *size], np.int64))
    rows = initializer(model, "pixel_attention_mask.rows", np.array([-1, size[1] * size[2]], np.int64))
    axis = initializer(model, "pixel_attention_mask.axis", np.array([1], np.int64))
    laid = ir.node("Reshape", [pixels, tiles], name="pixel_values.flatten")
    masks = ir.node("Reshape", [mask, rows], name="pixel_attention_mask.flatten")
    number = ir.node("Cast", [masks.outputs[0]], {"to": ir.DataType.UINT8}, name="pixel_attention_mask.cast")
    most = ir.node("ReduceMax", [number.outputs[0], axis], {"keepdims": 0}, name="pixel_attention_mask.any")
    filled = ir.node("Cast", [most.outputs[0]], {"to": ir.DataType.BOOL}, name="pixel_attention_mask.filled")
    kept = ir.node("Compress", [laid.outputs[0], filled.outputs[0]], {"axis": 0}, name="pixel_values.filled")
    output = kept.outputs[0]
    flat.name, output.name = "pixel_values.replaced", "pixel_values.tiles_filled"
    output.type, output.shape = flat.type, flat.shape
    graph.inputs[:] = [pixels, mask]
    ir.convenience.replace_all_uses_with(flat, output)
    graph.insert_before(graph[0], [laid, masks, number, most, filled, kept])
    prefix = "vision_encoder/image/in"
    values = parts.parity[f"{prefix}/pixel_values"][None]
    parts.parity[f"{prefix}/pixel_values"] = values
    parts.parity[f"{prefix}/pixel_attention_mask"] = np.ones((*values.shape[:2], *values.shape[3:]), bool)


def _rename_axis(model: ir.Model, old: str, new: str) -> None:
    """transformers.js makes the empty cache by the names of its axes."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for shape in (value.shape for value in values if value.shape is not None):
        for axis, size in enumerate(shape):
            if isinstance(size, ir.SymbolicDim) and size.value == old:
                shape[axis] = new


def _write_processor(processor: Any, folder: Path) -> None:
    """preprocessor_config.json, and the settings of the processor where transformers.js reads them otherwise."""
    path = folder / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    images = dict(config["image_processor"])
    # Python's variants of an image processor differ in what they compute with; transformers.js has one.
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    write_json(folder / "preprocessor_config.json", {**images, "processor_class": type(processor).__name__})
    if config.get("vision_feature_select_strategy") == "default":
        # transformers takes the class token off again, transformers.js does not: both count right without it.
        config |= {"vision_feature_select_strategy": "full"}
        config["num_additional_image_tokens"] -= 1
        write_json(path, config)


def _write_tokenizer(processor: Any, folder: Path) -> None:
    """transformers.js reads the chat template of most families from the tokenizer's settings."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "chat_template": processor.chat_template})
