"""Decoders of random weights for the whole-model benchmark: ours in every scheme, the same graph with others' layers.

Time does not depend on the weights, so nothing is calibrated: codes, scales and transforms are drawn, widths and ranks
are those that the recipes give.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from splitq_edge.adapters import llama
from splitq_edge.adapters.adapter import Site
from splitq_edge.artifacts import EXPORT_FILE, EXPORT_SCHEMA, file_table, write_json
from splitq_edge.commands.export import default_lm_head
from splitq_edge.config import CorrectionConfig, QuantConfig, SplitConfig, preset
from splitq_edge.convert import QuantizedModel
from splitq_edge.correction.low_rank import rank_of
from splitq_edge.exporters.decoder_graph import cache_shape, finish_decoder, trace_decoder
from splitq_edge.exporters.export_folder import EXTERNAL_BYTES
from splitq_edge.exporters.passes.walk import initializer, take_place
from splitq_edge.exporters.symbolic import placeholders
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import Correction, GroupWeights, SplitLinear, site_parts
from splitq_edge.quant.kv_cache import HALF_BITS
from splitq_edge.quant.transforms import starting_factors
from splitq_edge.splitting.plan import outlier_width

PEER_HEAD_BITS = 8  # of MatMulNBits
ATTENTION = "fused"
FLOAT_WEIGHTS = ("fp32", "MatMulNBits")  # graphs whose layers are not ours
PLAIN = {"transform": "identity", "scale": "none", "split": SplitConfig(ratio=0), "correction": CorrectionConfig(0, 0)}
WITHOUT = {
    "no transform": {"transform": "identity"},
    "no split": {"split": SplitConfig(ratio=0)},
    "no CWS, MAC": {"correction": CorrectionConfig(0, 0)},
}
WITH = {
    "float32 cache": {"kv_cache_bits": 0},
    "8-bit head": {"lm_head": "W8A8"},
    "6-bit head": {"lm_head": "W6A8"},
    "4-bit head": {"lm_head": "W4A8"},
}
CHANGES: dict[str, dict[str, Any]] = {"plain": PLAIN, **WITHOUT, **WITH}


def recipe(scheme: str) -> QuantConfig:
    """The recipe behind a name: a preset, "W8A8", or one with a change, as "W4A8 plain" or "W4A8 float32 cache".

    The cache is float16, as packed exports have it. "fp32" and "MatMulNBits" have the sites' shapes of "W4A8 plain";
    the former's cache is float32, as float exports have it.
    """
    if scheme in FLOAT_WEIGHTS:
        return replace(recipe("W4A8 plain"), kv_cache_bits=0 if scheme == "fp32" else HALF_BITS)
    label, _, change = scheme.partition(" ")
    config = preset("W4A8" if label == "W8A8" else label)
    config = replace(config, scheme=label, bits=int(label[1]), activation_bits=int(label[3]), kv_cache_bits=HALF_BITS)
    if label == "W8A8":
        config = replace(config, lm_head="W8A8")
    return replace(config, **CHANGES[change]) if change else config


def text_config(shape: str) -> Any:
    """Configuration of a shape: "135M" is SmolLM2-135M with smolvqa-135m's vocabulary, "1.5B" is Qwen2.5-1.5B."""
    from transformers import LlamaConfig, Qwen2Config

    if shape == "135M":
        return LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49216,
            max_position_embeddings=8192,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        )
    return Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    )


def write_decoders(shape: str, schemes: Iterable[str], root: Path) -> None:
    """Write folders with a decoder alone, as `ExportedModel.decode` runs it; those that are there stay.

    Args:
        shape: see `text_config`.
        schemes: see `recipe`; "MatMulNBits" for ONNX Runtime's 4-bit layers in blocks of 128.
        root: each scheme gets a folder in it, see `folder_of`.
    """
    traced: dict[int, ir.Model] = {}  # by bits of the cache
    for scheme in schemes:
        folder = folder_of(root, scheme)
        if (folder / EXPORT_FILE).exists():
            continue
        bits = recipe(scheme).kv_cache_bits
        if bits not in traced:
            traced[bits] = _traced(shape, bits)
        _write(traced[bits], shape, scheme, folder)


def folder_of(root: Path, scheme: str) -> Path:
    """Where the decoder of a scheme lies."""
    return root / re.sub(r"\W+", "-", scheme)


def _traced(shape: str, kv_cache_bits: int) -> ir.Model:
    """The fused decoder with a placeholder for every linear; tracing knows nothing of the scheme but its cache."""
    loaded = hollow_model(shape)
    quantized = QuantizedModel(loaded, replace(preset("W4A8"), kv_cache_bits=kv_cache_bits), {}, [])
    fill(loaded, quantized)
    with placeholders(quantized):
        model = trace_decoder(
            loaded,
            cache_shape(loaded, quantized),
            ATTENTION,
            width=loaded.text_config.hidden_size,
            with_modality=True,
        )
    return model


def _write(traced: ir.Model, shape: str, scheme: str, folder: Path) -> None:
    plain = scheme in FLOAT_WEIGHTS
    config = recipe(scheme)
    loaded = hollow_model(shape)
    quantized = QuantizedModel(loaded, config, {}, [])
    fill(loaded, quantized)
    sites = quantized.sites | quantized.extras["lm_head"]
    model = traced.clone()
    finish_decoder(model, sites, packed=True)
    if plain:
        replace_sites(model, sites, peer=scheme == "MatMulNBits")
    for value in [value for value in model.graph.inputs if value.name == "modality" and not value.consumers()]:
        model.graph.inputs.remove(value)
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "decoder.onnx", external_data="decoder.onnx.data", size_threshold_bytes=EXTERNAL_BYTES)
    cache = cache_shape(loaded, quantized)
    write_json(
        folder / EXPORT_FILE,
        {
            "schema": EXPORT_SCHEMA,
            "scheme": "none" if plain else scheme,
            "attention": ATTENTION,
            "logits_to_keep": True,
            "modality_input": "modality" in {value.name for value in model.graph.inputs},
            "hidden_size": loaded.text_config.hidden_size,
            "vocabulary": loaded.text_config.vocab_size,
            "cache": {
                "layers": cache.layers,
                "heads": cache.heads,
                "head_dim": cache.head_dim,
                "dtype": cache.dtype,
                "bits": cache.bits or 32,
            },
            "parts": {"decoder": {"file": "decoder.onnx", "parity_limit_db": 0.0}},
            "files": file_table(folder),
        },
    )


def hollow_model(shape: str) -> LoadedModel:
    """The model without weights but for norms and rotary frequencies, which are traced."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config(shape), dtype=torch.float32).eval()
    for path, module in model.named_modules():
        if path.endswith("norm") or path.endswith("layernorm"):
            module.weight = nn.Parameter(torch.ones(module.weight.shape))
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary
    return LoadedModel(shape, model, None, llama.ADAPTER, ModalityContext())


def fill(loaded: LoadedModel, quantized: QuantizedModel) -> None:
    """Put random sites in place of the model's linears."""
    for number, block in enumerate(loaded.language_blocks()):
        for site in loaded.adapter.language_block:
            name = loaded.adapter.site_name(number, site)
            quantized.sites[name] = place(block, site, name, quantized.config, loaded)
    wanted = quantized.config.lm_head
    scheme = default_lm_head(quantized.config.bits) if wanted == "none" else wanted
    head = replace(quantized.config, bits=int(scheme[1]), activation_bits=8, **PLAIN)
    head = replace(head, transform=quantized.config.transform)
    quantized.extras["lm_head"] = {
        "lm_head": place(loaded.model, Site("lm_head", ("lm_head",)), "lm_head", head, loaded)
    }


def place(parent: nn.Module, site: Site, name: str, config: QuantConfig, loaded: LoadedModel) -> SplitLinear:
    """A random site in place of a module's linears."""
    linears = {path: parent.get_submodule(path) for path in site.linears}
    widths = {path: linear.out_features for path, linear in linears.items()}
    biased = any(linear.bias is not None for linear in linears.values())
    channels = next(iter(linears.values())).in_features
    made = random_site(name, channels, sum(widths.values()), config, loaded.context, biased)
    for path, part in site_parts(made, widths).items():
        parent.set_submodule(path, part)
    return made


def random_site(
    name: str, channels: int, outputs: int, config: QuantConfig, context: ModalityContext, biased: bool
) -> SplitLinear:
    """A site of drawn integers with the widths and ranks of a recipe."""
    balanced = config.transform != "identity"
    outliers = outlier_width(channels, config.split.ratio, balanced=balanced)
    widths = {"main": channels - outliers, "text": outliers // 2, "vision": outliers - outliers // 2}
    generator = torch.Generator().manual_seed(channels + outputs)
    groups = {}
    for group, width in widths.items():
        if not width:
            continue
        main = group == "main"
        bits = config.bits if main else config.split.bits
        p1, p2 = starting_factors(width, config.transform_width) if balanced else (None, None)
        groups[group] = GroupWeights(
            qweight=codes(width, outputs, bits),
            scale=scales(outputs),
            p1=p1,
            p2=p2,
            bits=bits,
            activation_bits=config.activation_bits if main else config.split.activation_bits,
            clip=0.9 if balanced else 1.0,
        )
    full, correction = min(widths["main"], outputs), None
    if config.correction.cws_ratio:
        cws, mac = (rank_of(ratio, full) for ratio in (config.correction.cws_ratio, config.correction.mac_ratio))
        rank, bits = max(cws, mac), config.correction.bits
        correction = Correction(
            u=codes(widths["main"], rank, bits),
            u_scale=scales(rank),
            v=codes(rank, outputs, bits),
            v_scale=scales(outputs),
            gate_cws=scales(cws),
            gate_mac=scales(mac),
            bits=bits,
            residual_bits=config.correction.residual_bits,
            mac_rows=config.correction.mac_rows,
        )
    parts = torch.randperm(channels, generator=generator).split(list(widths.values()))
    order = torch.cat([part.sort().values for part in parts]).to(torch.int32)
    return SplitLinear(
        name,
        order=order,
        groups=groups,
        context=context,
        correction=correction,
        bias=torch.zeros(outputs) if biased else None,
        channel_scale=None if config.scale == "none" else torch.ones(channels),
        group_size=0,
        activation_symmetric=config.activation_symmetric,
    )


@lru_cache(maxsize=32)
def codes(channels: int, outputs: int, bits: int) -> torch.Tensor:
    """[K, N] int8 codes of a bit width."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    return torch.randint(
        low, high, (channels, outputs), dtype=torch.int8, generator=torch.Generator().manual_seed(bits)
    )


def scales(width: int) -> torch.Tensor:
    """[width] float32, about what keeps the activations of a random network in range."""
    return torch.full((width,), 0.002)


def replace_sites(model: ir.Model, sites: dict[str, SplitLinear], *, peer: bool) -> None:
    """Plain layers of ours -> float MatMuls, or ONNX Runtime's `MatMulNBits` (4 bits b128; the head 8 bits b128)."""
    made: dict[Any, int] = defaultdict(int)
    for node in list(model.graph):
        if node.op_type != "SplitQLinear":
            continue
        site = sites[node.name]
        k, n = site.in_features, site.out_features
        made[k, n] += 1
        name = f"{node.name}.peer"
        if peer:
            bits = PEER_HEAD_BITS if node.name == "lm_head" else 4
            weight = np.random.default_rng(made[k, n]).integers(0, 256, (n, -(-k // 128), 16 * bits), dtype=np.uint8)
            scale = np.full((n, -(-k // 128)), 0.002, np.float32)
            new = ir.node(
                "MatMulNBits",
                [node.inputs[0], initializer(model, f"{name}.w", weight), initializer(model, f"{name}.s", scale)],
                attributes={"K": k, "N": n, "bits": bits, "block_size": 128, "accuracy_level": 4},
                domain="com.microsoft",
                name=name,
            )
        else:
            weight = np.random.default_rng(made[k, n]).standard_normal((k, n), np.float32) * 0.02
            new = ir.node("MatMul", [node.inputs[0], initializer(model, f"{name}.w", weight)], name=name)
        new.outputs[0].name = f"{name}.y"
        model.graph.insert_before(node, new)
        output = new.outputs[0]
        if site.bias is not None:
            bias = ir.node(
                "Add", [output, initializer(model, f"{name}.b", np.zeros(n, np.float32))], name=f"{name}.add"
            )
            bias.outputs[0].name = f"{name}.biased"
            model.graph.insert_before(node, bias)
            output = bias.outputs[0]
        take_place(node.outputs[0], output)
        model.graph.remove(node, safe=True)
    model.functions.clear()
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name in list(model.graph.initializers):
        if name not in used:
            del model.graph.initializers[name]
