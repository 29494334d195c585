"""Positions of a language model whose rotary embedding turns by time, height and width (multimodal RoPE, Qwen2-VL)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.patches import Grids


def mrope_positions(
    input_ids: np.ndarray, attention_mask: np.ndarray, grids: Grids, *, image_token_id: int, merge_size: int
) -> np.ndarray:
    """Positions of every token.

    Text counts up by one in all three. The tokens of a picture lie on a grid that begins where the text before it
    ended, and the text behind goes on after the largest of their positions.

    Args:
        input_ids: [batch, sequence] int64.
        attention_mask: [batch, sequence] int64, 0 for padding, which takes no position.
        grids: of each picture in reading order: frames, patches in height, patches in width.
        image_token_id: id of the token that image features replace.
        merge_size: patches an image token has on a side.

    Returns:
        [3, batch, sequence] int64: time, height, width; 0 for padding.

    Raises:
        SplitQError: the image tokens are not those of the grids.
    """
    waiting = [_picture([int(size) for size in grid], merge_size) for grid in grids]
    positions = np.zeros((3, *input_ids.shape), np.int64)
    used = 0
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        places = np.flatnonzero(mask)
        now, index = 0, 0
        while index < len(places):
            if ids[places[index]] != image_token_id:
                positions[:, row, places[index]] = now
                now, index = now + 1, index + 1
                continue
            picture = waiting[used] if used < len(waiting) else np.zeros((3, 0), np.int64)
            here = places[index : index + picture.shape[1]]
            if not here.size or here.size < picture.shape[1] or (ids[here] != image_token_id).any():
                wanted, got = sum(grid.shape[1] for grid in waiting), int((input_ids == image_token_id).sum())
                raise SplitQError(
                    f"prompt: expected {wanted} image tokens for {len(waiting)} images, got {got}; "
                    "give one image an image placeholder"
                )
            positions[:, row, here] = now + picture
            now, index, used = now + int(picture.max()) + 1, index + here.size, used + 1
    return positions


def _picture(grid: Sequence[int], merge_size: int) -> np.ndarray:
    """Positions of a picture's image tokens from its own start, [3, tokens] int64."""
    frames, height, width = grid
    return np.indices((frames, height // merge_size, width // merge_size)).reshape(3, -1)
