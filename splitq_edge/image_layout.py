"""How a family lays out its pictures: from what its processor makes to what the vision graph takes.

An export keeps it in export.json, so that whoever runs the graphs knows what to feed without knowing the family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from splitq_edge.anyres import Grids, token_rows
from splitq_edge.errors import ArtifactError
from splitq_edge.mrope import mrope_positions
from splitq_edge.patches import frame_segments, grid_taps, patch_positions, window_segments
from splitq_edge.tiles import image_tiles, model_pixels

if TYPE_CHECKING:
    from splitq_edge.adapters.adapter import ModelAdapter

Arrays = dict[str, np.ndarray]
SIZES = {  # what a processor says of the pictures beside their pixels, by kind
    "anyres": ("image_sizes", "batch_num_images"),
    "patches": ("image_grid_thw",),
}


@dataclass(frozen=True)
class ImageLayout:
    """What must be known of a family's pictures to run its exported graphs.

    Attributes:
        kind: "images", "tiles", "anyres" or "patches", see `ModelAdapter.pixel_layout`.
        merge_size: patches: how many an image token has on a side.
        grid_side: patches: rows and columns of the square grid of learned positions; 0: there is none.
        window: patches: image tokens on a side of a window of local attention; 0: all attention is global.
        answer_apart: the answer's tokens are put behind the processed prompt, as in a family whose processor closes the
            prompt itself.
        mrope: the language model's positions are those of `splitq_edge.mrope`.
        resolutions: anyres: see `splitq_edge.anyres.Grids`; so the three below.
        tile: see resolutions.
        side: see resolutions.
        most_tiles: see resolutions.
    """

    kind: str
    merge_size: int = 1
    grid_side: int = 0
    window: int = 0
    mrope: bool = False
    answer_apart: bool = False
    resolutions: tuple[tuple[int, int], ...] = ()
    tile: int = 0
    side: int = 0
    most_tiles: int = 0

    @classmethod
    def of(cls, adapter: ModelAdapter, config: Any) -> ImageLayout:
        """Read it from a model's adapter and configuration."""
        vision: Any = getattr(config, "vision_config", None)
        if adapter.pixel_layout == "anyres":
            limit = getattr(config, "vision_aspect_ratio", "")  # "anyres_max_9"
            return cls(
                "anyres",
                resolutions=tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints),
                tile=vision.image_size,
                side=vision.image_size // vision.patch_size,
                most_tiles=int(limit.rpartition("_")[2]) if limit.startswith("anyres_max_") else 0,
            )
        if adapter.pixel_layout != "patches":
            return cls(adapter.pixel_layout, answer_apart=adapter.bidirectional == "prompt")
        local = getattr(vision, "fullatt_block_indexes", None) is not None
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size if local else 0
        side = math.isqrt(getattr(vision, "num_position_embeddings", 0))
        return cls("patches", merge_size=vision.spatial_merge_size, grid_side=side, window=window, mrope=adapter.mrope)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ImageLayout:
        """Read it from export.json.

        Raises:
            ArtifactError: the file says something that this version does not know.
        """
        try:
            resolutions = tuple(tuple(entry) for entry in stored.get("resolutions", ()))
            return cls(**{**stored, "resolutions": resolutions})
        except TypeError as error:
            raise ArtifactError(
                f"export.json: image_layout: expected {', '.join(cls.__dataclass_fields__)}, got "
                f"{', '.join(stored)}; update splitq-edge or export the model again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """For export.json."""
        return asdict(self)

    @property
    def _grids(self) -> Grids:
        return Grids(self.resolutions, self.tile, self.side, self.most_tiles)

    @property
    def names(self) -> tuple[str, ...]:
        """Arrays that `pictures` may give."""
        return ("pixel_values", *SIZES.get(self.kind, ()))

    @property
    def flat(self) -> bool:
        """Whether pictures have different numbers of image tokens: image_features is [rows, hidden] then."""
        return self.kind in ("anyres", "patches")

    def pictures(self, processed: Mapping[str, Any]) -> Arrays:
        """The pictures of what a processor made of one or several chats; empty without a picture.

        Those of several calls can be joined along the first axis, array by array.
        """
        if "pixel_values" not in processed:
            return {}
        sizes = SIZES.get(self.kind, ())
        arrays = {name: np.asarray(processed[name]).astype(np.int64) for name in sizes if name in processed}
        pixels, mask = np.asarray(processed["pixel_values"]), processed.get("pixel_attention_mask")
        if self.kind == "anyres" and pixels.ndim == 5:  # filled up to the picture with the most tiles
            counts = self._grids.tiles(arrays["image_sizes"], _cut(arrays))
            pixels = np.concatenate([tiles[:count] for tiles, count in zip(pixels, counts, strict=True)])
        pixels = image_tiles(pixels, None if mask is None else np.asarray(mask))
        return {"pixel_values": pixels.astype(np.float32, copy=False), **arrays}

    def model_inputs(self, pictures: Arrays) -> Arrays:
        """`pictures` as the transformers model takes them."""
        if self.kind != "tiles" or not pictures:
            return pictures
        return {"pixel_values": model_pixels(pictures["pixel_values"][:, None])}

    def graph_inputs(self, pictures: Arrays) -> Arrays:
        """`pictures` as the vision graph takes them."""
        if self.kind == "anyres":
            chosen = token_rows(pictures["image_sizes"], _cut(pictures), self._grids)
            rows, weights = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
            return {"pixel_values": pictures["pixel_values"], "token_rows": rows, "token_weights": weights}
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
        if self.grid_side:
            inputs["grid_rows"], inputs["grid_weights"] = grid_taps(grids, self.merge_size, self.grid_side)
        return inputs

    def axes(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of `graph_inputs` by name."""
        if self.kind == "anyres":
            return {"pixel_values": {0: "images"}, "token_rows": {0: "rows"}, "token_weights": {0: "rows"}}
        if self.kind != "patches":
            return {"pixel_values": {0: "images"}}
        axes = {
            "pixel_values": {0: "patches"},
            "patch_positions": {0: "patches"},
            "frames": {0: "frames", 1: "frame_patches"},
        }
        if self.window:
            axes["windows"] = {0: "windows"}
        if self.grid_side:
            axes |= {"grid_rows": {0: "patches"}, "grid_weights": {0: "patches"}}
        return axes

    def rows(self, pictures: Arrays) -> list[int]:
        """Image tokens of each picture of a flat layout."""
        if self.kind == "anyres":
            return [len(rows) for rows, _ in token_rows(pictures["image_sizes"], _cut(pictures), self._grids)]
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


def _cut(pictures: Mapping[str, np.ndarray]) -> list[bool]:
    """Whether each anyres picture is cut.

    A family that says of every chat how many pictures it has leaves those of a chat with several whole.
    """
    chats = pictures.get("batch_num_images")
    if chats is None:
        return [True] * len(pictures["image_sizes"])
    return [count == 1 for count in chats.tolist() for _ in range(count)]


def join(pictures: Sequence[Arrays]) -> Arrays:
    """The pictures of several calls of `ImageLayout.pictures` as those of one; empty entries have none."""
    filled = [entry for entry in pictures if entry]
    return {name: np.concatenate([entry[name] for entry in filled]) for name in (filled[0] if filled else ())}
