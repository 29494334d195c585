"""The parts with every size fixed, as torch modules: what an NPU can compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitq_edge.convert import QuantizedModel
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import SitePart, SplitLinear

BLOCKED = -100.0  # attention bias of a slot that is not seen: far below any score, small enough for 16 bits a step
ROTARY = "rotary_emb"


@dataclass(frozen=True)
class StaticSizes:
    """The fixed sizes of a static export.

    Attributes:
        context: tokens that the cache holds.
        chunk: tokens of one prefill call.

    Raises:
        SplitQError: a size is not usable.
    """

    context: int
    chunk: int

    def __post_init__(self) -> None:
        if not 2 <= self.chunk <= self.context:
            raise SplitQError(
                f"static sizes: expected 2 <= chunk <= context, got chunk {self.chunk} and context {self.context}; "
                "change --chunk or --context"
            )


class StaticDecoder(nn.Module):
    """One call of the language model over a fixed number of tokens behind a cache of fixed length.

    inputs_embeds [1, tokens, hidden] float32, attention_bias [1, 1, tokens, context + tokens] float32 (0 for a slot
    that is seen, `BLOCKED` for one that is not; the last `tokens` slots are the call's own tokens), position_ids int32
    [1, tokens], text_rows [1, tokens, 1] float32 (1 for text, 0 for vision; only where MAC reads it), past key and
    value of every layer [1, kv_heads, context, head_dim] -> logits [1, tokens, vocabulary] and the call's own key and
    value of every layer [1, kv_heads, tokens, head_dim], which the caller puts into the cache.
    """

    def __init__(self, loaded: LoadedModel, sizes: StaticSizes) -> None:
        super().__init__()
        self.language_model = loaded.model.get_submodule(loaded.adapter.language_model)
        self.lm_head = loaded.model.get_submodule(loaded.adapter.lm_head)
        self.context: ModalityContext = loaded.context
        self.slots = sizes.context

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_bias: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        text_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Logits of every position, then the new keys and values of every layer."""
        from transformers import DynamicCache

        with self.context.using(text_rows):
            output = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_bias,
                position_ids=position_ids,
                past_key_values=DynamicCache(list(past)),
                use_cache=True,
            )
        new: list[torch.Tensor] = []
        for layer in output.past_key_values.layers:
            new += [layer.keys[:, :, self.slots :], layer.values[:, :, self.slots :]]
        return (self.lm_head(output.last_hidden_state), *new)


class RotaryTable(nn.Module):
    """Rotary position embedding looked up in tables; an NPU has no sine of 16-bit angles."""

    def __init__(self, rotary: nn.Module, positions: int, where: str) -> None:
        super().__init__()
        ids = torch.arange(positions)[None]
        try:
            with torch.no_grad():
                cos, sin = rotary(torch.zeros(1, positions, 1), ids)
        except Exception as error:
            raise SplitQError(
                f"{where}: expected a rotary embedding of one position a token ({error}); "
                "this family has no static graphs yet"
            ) from error
        self.register_buffer("cos", cos[0].clone())  # [positions, head_dim]
        self.register_buffer("sin", sin[0].clone())

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [1, tokens] -> cos, sin [1, tokens, head_dim]; x is not read."""
        tables = (self.get_buffer("cos"), self.get_buffer("sin"))
        cos, sin = (nn.functional.embedding(position_ids, table) for table in tables)
        return cos, sin


class FloatSite(nn.Module):
    """A quantized site with its weights' values and float activations: what the static graph computes before Q and DQ.

    Without activation rounding MAC's residual is zero and CWS is part of the weight (eq. 16-19).
    """

    def __init__(self, site: SplitLinear) -> None:
        super().__init__()
        self.weight = site.dequantized_weight()  # [K, N]
        self.bias = site.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32 -> [..., N] float32."""
        output = x @ self.weight
        return output if self.bias is None else output + self.bias


@contextmanager
def static_model(loaded: LoadedModel, sizes: StaticSizes) -> Iterator[None]:
    """Within the block the model has plain attention and rotary tables, so that its graph is made of simple ops.

    Raises:
        SplitQError: the language model has no rotary embedding of a known form.
    """
    path = f"{loaded.adapter.language_model}.{ROTARY}"
    try:
        rotary = loaded.model.get_submodule(path)
    except AttributeError as error:
        raise SplitQError(
            f"{loaded.adapter.language_model}: expected a module {ROTARY}, found none; "
            "this family has no static graphs yet"
        ) from error
    before = {name: part._attn_implementation for name, part in _configs(loaded).items()}
    loaded.model.set_attn_implementation("eager")
    loaded.model.set_submodule(path, RotaryTable(rotary, sizes.context, path))
    try:
        yield
    finally:
        loaded.model.set_submodule(path, rotary)
        for name, part in _configs(loaded).items():
            part._attn_implementation = before[name]


@contextmanager
def float_sites(quantized: QuantizedModel | None) -> Iterator[None]:
    """Within the block the quantized sites compute with float activations."""
    if quantized is None:
        yield
        return
    model = quantized.loaded.model
    parts = [module for module in model.modules() if isinstance(module, SitePart)]
    sites = {id(part.site): part.site for part in parts}
    floats = {key: FloatSite(site) for key, site in sites.items()}  # type: ignore[arg-type]
    try:
        for part in parts:
            part.site = floats[id(part.site)]
        yield
    finally:
        originals = {id(floats[key]): site for key, site in sites.items()}
        for part in parts:
            part.site = originals[id(part.site)]


def _configs(loaded: LoadedModel) -> dict[str, Any]:
    config = loaded.model.config
    names = {"": config, **{name: getattr(config, name) for name in getattr(config, "sub_configs", {})}}
    return {name: part for name, part in names.items() if part is not None}


def causal_bias(cached: int, tokens: int, slots: int) -> torch.Tensor:
    """Attention bias of a call behind `cached` tokens: [1, 1, tokens, slots + tokens] float32."""
    bias = torch.full((tokens, slots + tokens), BLOCKED)
    bias[:, :cached] = 0
    bias[:, slots:] = torch.triu(torch.full((tokens, tokens), BLOCKED), 1)
    return bias[None, None]
