"""From a calibration to a model whose language linears, and others if the recipe says so, are quantized sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from splitq_edge.calibration.extra_sites import place_extra, wanted_extras
from splitq_edge.calibration.runner import place_sites
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.config import QuantConfig
from splitq_edge.loading import LoadedModel, tied
from splitq_edge.modules.quantized_embedding import HeadEmbedding, QuantizedEmbedding, can_share
from splitq_edge.modules.split_linear import SplitLinear


@dataclass(frozen=True)
class QuantizedModel:
    """A model whose language linears have been replaced.

    Attributes:
        loaded: the model, changed in place.
        config: the recipe.
        sites: quantized sites of the language blocks by name, in the order of the blocks.
        reports: report of every block, see `BlockRecord`.
        extras: quantized sites beside the language blocks, by "vision" and "lm_head" and then by name; only what the
            recipe quantizes.
        extra_reports: their reports, likewise.
    """

    loaded: LoadedModel
    config: QuantConfig
    sites: dict[str, SplitLinear]
    reports: list[dict[str, Any]]
    extras: dict[str, dict[str, SplitLinear]] = field(default_factory=dict)
    extra_reports: dict[str, dict[str, Any]] = field(default_factory=dict)


def assemble(loaded: LoadedModel, config: QuantConfig, state: CalibrationState) -> QuantizedModel:
    """Put the sites of a finished calibration in place of the model's linears.

    Args:
        loaded: the float model; changed in place.
        config: the recipe of the calibration.
        state: all blocks finished.

    Raises:
        ArtifactError: a block's file is damaged or missing.
    """
    quantized = QuantizedModel(loaded, config, {}, [])
    one_weight = tied(loaded)
    for index, block in enumerate(loaded.language_blocks()):
        record = state.load(index, loaded.context)
        place_sites(loaded.adapter, index, block, record.sites)
        quantized.sites.update(record.sites)
        quantized.reports.append(record.report)
    for extra in wanted_extras(config):
        record = state.load_extra(extra, loaded.context)
        place_extra(loaded, extra, record.sites)
        quantized.extras[extra] = record.sites
        quantized.extra_reports[extra] = record.report
    if config.embedding != "none":
        heads = list(quantized.extras.get("lm_head", {}).values()) if one_weight else []
        _place_embedding(loaded, int(config.embedding[1:]), heads[0] if heads else None)
    return quantized


@torch.no_grad()
def _place_embedding(loaded: LoadedModel, bits: int, head: SplitLinear | None) -> None:
    """Put a quantized embedding in place of the model's.

    Args:
        loaded: changed in place.
        bits: 8 or 4; 8 also stands for a shared head of 6 bits.
        head: the quantized output projection that is tied to the embedding, if there is one.
    """
    table = loaded.model.get_input_embeddings()
    if head is not None and can_share(head, bits) and type(table) is nn.Embedding:
        loaded.model.set_input_embeddings(HeadEmbedding(head))
        return
    if tied(loaded):  # the float output projection keeps the weight, which the checkpoint may know by the table's name
        loaded.keep(table, loaded.model.get_submodule(loaded.adapter.lm_head))
    with loaded.having(table):
        # What the module gives and not its weight: some families put a factor on it.
        rows = table(torch.arange(table.weight.shape[0], device=loaded.device))
    loaded.model.set_input_embeddings(QuantizedEmbedding(rows.float(), bits))


def effective_bits(sites: dict[str, SplitLinear]) -> float:
    """Stored bits a weight of the quantized linears, low-rank factors included, scales and transforms not.

    This is the figure to print beside a scheme's label (W4A4 with 2 % + 2 % outlier channels and ranks 2 % / 3 % is
    about 4.4 bits).
    """
    stored = weights = 0
    for site in sites.values():
        for group in site.groups.values():
            stored += group.qweight.numel() * group.bits
        if site.correction is not None:
            stored += (site.correction.u.numel() + site.correction.v.numel()) * site.correction.bits
        weights += site.in_features * site.out_features
    return stored / weights
