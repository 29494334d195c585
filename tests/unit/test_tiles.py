"""From a processor's pixels to the vision encoder's: which tiles are pictures, and in what order."""

from __future__ import annotations

import numpy as np
import pytest

from splitq_edge.errors import SplitQError
from splitq_edge.tiles import image_tiles, model_pixels

SIZE = 4


def chats_of_two_and_three_tiles() -> tuple[np.ndarray, np.ndarray]:
    """Pixels and mask of two chats, the first filled up with an empty tile."""
    pixels = np.random.default_rng(0).normal(size=(2, 3, 3, SIZE, SIZE)).astype(np.float32)
    mask = np.ones((2, 3, SIZE, SIZE), np.int64)
    pixels[0, 2], mask[0, 2] = 0, 0
    return pixels, mask


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (96, 1176)])
def test_pixels_that_are_no_tiles_stay_as_they_are(shape: tuple[int, ...]) -> None:
    pixels = np.zeros(shape, np.float32)
    assert image_tiles(pixels) is pixels
    assert model_pixels(pixels) is pixels


def test_tiles_come_in_reading_order_without_the_empty_ones() -> None:
    pixels, mask = chats_of_two_and_three_tiles()
    expected = pixels.reshape(6, 3, SIZE, SIZE)[[0, 1, 3, 4, 5]]
    np.testing.assert_array_equal(image_tiles(pixels, mask), expected)
    np.testing.assert_array_equal(model_pixels(pixels, mask), expected[:, None])
    np.testing.assert_array_equal(image_tiles(pixels[1:]), pixels[1])


def test_a_tile_with_padding_is_refused() -> None:
    pixels, mask = chats_of_two_and_three_tiles()
    mask[1, 0, -1] = 0
    with pytest.raises(SplitQError, match="expected tiles filled to the edge, got one of 4 x 4 pixels with padding;"):
        image_tiles(pixels, mask)


def test_a_picture_of_zeros_is_marked_for_the_model_alone() -> None:
    pixels, mask = chats_of_two_and_three_tiles()
    pixels[1, 1] = 0
    assert not image_tiles(pixels, mask)[3].any()
    marked = model_pixels(pixels, mask)
    assert np.count_nonzero(marked[3]) == 1
    assert 0 < marked[3].max() < 1e-30
    assert not pixels[1, 1].any()  # the caller's stays as it was
