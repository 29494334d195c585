"""`config.json: quantization_config`, in the shape that compressed-tensors gives it."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn

from splitq_edge.config import QuantConfig
from splitq_edge.convert import QuantizedModel
from splitq_edge.modules.split_linear import SitePart, SplitLinear

QUANT_METHOD = "splitq"


def quantization_config(quantized: QuantizedModel) -> dict[str, Any]:
    """One group a kind of site, named by patterns of the linears; what stayed float is listed in `ignore`.

    The groups give the bits of the main channels. What makes the method (split channels, transforms, low-rank
    corrections) has no place in this shape: it is in the recipe of export.json.
    """
    config, model = quantized.config, quantized.loaded.model
    kinds: dict[str, dict[str, SplitLinear]] = {"language": quantized.sites, **quantized.extras}
    paths = {name: _linears(model, sites) for name, sites in kinds.items()}
    paths["ignore"] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = _patterns(paths)
    groups = {
        name: {"targets": named[name], **_numbers(sites, config if name == "language" else None)}
        for name, sites in kinds.items()
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": "onnx",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": named["ignore"],
        "kv_cache_scheme": _values(config.kv_cache_bits, "token", dynamic=True)
        if config.kv_cache_bits in (8, 4)
        else None,
    }


def _linears(model: nn.Module, sites: dict[str, SplitLinear]) -> list[str]:
    own = set(map(id, sites.values()))
    return [path for path, part in model.named_modules() if isinstance(part, SitePart) and id(part.site) in own]


def _numbers(sites: dict[str, SplitLinear], config: QuantConfig | None) -> dict[str, Any]:
    """Bits of a group's weights and activations; the recipe says more of language sites alone."""
    main = next(iter(sites.values())).groups["main"]
    block = 0 if config is None else config.group_size
    weights = _values(main.bits, "group" if block else "channel", dynamic=False)
    weights["group_size"] = block or None
    symmetric = config is None or config.activation_symmetric
    activations = _values(main.activation_bits, "token", dynamic=True, symmetric=symmetric)
    return {"weights": weights, "input_activations": activations}


def _values(bits: int, strategy: str, *, dynamic: bool, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
    }


def _patterns(paths: dict[str, list[str]]) -> dict[str, list[str]]:
    """Module paths by group; those of one group that differ in a block's number share a regular expression."""
    users: dict[str, set[str]] = defaultdict(set)
    for name, members in paths.items():
        for path in members:
            users[_pattern(path)].add(name)
    return {
        name: sorted({path if len(users[_pattern(path)]) > 1 else _pattern(path) for path in members})
        for name, members in paths.items()
    }


def _pattern(path: str) -> str:
    pieces = [re.escape(piece) for piece in re.split(r"\.\d+\.", path)]
    return path if len(pieces) == 1 else "re:" + r"\.\d+\.".join(pieces)
