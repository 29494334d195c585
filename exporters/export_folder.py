"""Write a quantized (or float) vision-language model as a folder: three graphs, processor files, manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from splitq_edge import __version__
from splitq_edge.artifacts import EXPORT_FILE, EXPORT_SCHEMA, file_table, write_json
from splitq_edge.calibration.extra_sites import EXTRAS
from splitq_edge.convert import QuantizedModel, effective_bits
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.decoder_graph import cache_shape, finish_decoder, trace_decoder
from splitq_edge.exporters.layouts.layout import ExportParts
from splitq_edge.exporters.layouts.registry import layout_named
from splitq_edge.exporters.onnx_export import check_axes, trace
from splitq_edge.exporters.packed_embedding import stored_embedding
from splitq_edge.exporters.parts import Decoder, EmbedTokens, vision_encoder
from splitq_edge.exporters.passes.attach_functions import attach_functions
from splitq_edge.exporters.passes.expand_sites import expand_sites
from splitq_edge.exporters.quantization_config import quantization_config
from splitq_edge.exporters.save_graph import external_places, save_graph
from splitq_edge.exporters.symbolic import placeholders, reads_modality
from splitq_edge.image_layout import Arrays, ImageLayout, join
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import VISION
from splitq_edge.modules.quantized_embedding import HeadEmbedding
from splitq_edge.modules.split_linear import SplitLinear
from splitq_edge.quant.kv_cache import cache_tensors
from splitq_edge.quant.metrics import sqnr_db
from splitq_edge.report.quality_report import REPORT_FILE, build_report

FLAVOURS = ("portable", "packed", "qdq")
PARITY_FILE = "parity.npz"
PARITY_POSITIONS = 8  # logits kept of a parity sample
MIDDLE_TOKENS = 8  # of the parity sample between picture and text
SENSITIVITY_NOISE = 1e-6  # relative; float32 sums in another order move activations by about as much
SENSITIVITY_DRAWS = 4  # of that noise; one alone may happen to tip few codes
STEP_DRAWS = 16  # for one token, whose few codes make the draws differ more, and cost less
SENSITIVITY_MARGIN_DB = 6.0
LEAST_LIMIT_DB = 6.0  # a case that can be asked no more than this tells nothing
FLOAT_LIMIT_DB = 80.0  # float32 sums in another order stay far above this
EXTERNAL_BYTES = 1024  # larger tensors go to the .data file
SHARING_LAYOUTS = ("flat", "genai")  # transformers.js looks for a graph's data under the graph's own name alone
HEAD_INPUTS = {"embedding.codes": "lm_head.weight_main", "embedding.scale": "lm_head.scale_main"}


@dataclass(frozen=True)
class ExportRequest:
    """What an export needs beside the model.

    Attributes:
        flavour: "portable" (int4 tensors) or "packed" (kernel layout).
        sample: model inputs of one real conversation (input_ids [1, sequence], pixel_values, ...), for tracing sizes
            and parity.
        calibration: what export.json says of the calibration data, None for a float export.
        seed: seed of the run, for export.json.
        attention: "fused" (one `com.microsoft::GroupQueryAttention` a layer, where the model allows it) or "standard"
            (ops of the ONNX standard alone).
        layout: names and places of the files, see `splitq_edge.exporters.layouts`.
    """

    flavour: str
    sample: dict[str, torch.Tensor]
    calibration: dict[str, object] | None
    seed: int
    attention: str = "fused"
    layout: str = "flat"


def write_export(loaded: LoadedModel, quantized: QuantizedModel | None, request: ExportRequest, folder: Path) -> None:
    """Write all files of an export.

    Args:
        loaded: the model; already changed in place when `quantized` is given.
        quantized: its quantized sites, None for a float export.
        request: flavour, sample and provenance.
        folder: existing empty folder.

    Raises:
        SplitQError: a graph cannot be traced as needed, or the graphs of this family cannot be written yet.
    """
    check_exportable(loaded)
    parity: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        features = parity_vision(loaded, request, parity)
        embeds, modality = parity_embed(loaded, request, features, parity)
        sensitivity = _parity_decoder(loaded, quantized, request, (embeds, modality), parity)
    graphs = {
        "vision_encoder": _vision_graph(loaded, quantized, request),
        "decoder": _decoder_graph(loaded, quantized, request, features.shape[-1]),
        "embed_tokens": embed_graph(loaded, features, packed=request.flavour == "packed"),
    }
    attention = graphs["decoder"].metadata_props.get("splitq.attention", "standard")
    parts = ExportParts(
        loaded, graphs, parity, manifest_of(loaded, quantized, request, features, sensitivity, attention)
    )
    layout = layout_named(request.layout)
    layout.adapt(parts)
    for name, model in graphs.items():
        describe_graph(model, name, quantized, request)
        path = folder / layout.file(name, parts.manifest)
        path.parent.mkdir(exist_ok=True)
        parts.manifest["parts"][name]["file"] = path.relative_to(folder).as_posix()
        shared = _shared_with_decoder(loaded, parts, folder) if name == "embed_tokens" else {}
        save_graph(model, path, path.name + layout.data_suffix, threshold=EXTERNAL_BYTES, shared=shared)
    np.savez(folder / PARITY_FILE, **parity)  # type: ignore[arg-type]
    write_companions(loaded, quantized, folder)
    layout.write_companions(parts, folder)
    if quantized is not None:
        bits = effective_bits(quantized.sites)
        report = build_report(quantized.config.to_dict(), bits, quantized.reports, quantized.extra_reports)
        write_json(folder / REPORT_FILE, report)
    write_json(folder / EXPORT_FILE, {**parts.manifest, "files": file_table(folder)})


def check_exportable(loaded: LoadedModel) -> int:
    """The image token's id of a model whose graphs can be written.

    Raises:
        SplitQError: it is text only.
    """
    if loaded.image_token_id is None:
        raise SplitQError(
            f"export: expected a model of images and text, got model type '{loaded.adapter.model_type}', text only; "
            "it can be quantized but not exported yet"
        )
    return loaded.image_token_id


def _vision_graph(loaded: LoadedModel, quantized: QuantizedModel | None, request: ExportRequest) -> ir.Model:
    layout = loaded.image_layout
    pictures = _pictures(layout, request)
    twice = tensors(layout.graph_inputs(join([pictures, pictures])))  # an axis of 1 would be taken as constant

    def traced() -> ir.Model:
        return trace(
            vision_encoder(loaded),
            twice,
            input_names=list(twice),
            output_names=["image_features"],
            dynamic={name: layout.axes()[name] for name in twice},
        )

    sites = {} if quantized is None else quantized.extras.get("vision", {})
    model = _with_sites(traced, quantized, sites, request)
    check_axes(model, layout.axes())
    return model


def _with_sites(
    traced: Callable[[], ir.Model],
    quantized: QuantizedModel | None,
    sites: dict[str, SplitLinear],
    request: ExportRequest,
) -> ir.Model:
    """A traced graph with its quantized sites as nodes and their bodies attached."""
    if quantized is None or not sites:
        return traced()
    with placeholders(quantized):
        model = traced()
    packed = request.flavour == "packed"
    attach_functions(model, expand_sites(model, sites, packed=packed))
    return model


def _shared_with_decoder(loaded: LoadedModel, parts: ExportParts, folder: Path) -> dict[str, ir.ExternalTensor]:
    """Initializers of `embed_tokens` that lie in the data of the decoder, which is written already."""
    table = loaded.model.get_input_embeddings()
    if parts.manifest["layout"] not in SHARING_LAYOUTS or not isinstance(table, HeadEmbedding):
        return {}
    if table.bits == 4 and parts.manifest["flavour"] != "packed":  # integers of 4 bits, which no runtime gathers
        return {}
    entry = parts.manifest["parts"]
    stored = external_places(folder / entry["decoder"]["file"])
    found = {}
    for value in parts.graphs["embed_tokens"].graph.initializers.values():
        place = stored.get(HEAD_INPUTS.get(str(value.name), ""))
        tensor = value.const_value
        if place is None or tensor is None:
            continue
        header = place.length - tensor.nbytes  # of the packed form
        found[str(value.name)] = ir.ExternalTensor(
            place.file,
            place.offset + header,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
            base_dir=folder,
        )
        entry["embed_tokens"]["shared_data"] = [place.file]
    return found


def embed_graph(loaded: LoadedModel, features: torch.Tensor, *, packed: bool = False) -> ir.Model:
    """The token embedding with dynamic axes.

    Args:
        loaded: the model.
        features: image rows as the vision encoder gives them.
        packed: whether the decoder's weights are packed, see `stored_embedding`.
    """
    flat = features.dim() == 2
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}, "image_features": {0: "rows" if flat else "images"}}
    embedding = stored_embedding(loaded.model.get_input_embeddings(), packed=packed)
    model = trace(
        EmbedTokens(embedding, check_exportable(loaded)),
        {
            "input_ids": torch.zeros(2, 5, dtype=torch.long),
            "image_features": torch.cat([features, features])[:2].clone(),
        },
        input_names=list(dynamic),
        output_names=["inputs_embeds", "modality"],
        dynamic=dynamic,
    )
    check_axes(model, dynamic)
    return model


def _decoder_graph(
    loaded: LoadedModel, quantized: QuantizedModel | None, request: ExportRequest, width: int
) -> ir.Model:
    sites = {} if quantized is None else quantized.sites | quantized.extras.get("lm_head", {})
    with nullcontext() if quantized is None else placeholders(quantized):
        model = trace_decoder(
            loaded,
            cache_shape(loaded, quantized),
            request.attention,
            width=width,
            with_modality=takes_modality(loaded, quantized),
        )
    finish_decoder(model, sites, packed=request.flavour == "packed")
    return model


def takes_modality(loaded: LoadedModel, quantized: QuantizedModel | None) -> bool:
    """Whether the decoder's graph has the modality mask as input."""
    return loaded.adapter.bidirectional == "image" or (quantized is not None and reads_modality(quantized))


def describe_graph(model: ir.Model, part: str, quantized: QuantizedModel | None, request: ExportRequest) -> None:
    """Provenance in the file itself, for whoever opens it alone."""
    model.producer_name, model.producer_version = "splitq-edge", __version__
    model.graph.name = part
    model.metadata_props["splitq.part"] = part
    if quantized is not None and part == "decoder":
        model.metadata_props["splitq.scheme"] = quantized.config.scheme
        model.metadata_props["splitq.flavour"] = request.flavour
        model.metadata_props["splitq.effective_bits"] = f"{effective_bits(quantized.sites):.4f}"
        model.metadata_props["splitq.recipe"] = json.dumps(quantized.config.to_dict())
    if quantized is not None and part == "vision_encoder" and "vision" in quantized.extras:
        model.metadata_props["splitq.scheme"] = quantized.config.vision
        model.metadata_props["splitq.flavour"] = request.flavour
        model.metadata_props["splitq.effective_bits"] = f"{effective_bits(quantized.extras['vision']):.4f}"


def _pictures(layout: ImageLayout, request: ExportRequest) -> Arrays:
    """Pictures of the sample."""
    return layout.pictures(request.sample)


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def parity_vision(loaded: LoadedModel, request: ExportRequest, parity: dict[str, np.ndarray]) -> torch.Tensor:
    """Image features of the sample, stored as a parity sample."""
    layout = loaded.image_layout
    inputs = tensors(layout.graph_inputs(_pictures(layout, request)))
    features = vision_encoder(loaded)(**inputs)
    store_parity(parity, "vision_encoder/image", inputs, {"image_features": features})
    return features.clone()


def parity_embed(
    loaded: LoadedModel, request: ExportRequest, features: torch.Tensor, parity: dict[str, np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded prompt [1, sequence, hidden] and its modality; stored as a parity sample."""
    input_ids = request.sample["input_ids"]
    embeds, modality = EmbedTokens(loaded.model.get_input_embeddings(), check_exportable(loaded))(input_ids, features)
    store_parity(
        parity,
        "embed_tokens/prompt",
        {"input_ids": input_ids, "image_features": features},
        {"inputs_embeds": embeds, "modality": modality},
    )
    return embeds, modality


def _parity_decoder(
    loaded: LoadedModel,
    quantized: QuantizedModel | None,
    request: ExportRequest,
    embedded: tuple[torch.Tensor, torch.Tensor],
    parity: dict[str, np.ndarray],
) -> dict[str, float]:
    """Three samples of one conversation, the last two behind torch's own cache.

    They are: prefill of all but the last token, a few tokens where text follows the picture, one step with the last.

    Returns:
        Of a quantized model, by sample: smallest SQNR in dB between the logits and those of slightly other inputs.
    """
    embeds, modality = embedded
    cache = cache_shape(loaded, quantized)
    with_modality = takes_modality(loaded, quantized)
    decoder = Decoder(loaded, with_modality=with_modality, kv_cache_bits=cache.bits)
    names, kinds = cache.names("past_key_values"), len(cache_tensors(cache.bits))
    tokens = embeds.shape[1]
    generator = torch.Generator().manual_seed(request.seed)
    noises = [torch.randn(embeds.shape, generator=generator) * SENSITIVITY_NOISE for _ in range(STEP_DRAWS)]
    whole = cache.random(1, 0, torch.Generator())
    positions = _positions(loaded, request)
    sensitivity: dict[str, float] = {}
    middle = _middle(modality)
    for case, begin, end in (("prefill", 0, tokens - 1), ("middle", *middle), ("step", tokens - 1, tokens)):
        past = [tuple(tensor[:, :, :begin] for tensor in layer) for layer in whole]
        inputs = {
            "inputs_embeds": embeds[:, begin:end],
            "attention_mask": torch.ones(1, end, dtype=torch.long),
            "position_ids": positions[..., begin:end],
        }
        if loaded.adapter.bidirectional == "prompt":
            inputs["prompt"] = torch.full((1, end - begin), int(begin == 0), dtype=torch.int8)
        mask = modality[:, begin:end]
        logits, *present = decoder(**inputs, past=list(past), modality=mask)
        feeds = {**inputs, **dict(zip(names, (tensor for layer in past for tensor in layer), strict=True))}
        if with_modality:
            feeds["modality"] = mask
        kept = logits[:, -PARITY_POSITIONS:]
        store_parity(parity, f"decoder/{case}", feeds, {"logits": kept})
        if case == "prefill":
            whole = [tuple(present[start : start + kinds]) for start in range(0, len(present), kinds)]
        draws = STEP_DRAWS if case == "step" else SENSITIVITY_DRAWS
        for noise in noises[:draws] if quantized is not None else ():
            near = {**inputs, "inputs_embeds": inputs["inputs_embeds"] * (1 + noise[:, begin:end])}
            moved = decoder(**near, past=list(past), modality=mask)[0][:, -PARITY_POSITIONS:]
            sensitivity[case] = min(sqnr_db(kept, moved), sensitivity.get(case, math.inf))
            if sensitivity[case] - SENSITIVITY_MARGIN_DB < LEAST_LIMIT_DB:  # nothing will be asked
                break
    return sensitivity


def _positions(loaded: LoadedModel, request: ExportRequest) -> torch.Tensor:
    """Positions of the sample's tokens, [1, sequence] or with three axes [3, 1, sequence]."""
    layout = loaded.image_layout
    ids = request.sample["input_ids"].numpy()
    found = layout.positions(ids, np.ones_like(ids), _pictures(layout, request), check_exportable(loaded))
    return torch.arange(ids.shape[1])[None] if found is None else torch.from_numpy(found)


def _middle(modality: torch.Tensor) -> tuple[int, int]:
    """A few tokens of a prompt [1, sequence], its last one left out, with the border of picture and text inside."""
    last = modality.shape[1] - 1
    pictures = (modality[0] == VISION).nonzero()
    border = int(pictures[-1]) + 1 if len(pictures) else last // 2
    begin = max(0, min(border, last - MIDDLE_TOKENS // 2) - MIDDLE_TOKENS // 2)
    return begin, min(begin + MIDDLE_TOKENS, last)


def store_parity(
    parity: dict[str, np.ndarray],
    case: str,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
) -> None:
    """Add the inputs and outputs of `part/case` to the parity samples."""
    for kind, tensors in (("in", inputs), ("out", outputs)):
        for name, tensor in tensors.items():
            parity[f"{case}/{kind}/{name}"] = np.ascontiguousarray(tensor.detach().cpu().numpy())


def write_companions(loaded: LoadedModel, quantized: QuantizedModel | None, folder: Path) -> None:
    """Tokenizer, image processor, chat template, model and generation configuration."""
    loaded.processor.save_pretrained(folder)
    loaded.model.config.save_pretrained(folder)
    if quantized is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**config, "quantization_config": quantization_config(quantized)})
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.save_pretrained(folder)


def manifest_of(
    loaded: LoadedModel,
    quantized: QuantizedModel | None,
    request: ExportRequest,
    features: torch.Tensor,
    sensitivity: dict[str, float],
    attention: str,
) -> dict[str, Any]:
    """export.json as the flat layout has it, without its list of files."""
    cache = cache_shape(loaded, quantized)
    limits = dict.fromkeys(("vision_encoder", "embed_tokens", "decoder"), FLOAT_LIMIT_DB)
    if quantized is not None:
        for part, sites in (
            ("vision_encoder", quantized.extras.get("vision", {})),
            ("decoder", quantized.sites | quantized.extras.get("lm_head", {})),
        ):
            used = [site.groups["main"].activation_bits for site in sites.values()]
            limits[part] = parity_limit_db(min(used)) if used else FLOAT_LIMIT_DB
    eos, pad = _end_tokens(loaded)
    layout = loaded.image_layout
    return {
        "schema": EXPORT_SCHEMA,
        "splitq_edge": __version__,
        "source": Path(loaded.source).resolve().name,
        "base_model": _name(loaded.base or loaded.source),
        "model_type": loaded.adapter.model_type,
        "method": None if quantized is None else quantized.config.method,
        "scheme": "none" if quantized is None else quantized.config.scheme,
        "flavour": request.flavour if quantized is not None else "float",
        "layout": request.layout,
        "effective_bits": 32.0 if quantized is None else round(effective_bits(quantized.sites), 4),
        **{extra: _extra_entry(quantized, extra) for extra in EXTRAS},
        "embedding": {"scheme": _embedding_scheme(loaded, quantized)},
        "recipe": None if quantized is None else quantized.config.to_dict(),
        "calibration": request.calibration,
        "seed": request.seed,
        "parts": {
            name: {
                "parity_limit_db": limit,
                **({"parity_case_limits_db": case_limits(limit, sensitivity)} if name == "decoder" else {}),
            }
            for name, limit in limits.items()
        },
        "attention": attention,
        "max_positions": int(loaded.text_config.max_position_embeddings),
        "logits_to_keep": True,
        "modality_input": takes_modality(loaded, quantized),
        "prompt_input": loaded.adapter.bidirectional == "prompt",
        "image_token_id": loaded.image_token_id,
        "image_layout": layout.to_dict(),
        "image_tokens": None if layout.flat else features.shape[1],
        "hidden_size": features.shape[-1],
        "eos_token_ids": eos,
        "pad_token_id": pad,
        "cache": {
            "layers": cache.layers,
            "heads": cache.heads,
            "head_dim": cache.head_dim,
            "dtype": cache.dtype,
            "bits": cache.bits or 32,
        },
        "versions": _versions("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "numpy"),
    }


def _name(source: str) -> str:
    """A hub id as it is, of a folder the name alone."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _extra_entry(quantized: QuantizedModel | None, extra: str) -> dict[str, Any]:
    """What export.json says of the vision encoder or the output projection."""
    if quantized is None or extra not in quantized.extras:
        return {"scheme": "none", "effective_bits": 32.0}
    bits = effective_bits(quantized.extras[extra])
    return {"scheme": getattr(quantized.config, extra), "effective_bits": round(bits, 4)}


def _embedding_scheme(loaded: LoadedModel, quantized: QuantizedModel | None) -> str:
    """Bits of the token embedding in the folder: a recipe's W8 may be the 6 bits of a tied output projection."""
    if quantized is None:
        return "none"
    table = loaded.model.get_input_embeddings()
    return f"W{table.bits}" if isinstance(table, HeadEmbedding) else quantized.config.embedding


def parity_limit_db(activation_bits: int) -> float:
    """SQNR asked of quantized logits against the torch simulation, in dB.

    Both hold the same integers, but a float sum in another order may tip a value that lies on a rounding boundary into
    the next code, and that error of one step spreads through the layers behind it. A uniform quantizer gains 6 dB a
    bit; asking for half of that leaves room for many tipped codes, while a wrong weight or group leaves about 0 dB.
    Without tipped codes the figure is above 100 dB.
    """
    return 3.0 * activation_bits + 6.0


def case_limits(limit_db: float, sensitivity: dict[str, float]) -> dict[str, float | None]:
    """What is asked of the samples that a deep model cannot hold to its part's limit.

    In many layers of few bits tipped codes multiply: inputs that differ by a rounding error then give other logits. A
    sample can be asked no more than the simulation agrees with itself, and nothing where that says nothing. The step of
    one token, where the fewest codes can tip, is always asked for something.

    Args:
        limit_db: of the part, see `parity_limit_db`.
        sensitivity: by sample, the SQNR of the simulation against itself with slightly other inputs, in dB.

    Returns:
        By sample the SQNR asked, None for no limit; samples that keep the part's limit are left out.
    """
    found: dict[str, float | None] = {}
    for case, itself in sensitivity.items():
        asked = itself - SENSITIVITY_MARGIN_DB
        if case == "step":
            asked = max(asked, LEAST_LIMIT_DB)
        if asked < limit_db:
            found[case] = round(asked, 1) if asked >= LEAST_LIMIT_DB else None
    return found


def _end_tokens(loaded: LoadedModel) -> tuple[list[int], int]:
    generation = getattr(loaded.model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = loaded.processor.tokenizer.eos_token_id
    eos_ids = [int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]) if token is not None]
    pad = getattr(generation, "pad_token_id", None)
    if pad is None:
        pad = loaded.processor.tokenizer.pad_token_id
    return eos_ids, int(pad if pad is not None else (eos_ids or [0])[0])


def _versions(*names: str) -> dict[str, str]:
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
