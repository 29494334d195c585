"""Vision encoder over packed patches as a torch module with tensor-only signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splitq_edge.loading import LoadedModel


class PatchEncoder(nn.Module):
    """Patches of all pictures -> image rows of the language model.

    pixel_values float32 [patches, channels], patch_positions int64 [patches, 2], frames int64 [frames, frame_patches]
    and, where the family has local attention, windows int64 [windows, window_patches] (`splitq_edge.patches`)
    -> image_features float32 [rows, hidden], `merge_size` ** 2 patches a row. Where the family learned positions on a
    square grid, grid_rows int64 and grid_weights float32 [patches, 4] choose from it. Where it hands on features of
    several depths (deepstack), a row is [hidden * (1 + depths)], the last depth's part first.

    Runs the family's blocks by themselves: transformers' own code cuts the patches into Python lists by the values of
    the pictures' sizes, which would fix them in the graph. Attention is over padded tables of patches instead, so one
    graph takes any number of pictures of any size, and local attention costs what its windows cost.
    """

    embed_weight: torch.Tensor
    inverse_frequencies: torch.Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        visual: Any = loaded.model.get_submodule(loaded.adapter.vision_encoder)
        self.visual = visual
        # A convolution whose kernel is its stride is a matrix product over the patch.
        self.register_buffer("embed_weight", visual.patch_embed.proj.weight.detach().flatten(1))
        self.embed_bias = visual.patch_embed.proj.bias
        self.register_buffer("inverse_frequencies", visual.rotary_pos_emb.inv_freq.detach().float())
        self.depths = list(getattr(visual, "deepstack_visual_indexes", ()))
        self.local = getattr(visual, "fullatt_block_indexes", None) is not None

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_positions: torch.Tensor,
        frames: torch.Tensor,
        windows: torch.Tensor | None = None,
        grid_rows: torch.Tensor | None = None,
        grid_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Image rows in the order of the pictures, [rows, hidden]."""
        x = nn.functional.linear(pixel_values, self.embed_weight, self.embed_bias)  # [patches, width]
        if grid_rows is not None and grid_weights is not None:
            x = x + (self.visual.pos_embed(grid_rows) * grid_weights[..., None]).sum(1)
        rotation = self._rotation(patch_positions)
        deeper: list[torch.Tensor] = []
        whole = Segments(frames, x)
        window = whole if windows is None else Segments(windows, x)
        for index, block in enumerate(self.visual.blocks):
            segments = window if self.local and index not in self.visual.fullatt_block_indexes else whole
            x = x + attention(block.attn, block.norm1(x), rotation, segments)
            x = x + block.mlp(block.norm2(x))
            if index in self.depths:
                deeper.append(self.visual.deepstack_merger_list[len(deeper)](x))
        return torch.cat([self.visual.merger(x), *deeper], -1)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every patch, [patches, 1, head_dim]; half the channels turn by row, half by column."""
        angles = (positions.float()[..., None] * self.inverse_frequencies).flatten(1)  # [patches, head_dim / 2]
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()


class Segments:
    """Patches that attend to each other, as a padded table.

    Args:
        table: [segments, longest] int64, -1 for padding; every patch is in one place.
        patches: [patches, width], for their number.
    """

    def __init__(self, table: torch.Tensor, patches: torch.Tensor) -> None:
        count = patches.shape[0]
        real = table >= 0
        self.index = table.clamp(min=0)
        self.mask = real[:, None, None, :]  # of the keys
        flat = torch.where(real, table, count).flatten()  # padding goes to a spare place
        places = torch.zeros_like(patches[:, :1], dtype=torch.long).squeeze(-1)
        places = torch.cat([places, places.new_zeros(1)])
        self.places = places.scatter(0, flat, torch.arange(flat.shape[0]))[:-1]  # [patches], of each in the flat table

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[patches, heads, head_dim] -> [segments, heads, longest, head_dim]."""
        return x[self.index].transpose(1, 2)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """[segments, heads, longest, head_dim] -> [patches, heads * head_dim]."""
        return x.transpose(1, 2).flatten(2).flatten(0, 1)[self.places]


def attention(
    module: nn.Module, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], segments: Segments
) -> torch.Tensor:
    """Attention of a vision block within its segments, [patches, width] -> [patches, width]."""
    heads = int(module.num_heads)  # type: ignore[arg-type]
    query, key, value = module.qkv(x).unflatten(-1, (3, heads, -1)).unbind(1)  # type: ignore[operator]
    cosine, sine = rotation
    query, key = (states * cosine + _rotate_half(states) * sine for states in (query, key))
    states = nn.functional.scaled_dot_product_attention(
        segments.gather(query), segments.gather(key), segments.gather(value), attn_mask=segments.mask
    )
    return module.proj(segments.scatter(states))  # type: ignore[operator]


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
