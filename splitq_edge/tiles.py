"""Pixels of images as the vision encoder takes them, from what a processor makes of them."""

from __future__ import annotations

import numpy as np

from splitq_edge.errors import SplitQError


def image_tiles(pixel_values: np.ndarray, pixel_attention_mask: np.ndarray | None = None) -> np.ndarray:
    """Pixels of all images in reading order, the empty tiles that fill a processor's batch left out.

    Args:
        pixel_values: float; [images, 3, height, width], or [chats, tiles, 3, height, width] of a processor that cuts an
            image into tiles. Another rank is returned as it is.
        pixel_attention_mask: [chats, tiles, height, width], 0 where a tile is empty; none: no tile is.

    Returns:
        [images or tiles, 3, height, width].

    Raises:
        SplitQError: a tile is filled in part, which an exported vision encoder cannot tell.
    """
    if pixel_values.ndim != 5:
        return pixel_values
    tiles = pixel_values.reshape(-1, *pixel_values.shape[2:])
    if pixel_attention_mask is None:
        return tiles
    mask = pixel_attention_mask.reshape(len(tiles), -1).astype(bool)
    filled = mask.any(-1)
    if not np.array_equal(filled, mask.all(-1)):
        raise SplitQError(
            f"image: expected tiles filled to the edge, got one of {tiles.shape[2]} x {tiles.shape[3]} pixels with "
            "padding; give the processor a size that its max_image_size divides"
        )
    return tiles[filled]


def model_pixels(pixel_values: np.ndarray, pixel_attention_mask: np.ndarray | None = None) -> np.ndarray:
    """The same in the rank that the transformers model takes: tiles as chats of one tile, [tiles, 1, 3, height, width].

    The model puts the features of all tiles into the image tokens in their order, whatever chat they came with, so
    chats with different numbers of tiles can be joined along the first axis. It takes tiles of nothing but zeros for
    empty ones; one that is not (a grey or black picture, as mean and scale of the processor are) gets a first value
    too small to change any sum.
    """
    tiles = image_tiles(pixel_values, pixel_attention_mask)
    if pixel_values.ndim != 5:
        return tiles
    zero = ~tiles.any(axis=(1, 2, 3))
    if zero.any():
        tiles = tiles.copy()
        tiles[zero, 0, 0, 0] = np.finfo(np.float32).tiny
    return tiles[:, None]
