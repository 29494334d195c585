"""Packed patches and three-axis positions against transformers' own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from families import tiny_model

from splitq_edge.errors import SplitQError
from splitq_edge.mrope import mrope_positions
from splitq_edge.patches import frame_segments, patch_positions, window_segments

GRIDS = {
    "one": [(1, 4, 6)],
    "several": [(1, 8, 12), (1, 2, 2), (1, 14, 4)],
    "frames": [(3, 4, 6), (1, 6, 2)],
}


@pytest.fixture(params=GRIDS)
def grids(request: pytest.FixtureRequest) -> np.ndarray:
    return np.array(GRIDS[request.param])


def segments_of(ends: torch.Tensor, order: np.ndarray) -> list[list[int]]:
    return [order[begin:end].tolist() for begin, end in pairwise(ends.tolist())]


def real(table: np.ndarray) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in table]


def test_positions_and_segments_are_those_of_transformers(grids: np.ndarray) -> None:
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

    sizes = torch.from_numpy(grids)
    np.testing.assert_array_equal(patch_positions(grids, 2), get_vision_position_ids(sizes, 2).numpy())
    patches = np.arange(int(grids.prod(-1).sum()))
    assert real(frame_segments(grids)) == segments_of(get_vision_cu_seqlens(sizes), patches)
    index, ends = get_vision_window_index(sizes, spatial_merge_size=2, window_size=56, patch_size=14)
    order = patches.reshape(-1, 4)[index.numpy()].reshape(-1)
    table = window_segments(grids, 2, 2)
    assert table.shape[1] == 16
    assert real(table) == segments_of(ends, order)


def tokens(grids: list[tuple[int, int, int]], text: int) -> list[int]:
    """Ids of a prompt: image token 3, text between the pictures."""
    ids = [7] * text
    for grid in grids:
        ids += [3] * (int(np.prod(grid)) // 4) + [8, 9]
    return ids


def test_positions_of_a_prompt_are_those_of_transformers() -> None:
    rows = [tokens([(1, 4, 6), (1, 6, 2)], 3), tokens([], 5), tokens([(1, 2, 8)], 1)]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    grids = np.array([(1, 4, 6), (1, 6, 2), (1, 2, 8)])
    got = mrope_positions(ids, mask, grids, image_token_id=3, merge_size=2)
    expected, _ = tiny_model("qwen2_5_vl").model.get_rope_index(
        torch.from_numpy(ids),
        mm_token_type_ids=torch.from_numpy(ids == 3).int(),
        image_grid_thw=torch.from_numpy(grids),
        attention_mask=torch.from_numpy(mask),
    )
    np.testing.assert_array_equal(got * mask, expected.numpy() * mask)
    assert not got[:, mask == 0].any()


def test_pictures_without_text_between_them_each_begin_anew() -> None:
    grids = np.array([(1, 2, 4), (1, 2, 2)])
    got = mrope_positions(np.array([[3, 3, 3, 9]]), np.ones((1, 4), np.int64), grids, image_token_id=3, merge_size=2)
    np.testing.assert_array_equal(got[:, 0].T, [[0, 0, 0], [0, 0, 1], [2, 2, 2], [3, 3, 3]])


@pytest.mark.parametrize("ids", [[3, 3, 9], [3] * 5, [3, 3, 9, 3, 3]])
def test_image_tokens_that_are_not_those_of_the_pictures_are_refused(ids: list[int]) -> None:
    with pytest.raises(SplitQError, match="expected 4 image tokens for 1 images, got"):
        mrope_positions(np.array([ids]), np.ones((1, len(ids)), np.int64), [(1, 4, 4)], image_token_id=3, merge_size=2)
