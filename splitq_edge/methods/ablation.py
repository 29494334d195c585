"""The paper's ablations as recipes: components one after the other (table 6) and rules of channel choice (table 4)."""

from __future__ import annotations

from dataclasses import replace

from splitq_edge.config import CHANNEL_RULES, CorrectionConfig, QuantConfig, SplitConfig

TABLES = ("components", "rules", "mac")


def ablation_recipes(config: QuantConfig, table: str) -> dict[str, QuantConfig]:
    """Recipes by row label.

    Args:
        config: SplitQ's recipe at a scheme; what a table does not vary stays as it is there.
        table: "components" (flatquant, +MOCD, +CWS, +MAC), "rules" (no split, then every rule of choice, without
            correction as in the paper) or "mac" (no MAC, text rows, all rows).

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
    return tables[table]
