"""How a family lays out its pictures: from what its processor makes to what the vision graph takes.

An export keeps it in export.json, so that whoever runs the graphs knows what to feed without knowing the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.errors import ArtifactError
from splitq_edge.mrope import mrope_positions
from splitq_edge.patches import frame_segments, patch_positions, window_segments
from splitq_edge.tiles import image_tiles, model_pixels

Arrays = dict[str, np.ndarray]
SIZES = {"patches": "image_grid_thw"}  # what a processor says of the pictures' sizes, by kind


@dataclass(frozen=True)
class ImageLayout:
    """What must be known of a family's pictures to run its exported graphs.

    Attributes:
        kind: "images", "tiles" or "patches", see `ModelAdapter.pixel_layout`.
        merge_size: patches: how many an image token has on a side.
        window: patches: image tokens on a side of a window of local attention; 0: all attention is global.
        mrope: the language model's positions are those of `splitq_edge.mrope`.
    """

    kind: str
    merge_size: int = 1
    window: int = 0
    mrope: bool = False

    @classmethod
    def of(cls, adapter: ModelAdapter, config: Any) -> ImageLayout:
        """Read it from a model's adapter and configuration."""
        if adapter.pixel_layout != "patches":
            return cls(adapter.pixel_layout)
        vision = config.vision_config
        local = getattr(vision, "fullatt_block_indexes", None) is not None
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size if local else 0
        return cls("patches", merge_size=vision.spatial_merge_size, window=window, mrope=adapter.mrope)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ImageLayout:
        """Read it from export.json.

        Raises:
            ArtifactError: the file says something that this version does not know.
        """
        try:
            return cls(**stored)
        except TypeError as error:
            raise ArtifactError(
                f"export.json: image_layout: expected {', '.join(cls.__dataclass_fields__)}, got "
                f"{', '.join(stored)}; update splitq-edge or export the model again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """For export.json."""
        return asdict(self)

    @property
    def flat(self) -> bool:
        """Whether pictures have different numbers of image tokens: image_features is [rows, hidden] then."""
        return self.kind == "patches"

    def pictures(self, processed: Mapping[str, Any]) -> Arrays:
        """The pictures of what a processor made of one or several chats; empty without a picture.

        Those of several calls can be joined along the first axis, array by array.
        """
        if "pixel_values" not in processed:
            return {}
        mask = processed.get("pixel_attention_mask")
        pixels = image_tiles(np.asarray(processed["pixel_values"]), None if mask is None else np.asarray(mask))
        arrays = {"pixel_values": pixels.astype(np.float32, copy=False)}
        if self.kind in SIZES:
            arrays[SIZES[self.kind]] = np.asarray(processed[SIZES[self.kind]]).astype(np.int64)
        return arrays

    def model_inputs(self, pictures: Arrays) -> Arrays:
        """`pictures` as the transformers model takes them."""
        if self.kind != "tiles" or not pictures:
            return pictures
        return {"pixel_values": model_pixels(pictures["pixel_values"][:, None])}

    def token_types(self, input_ids: np.ndarray, image_token_id: int) -> Arrays:
        """What the transformers model wants to know of every token beside its id, [batch, sequence] int64 each."""
        return {"mm_token_type_ids": (input_ids == image_token_id).astype(np.int64)} if self.mrope else {}

    def graph_inputs(self, pictures: Arrays) -> Arrays:
        """`pictures` as the vision graph takes them."""
        if self.kind != "patches":
            return pictures
        grids = pictures["image_grid_thw"]
        inputs = {
            "pixel_values": pictures["pixel_values"],
            "patch_positions": patch_positions(grids, self.merge_size),
            "frames": frame_segments(grids),
        }
        if self.window:
            inputs["windows"] = window_segments(grids, self.merge_size, self.window)
        return inputs

    def axes(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of `graph_inputs` by name."""
        if self.kind != "patches":
            return {"pixel_values": {0: "images"}}
        axes = {
            "pixel_values": {0: "patches"},
            "patch_positions": {0: "patches"},
            "frames": {0: "frames", 1: "frame_patches"},
        }
        if self.window:
            axes["windows"] = {0: "windows"}
        return axes

    def rows(self, pictures: Arrays) -> list[int]:
        """Image tokens of each picture of a flat layout."""
        return [int(grid.prod()) // self.merge_size**2 for grid in pictures["image_grid_thw"]]

    def positions(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, pictures: Arrays, image_token_id: int
    ) -> np.ndarray | None:
        """Positions of a batch's tokens where counting them is not enough, [3, batch, sequence] int64."""
        if not self.mrope:
            return None
        grids = pictures.get("image_grid_thw", np.zeros((0, 3), np.int64))
        return mrope_positions(
            input_ids, attention_mask, grids, image_token_id=image_token_id, merge_size=self.merge_size
        )


def join(pictures: Sequence[Arrays]) -> Arrays:
    """The pictures of several calls of `ImageLayout.pictures` as those of one; empty entries have none."""
    filled = [entry for entry in pictures if entry]
    return {name: np.concatenate([entry[name] for entry in filled]) for name in (filled[0] if filled else ())}
