"""The three graphs of an exported vision-language model as torch modules with tensor-only signatures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitq_edge.exporters.attention_masks import (
    additive,
    causal_and_group_masks,
    image_groups,
    near_mask,
    prompt_groups,
)
from splitq_edge.exporters.patch_encoder import PatchEncoder
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext, modality_of
from splitq_edge.quant.kv_cache import HALF_BITS, cache_tensors, dequantize_cache, head_dimension, quantize_cache


def vision_encoder(loaded: LoadedModel) -> nn.Module:
    """The module whose graph makes image rows; its inputs are those of `ImageLayout.graph_inputs`."""
    kinds: dict[str, type[nn.Module]] = {"patches": PatchEncoder, "anyres": AnyresEncoder}
    return kinds.get(loaded.adapter.pixel_layout, VisionEncoder)(loaded)


class VisionEncoder(nn.Module):
    """pixel_values [images, 3, height, width] float32 -> image_features [images, image_tokens, hidden] float32.

    Images are tiles where the family cuts them into tiles, all filled to the edge (`splitq_edge.tiles`): the positions
    of their patches are constants and no patch is masked. transformers' own code would work out both in the graph.

    Runs encoder, feature selection and projector by themselves: transformers' own `get_image_features` turns the batch
    into a Python list, which would fix the number of images in the graph.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.encoder = loaded.model.get_submodule(loaded.adapter.vision_encoder)
        self.projector = loaded.model.get_submodule(loaded.adapter.projector_module)
        self.full = FullTiles(loaded) if loaded.adapter.patch_positions else None
        config = loaded.model.config
        layers = getattr(
            config, "vision_feature_layer", None
        )  # none: what the encoder ends with, its last norm included
        self.layers: list[int] = [layers] if isinstance(layers, int) else list(layers or ())
        self.fold = 1
        if loaded.adapter.downsample_field:
            self.fold = round(1 / getattr(config, loaded.adapter.downsample_field))
            self.layers = [] if self.layers == [-1] else self.layers
        self.drop_class_token = getattr(config, "vision_feature_select_strategy", "full") == "default"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image rows of the language model's input."""
        if self.full is not None:
            with self.full.constants():
                return self.projector(self.encoder(pixel_values, return_dict=True).last_hidden_state)
        if self.layers:
            states = self.encoder(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
            rows = torch.cat([states[layer] for layer in self.layers], -1)
        else:
            rows = self.encoder(pixel_values, return_dict=True).last_hidden_state
        rows = rows[:, int(self.drop_class_token) :]  # [images, patches, width]
        return self.projector(folded(rows, self.fold))  # [images, image_tokens, hidden]


def folded(rows: torch.Tensor, fold: int) -> torch.Tensor:
    """Squares of fold x fold patches as one row each: [images, side ** 2, width] -> [images, rows, width * fold ** 2].

    The patches of a square become channels in reading order, and so do the squares.
    """
    if fold == 1:
        return rows
    side = round(rows.shape[1] ** 0.5)
    squares = rows.unflatten(1, (side // fold, fold, side // fold, fold))  # down, in it, across, in it
    return squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


class AnyresEncoder(nn.Module):
    """Tiles of all pictures -> image rows of the language model.

    pixel_values [images, 3, height, width] float32, token_rows int64 [rows, 4] and token_weights float32 [rows, 4]
    (`splitq_edge.anyres`) -> image_features [rows, hidden] float32: weighted sums of the tiles' rows and of the learned
    row behind them that ends a line.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.tiles = VisionEncoder(loaded)
        self.line_end = loaded.model.get_parameter(loaded.adapter.line_end)

    def forward(
        self, pixel_values: torch.Tensor, token_rows: torch.Tensor, token_weights: torch.Tensor
    ) -> torch.Tensor:
        """Image rows in the order of the pictures, [rows, hidden]."""
        rows = torch.cat([self.tiles(pixel_values).flatten(0, 1), self.line_end[None]])
        return (rows[token_rows] * token_weights[..., None]).sum(1)


class FullTiles(nn.Module):
    """Constants of a vision encoder whose tiles are all filled to the edge."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self._positions = loaded.model.get_submodule(loaded.adapter.patch_positions)
        self._masked = loaded.model.get_submodule(loaded.adapter.patch_encoder)
        encoder = loaded.model.get_submodule(loaded.adapter.vision_encoder)
        size = int(loaded.model.config.vision_config.image_size)
        self.register_buffer("rows", self._rows(encoder, size))  # [1, patches, hidden]

    def _rows(self, encoder: nn.Module, size: int) -> torch.Tensor:
        """Position embeddings of the patches of one tile."""
        rows: list[torch.Tensor] = []

        def catch(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            rows.append(output.detach().clone())
            raise _Reached

        handle = self._positions.register_forward_hook(catch)
        try:
            with suppress(_Reached), torch.no_grad():
                encoder(torch.zeros(1, 3, size, size))
        finally:
            handle.remove()
        return rows[0]

    @contextmanager
    def constants(self) -> Iterator[None]:
        """Within the block the encoder takes them."""

        def unmasked(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": None}

        handles = (
            self._positions.register_forward_hook(lambda *_: self.rows),
            self._masked.register_forward_pre_hook(unmasked, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Reached(Exception):
    """The positions are known; nothing behind them needs to run."""


class EmbedTokens(nn.Module):
    """input_ids [batch, sequence], image_features -> inputs_embeds [batch, sequence, hidden], modality int8.

    image_features is [images, image_tokens, hidden], or [rows, hidden] where pictures have different numbers of rows;
    the rows replace the image tokens in reading order. A text-only prompt passes none. With deepstack a row is wider
    than an embedding, which zeros fill up.
    """

    def __init__(self, embedding: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.image_token_id = image_token_id

    def forward(self, input_ids: torch.Tensor, image_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up tokens and merge the image rows."""
        is_image = input_ids == self.image_token_id
        embeds = self.embedding(input_ids.masked_fill(is_image, 0))  # the image token may lie beyond the vocabulary
        width = image_features.shape[-1]
        embeds = nn.functional.pad(embeds, (0, width - embeds.shape[-1]))
        # One spare row keeps the gather valid without images; image tokens beyond the features are an error there.
        rows = torch.cat([image_features.reshape(-1, width), torch.zeros(1, width)])
        index = is_image.reshape(-1).long().cumsum(0).reshape(input_ids.shape) - 1
        merged = torch.where(is_image.unsqueeze(-1), rows[index.clamp(min=0)], embeds)
        return merged, modality_of(input_ids, self.image_token_id)


class Decoder(nn.Module):
    """One step of the language model with its key-value cache.

    inputs_embeds [batch, sequence, hidden], attention_mask int64 [batch, past + sequence], position_ids int64
    [batch, sequence] or with three axes (mRoPE) [3, batch, sequence], modality int8 [batch, sequence] (if the scheme
    or the family reads it), prompt int8 [batch, sequence] (1 for tokens of the prompt, where these see each other),
    past key and value of every layer [batch, kv_heads, past, head_dim] -> logits [batch, sequence, vocabulary] and the
    grown cache.

    With deepstack, inputs_embeds is [batch, sequence, hidden * (1 + depths)]: the embedding, then what image tokens get
    added behind the first, the second, ... block.

    With `kv_cache_bits` the past comes and goes as integers and scales (`quantize_cache`). A token is quantized once,
    when it enters the cache; the tokens of the running call see each other in float32. With 16 bits it is rounded to
    float16.
    """

    def __init__(self, loaded: LoadedModel, *, with_modality: bool, kv_cache_bits: int = 0) -> None:
        super().__init__()
        self.language_model = loaded.model.get_submodule(loaded.adapter.language_model)
        self.lm_head = loaded.model.get_submodule(loaded.adapter.lm_head)
        self.with_modality = with_modality
        self.kv_cache_bits = kv_cache_bits
        self.context: ModalityContext = loaded.context
        self.bidirectional = loaded.adapter.bidirectional
        self.config = loaded.text_config

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, ...]],
        modality: torch.Tensor | None = None,
        prompt: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Logits of every position, then the present tensors of every layer, in the order of `cache_tensors`."""
        from transformers import DynamicCache

        embeds, *deeper = inputs_embeds.split(self.config.hidden_size, -1)
        with self.context.using(modality), self._adding(deeper):
            output = self.language_model(
                inputs_embeds=embeds,
                attention_mask=self._masks(attention_mask, modality, prompt),
                position_ids=position_ids,
                past_key_values=DynamicCache([self._float_layer(layer) for layer in past]),
                use_cache=True,
            )
        present: list[torch.Tensor] = []
        for before, layer in zip(past, output.past_key_values.layers, strict=True):
            present += self._present(before, layer.keys, layer.values)
        return (self._capped(self.lm_head(output.last_hidden_state)), *present)

    @contextmanager
    def _adding(self, deeper: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the block the first layers add these to what they give; text tokens have zeros there."""
        handles = [
            layer.register_forward_hook(lambda _module, _args, output, more=more: output + more)
            for layer, more in zip(self.language_model.layers, deeper, strict=False)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        limit = getattr(self.config, "final_logit_softcapping", None)
        return logits if limit is None else torch.tanh(logits / limit) * limit

    def _masks(
        self, attention_mask: torch.Tensor, modality: torch.Tensor | None, prompt: torch.Tensor | None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the language model takes as attention mask; by kind of layer where it has layers of both kinds."""
        if self.bidirectional == "image":
            assert modality is not None
            groups = image_groups(modality)
        elif self.bidirectional == "prompt":
            assert prompt is not None
            groups = prompt_groups(prompt)
        else:
            return attention_mask
        causal, together = causal_and_group_masks(attention_mask, groups)
        full = additive(causal | together, attention_mask)
        if "sliding_attention" not in (getattr(self.config, "layer_types", None) or ()):
            return full
        near = near_mask(attention_mask, groups.shape[1], self.config.sliding_window)
        # A picture's tokens see no further than the window; a prompt sees itself whole.
        seen = near & (causal | together) if self.bidirectional == "image" else (near & causal) | together
        return {"full_attention": full, "sliding_attention": additive(seen, attention_mask)}

    def _float_layer(self, layer: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Past key and value of a layer, [batch, kv_heads, past, head_dim] float32."""
        if not self.kv_cache_bits:
            return layer[0], layer[1]
        if self.kv_cache_bits == HALF_BITS:
            return layer[0].float(), layer[1].float()
        key, key_scale, value, value_scale = layer
        bits = self.kv_cache_bits
        return dequantize_cache(key, key_scale, bits), dequantize_cache(value, value_scale, bits)

    def _present(
        self, past: tuple[torch.Tensor, ...], keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The layer's grown cache: the past as it came, only the new tokens quantized."""
        if not self.kv_cache_bits:
            return keys, values
        if self.kv_cache_bits == HALF_BITS:
            return keys.half(), values.half()
        grown: list[torch.Tensor] = []
        for codes, scale, states in ((*past[:2], keys), (*past[2:], values)):
            new = states[:, :, codes.shape[2] :]  # [batch, kv_heads, sequence, head_dim]
            new_codes, new_scale = quantize_cache(new, self.kv_cache_bits)
            grown += [torch.cat([codes, new_codes], 2), torch.cat([scale, new_scale], 2)]
        return tuple(grown)


@dataclass(frozen=True)
class CacheShape:
    """Shape of the key-value cache.

    Attributes:
        layers: decoder layers.
        heads: key-value heads.
        head_dim: channels a head.
        bits: 0 for float32, 16 for float16, 8 or 4 for integers.
    """

    layers: int
    heads: int
    head_dim: int
    bits: int = 0

    @classmethod
    def of(cls, config: Any, bits: int = 0) -> CacheShape:
        """Read it from a language model's configuration."""
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dimension(config), bits)

    @property
    def dtype(self) -> str:
        """Type of the stored keys and values."""
        return {0: "float32", HALF_BITS: "float16", 8: "int8", 4: "uint8"}[self.bits]

    def names(self, prefix: str) -> list[str]:
        """Names of the cache tensors: `<prefix>.<layer>.key`, ..., see `cache_tensors`."""
        return [f"{prefix}.{layer}.{kind}" for layer in range(self.layers) for kind in cache_tensors(self.bits)]

    def random(self, batch: int, past: int, generator: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
        """A random cache of `past` tokens, for tracing and parity samples."""
        shape = (batch, self.heads, past, self.head_dim)
        layers: list[tuple[torch.Tensor, ...]] = []
        for _ in range(self.layers):
            layer = [torch.randn(shape, generator=generator) for _ in range(2)]
            if self.bits == HALF_BITS:
                layer = [states.half() for states in layer]
            elif self.bits:
                layer = [part for states in layer for part in quantize_cache(states, self.bits)]
            layers.append(tuple(layer))
        return layers
