"""Which feature rows become the tokens of a picture that is cut into tiles, against transformers' own packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import PINPOINTS, TILE_SIZE, tiny_model

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.anyres import Grids, token_rows
from splitq_edge.image_layout import ImageLayout

SIZES = np.array([(32, 64), (31, 100), (100, 31), (64, 64), (200, 199), (1, 40), (77, 64), (480, 640)])
ROWS = (TILE_SIZE // 8) ** 2


@pytest.fixture(params=["llava_next", "llava_onevision"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def grids_of(model: Any) -> Grids:
    layout = ImageLayout.of(adapter_for(model.config.model_type), model.config)
    return Grids(layout.resolutions, layout.tile, layout.side, layout.most_tiles)


def test_tokens_are_those_of_transformers(model: Any) -> None:
    grids, generator = grids_of(model), torch.Generator().manual_seed(0)
    cut = [index % 4 != 2 for index in range(len(SIZES))]
    tiles = grids.tiles(SIZES, cut)
    features = [torch.randn(count, ROWS, 96, generator=generator) for count in tiles]
    newline = torch.randn(96, generator=generator)
    own: dict[str, str] = {"llava_onevision": {"vision_aspect_ratio": "anyres_max_2"}}.get(
        model.config.model_type, {"vision_feature_select_strategy": "default"}
    )
    expected, _ = model.model.pack_image_features(features, torch.from_numpy(SIZES), image_newline=newline, **own)
    rows = torch.cat([torch.cat(features).flatten(0, 1), newline[None]]).numpy()
    got = token_rows(SIZES, cut, grids)
    assert len(got) == len(expected)
    for (index, weight), wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose((rows[index] * weight[..., None]).sum(1), wanted.numpy(), rtol=0, atol=1e-5)


def test_grids_are_those_of_transformers(model: Any) -> None:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    expected = [get_anyres_image_grid_shape(size.tolist(), PINPOINTS, TILE_SIZE) for size in SIZES]
    assert [grids_of(model).of(size) for size in SIZES] == expected
