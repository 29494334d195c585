"""Ablations as recipes.

The paper's: components one after the other (table 6), rules of channel choice (table 4), the rows of MAC (table 5). And
every option that it leaves open against the default, and peers with as many bits a weight as SplitQ's extras make.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from splitq_edge.config import CHANNEL_RULES, CorrectionConfig, QuantConfig, SplitConfig
from splitq_edge.methods.registry import method_config

TABLES = ("components", "rules", "mac", "options", "bits")
PEERS = ("gptq", "quarot", "flatquant")  # of the table "bits"
SCALE_BITS = 32


def ablation_recipes(config: QuantConfig, table: str) -> dict[str, QuantConfig]:
    """Recipes by row label.

    Args:
        config: SplitQ's recipe at a scheme; what a table does not vary stays as it is there.
        table: "components" (flatquant, +MOCD, +CWS, +MAC), "rules" (no split, then every rule of choice, without
            correction as in the paper), "mac" (no MAC, text rows, all rows), "options" (the recipe, then the recipe
            with one setting changed at a time) or "bits" (the recipe, then peers whose groups of input channels have
            scales of their own: 32 bits a group, so many groups that they have no fewer bits a weight).

    Raises:
        KeyError: unknown table.
    """
    no_correction = CorrectionConfig(cws_ratio=0, mac_ratio=0)
    flat = replace(config, split=SplitConfig(ratio=0), correction=no_correction, method="flatquant")
    split_only = replace(config, correction=no_correction)
    without_mac = replace(config, correction=replace(config.correction, mac_ratio=0))
    tables = {
        "components": {"flatquant": flat, "+MOCD": split_only, "+CWS": without_mac, "+MAC": config},
        "rules": {
            "none": flat,
            **{rule: replace(split_only, split=replace(config.split, rule=rule)) for rule in reversed(CHANNEL_RULES)},
        },
        "mac": {
            "none": without_mac,
            **{rows: replace(config, correction=replace(config.correction, mac_rows=rows)) for rows in ("text", "all")},
        },
    }
    size = 128 if _extra_bits(config) <= SCALE_BITS / 128 else 64
    tables["bits"] = {
        "splitq": config,
        **{f"{peer}, groups of {size}": replace(method_config(peer, config), group_size=size) for peer in PEERS},
    }
    tables["options"] = {"default": config, **dict(_options(config))}
    return tables[table]


def _extra_bits(config: QuantConfig) -> float:
    """Bits a weight that SplitQ stores in a square site beside the main ones: U, V and the outliers' higher width."""
    correction, split = config.correction, config.split
    factors = 2 * max(correction.cws_ratio, correction.mac_ratio) * correction.bits
    return factors + 2 * split.ratio * (split.bits - config.bits)


def _options(config: QuantConfig) -> Iterator[tuple[str, QuantConfig]]:
    """The recipe with each option at each of its other values, by "setting=value"."""
    changes: dict[str, tuple[Any, ...]] = {
        "learning.balance": ("none", "mbq", "answers"),
        "learning.propagate": ("float", "quantized"),
        "rounding": ("nearest", "gptq", "gptaq"),
        "clip.weight": ("none", "search"),
        "clip.activation": ("none", "search"),
        "scale": ("none", "smoothquant"),
        "correction.mac_rows": ("text", "all"),
        "group_size": (0, 64),
        "activation_symmetric": (True, False) if config.activation_bits < 8 else (True,),
        "kv_cache_bits": (0, 8, 4),
        "vision": ("none", "W8A8", "W4A8", "W4A4"),
        "lm_head": ("none", "W8A8", "W6A8", "W4A8"),
    }
    for setting, values in changes.items():
        for value in values:
            changed = _changed(config, setting, value)
            if changed != config:
                yield f"{setting}={value}", changed


def _changed(config: QuantConfig, setting: str, value: Any) -> QuantConfig:
    section, _, name = setting.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
