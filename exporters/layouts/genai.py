"""The layout that onnxruntime-genai opens: the flat one, `genai_config.json` and the native library beside the graphs.

genai knows model types by name. A family that it does not know runs under a type of the same three parts
(`ModelAdapter.genai_type`): genai then only passes the graphs' tensors on, and the host prepares picture and prompt.
"""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from splitq_edge import runtime_ops
from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.artifacts import write_json
from splitq_edge.config import QuantConfig
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.layouts.layout import ExportParts, check_cache
from splitq_edge.exporters.layouts.modality_channel import (
    add_modality_channel,
    split_channel,
    widened,
    with_channel,
)
from splitq_edge.exporters.passes.walk import initializer
from splitq_edge.quant.kv_cache import HALF_BITS

CONFIG_FILE = "genai_config.json"
CACHE_BITS = (0, HALF_BITS)  # of caches that genai passes on
MARKS = ("vision_start_token_id", "video_token_id")  # tokens by which genai counts mRoPE positions


class Genai:
    """See the module."""

    name = "genai"
    data_suffix = ".data"
    attention = "fused"

    def check(self, adapter: ModelAdapter, config: QuantConfig | None, *, flavour: str, attention: str) -> None:
        """See `Layout.check`."""
        if not adapter.genai_type:
            raise SplitQError(
                "--layout genai: expected a model type that onnxruntime-genai can run, got "
                f"'{adapter.model_type}'; use --layout flat"
            )
        check_cache(self.name, config, CACHE_BITS)

    def file(self, part: str, _manifest: dict[str, Any]) -> str:
        """See `Layout.file`."""
        return f"{part}.onnx"

    def adapt(self, parts: ExportParts) -> None:
        """See `Layout.adapt`."""
        manifest = parts.manifest
        masked = manifest["modality_input"]
        _take_rows(parts)
        add_modality_channel(parts)
        if masked:
            _mask_becomes_channel(parts.graphs["embed_tokens"])
            prompt = "embed_tokens/prompt"
            parity = parts.parity
            mask = parity.pop(f"{prompt}/out/modality")
            parity[f"{prompt}/out/inputs_embeds"] = with_channel(parity[f"{prompt}/out/inputs_embeds"], mask)
            parity[f"{prompt}/in/image_features"] = with_channel(parity[f"{prompt}/in/image_features"], 1.0)
        _give_rows(parts)
        engine_type = parts.loaded.adapter.genai_type
        manifest["genai"] = {"type": engine_type, "borrowed": engine_type != manifest["model_type"]}
        library = runtime_ops.library_path()
        if library is not None:
            manifest["native_library"] = {"file": library.name, "platform": f"{sys.platform}-{platform.machine()}"}

    def write_companions(self, parts: ExportParts, folder: Path) -> None:
        """See `Layout.write_companions`."""
        library = runtime_ops.library_path()
        if library is not None:
            shutil.copyfile(library, folder / library.name)
        write_json(folder / CONFIG_FILE, genai_config(parts))


def genai_config(parts: ExportParts) -> dict[str, Any]:
    """What genai must know of the graphs; keys are those of its configuration reference."""
    manifest, text, whole = parts.manifest, parts.loaded.text_config, parts.loaded.model.config
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if "native_library" in manifest:
        session["custom_ops_library"] = manifest["native_library"]["file"]
    inputs = {value.name for value in parts.graphs["decoder"].graph.inputs}
    feeds = ("inputs_embeds", "attention_mask", "position_ids")
    length = int(text.max_position_embeddings)
    eos, pad = manifest["eos_token_ids"], manifest["pad_token_id"]
    bos = getattr(text, "bos_token_id", None)
    cache = {kind: f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    return {
        "model": {
            "type": parts.loaded.adapter.genai_type,
            "bos_token_id": int(bos if bos is not None else pad),
            "eos_token_id": eos,
            "pad_token_id": pad,
            "image_token_id": manifest["image_token_id"],
            **{name: int(getattr(whole, name)) for name in MARKS if hasattr(whole, name)},
            "vocab_size": int(text.vocab_size),
            "context_length": length,
            "vision": {
                "spatial_merge_size": parts.loaded.image_layout.merge_size,
                "filename": manifest["parts"]["vision_encoder"]["file"],
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": "image_features"},
            },
            "embedding": {
                "filename": manifest["parts"]["embed_tokens"]["file"],
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "decoder": {
                "filename": manifest["parts"]["decoder"]["file"],
                "session_options": session,
                "hidden_size": manifest["hidden_size"],
                "num_attention_heads": int(text.num_attention_heads),
                "num_key_value_heads": manifest["cache"]["heads"],
                "num_hidden_layers": manifest["cache"]["layers"],
                "head_size": manifest["cache"]["head_dim"],
                "inputs": {
                    **{name: name for name in feeds if name in inputs},
                    "past_key_names": cache["key"],
                    "past_value_names": cache["value"],
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": cache["key"].replace("past_key_values", "present"),
                    "present_value_names": cache["value"].replace("past_key_values", "present"),
                },
            },
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }


def _take_rows(parts: ExportParts) -> None:
    """`embed_tokens` reads image_features [rows, hidden] of all images; genai gives none after the prompt."""
    (taken,) = (value for value in parts.graphs["embed_tokens"].graph.inputs if value.name == "image_features")
    taken.shape = ir.Shape(["image_rows", parts.manifest["hidden_size"]])


def _give_rows(parts: ExportParts) -> None:
    """The vision encoder gives them so."""
    hidden = parts.manifest["hidden_size"]
    shape = ir.Shape(["image_rows", hidden])
    model = parts.graphs["vision_encoder"]
    (features,) = model.graph.outputs
    assert features.shape is not None
    if len(features.shape) == 2:
        return
    features.name = "image_features.by_image"
    sizes = initializer(model, "image_features.sizes", np.array([-1, hidden], np.int64))
    flat = ir.node("Reshape", [features, sizes], name="image_features.flatten")
    output = flat.outputs[0]
    output.name, output.type, output.shape = "image_features", features.type, shape
    model.graph.append(flat)
    model.graph.outputs[:] = [output]
    for name, value in parts.parity.items():
        if name.endswith("/image_features"):
            parts.parity[name] = value.reshape(-1, hidden)


def _mask_becomes_channel(model: ir.Model) -> None:
    """`embed_tokens` of the flat layout: takes and gives one more channel, the output `modality` goes."""
    graph = model.graph
    split_channel(model, "image_features")
    embeds, mask = graph.outputs
    embeds.name, mask.name = "inputs_embeds.channels", "modality"
    cast = ir.node("Cast", [mask], {"to": ir.DataType.FLOAT}, name="modality.cast")
    axis = initializer(model, "modality.axis", np.array([-1], np.int64))
    channel = ir.node("Unsqueeze", [cast.outputs[0], axis], name="modality.unsqueeze")
    joined = ir.node("Concat", [embeds, channel.outputs[0]], {"axis": -1}, name="modality.concat")
    graph.extend([cast, channel, joined])
    output = widened(joined.outputs[0], "inputs_embeds", embeds)
    graph.outputs[:] = [output]
