"""Pictures cut into tiles on a grid that suits their shape (LLaVA-NeXT's "anyres"): which feature rows become tokens.

The picture is fitted into the best of a list of resolutions, padded, and cut into square tiles; a small copy of the
whole comes first. Behind the vision encoder the rows of all tiles make one map; what is padding is cut off, a map of
too many rows shrinks, and a learned row ends every line: a weighted choice of rows, worked out here on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grids:
    """What a family cuts into.

    Attributes:
        resolutions: heights and widths that it may choose from, in pixels.
        tile: height and width of a tile in pixels.
        side: feature rows a tile has on a side.
        most_tiles: a map of more rows than so many tiles have, by a margin, shrinks to them; 0: none does.
    """

    resolutions: tuple[tuple[int, int], ...]
    tile: int
    side: int
    most_tiles: int = 0

    def of(self, size: Sequence[int]) -> tuple[int, int]:
        """Tiles in height and width of a picture of so many pixels in height and width."""
        height, width = (int(length) for length in size)

        def fit(resolution: tuple[int, int]) -> tuple[int, int]:
            """Pixels of the picture that it keeps, then pixels that it wastes; the most and the least is best."""
            scale = min(resolution[1] / width, resolution[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - resolution[0] * resolution[1]

        best = max(self.resolutions, key=fit)  # of equal ones the first
        return best[0] // self.tile, best[1] // self.tile

    def tiles(self, sizes: np.ndarray, cut: Sequence[bool]) -> list[int]:
        """Tiles of each picture with its small copy; one of a picture that is not cut."""
        return [math.prod(self.of(size)) + 1 if cuts else 1 for size, cuts in zip(sizes, cut, strict=True)]

    def lines(self, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The lines of a picture's map behind its small copy.

        Args:
            size: pixels in height and width of the picture.

        Returns:
            rows int64 and weights float32, [height, width, 4] each: a token of the map is the weighted sum of four
            feature rows, counted from the first of the tiles behind the small copy.
        """
        down, across = self.of(size)
        y, x = np.indices((down * self.side, across * self.side))
        tile = y // self.side * across + x // self.side
        rows = tile * self.side**2 + y % self.side * self.side + x % self.side
        return self._shrunk(self._unpadded(rows, size))

    @staticmethod
    def _unpadded(rows: np.ndarray, size: Sequence[int]) -> np.ndarray:
        height, width = (int(length) for length in size)
        full_height, full_width = rows.shape
        if width / height > full_width / full_height:
            padding = (full_height - int(round(height * (full_width / width), 7))) // 2
            return rows[padding : full_height - padding]
        padding = (full_width - int(round(width * (full_height / height), 7))) // 2
        return rows[:, padding : full_width - padding]

    def _shrunk(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = rows.shape
        ratio = math.sqrt(height * width / (self.most_tiles * self.side**2)) if self.most_tiles else 0.0
        if ratio <= 1.1:
            weights = np.zeros((*rows.shape, 4), np.float32)
            weights[..., 0] = 1
            return np.repeat(rows[..., None], 4, -1), weights
        down = bilinear_taps(height, int(height // ratio))
        across = bilinear_taps(width, int(width // ratio))
        taps = [rows[np.ix_(y, x)] for y, _ in down for x, _ in across]
        shares = [np.outer(first, second) for _, first in down for _, second in across]
        return np.stack(taps, -1), np.stack(shares, -1).astype(np.float32)


def bilinear_taps(size: int, target: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Resampling of an axis, half-pixel centres: of either tap, place and weight by target position."""
    source = np.maximum((np.arange(target) + 0.5) * (size / target) - 0.5, 0)
    lower = np.minimum(source.astype(np.int64), size - 1)
    share = source - lower
    return [(lower, 1 - share), (np.minimum(lower + 1, size - 1), share)]


def token_rows(sizes: np.ndarray, cut: Sequence[bool], grids: Grids) -> list[tuple[np.ndarray, np.ndarray]]:
    """Feature rows that each picture's tokens are made of.

    Args:
        sizes: [pictures, 2] pixels in height and width.
        cut: whether each picture is cut.
        grids: see there.

    Returns:
        By picture, rows int64 and weights float32 [tokens, 4]. Rows count those of all tiles of all pictures; the
        number behind the last is the learned row that ends a line.
    """
    tiles, per_tile = grids.tiles(sizes, cut), grids.side**2
    newline, start, pictures = sum(tiles) * per_tile, 0, []
    for size, cuts, count in zip(sizes, cut, tiles, strict=True):
        small = np.arange(start, start + per_tile)
        rows, weights = _plain(small)
        if cuts:
            map_rows, map_weights = grids.lines(size)
            ends, ones = _plain(np.full(len(map_rows), newline))
            map_rows = np.concatenate([map_rows + start + per_tile, ends[:, None]], 1).reshape(-1, 4)
            map_weights = np.concatenate([map_weights, ones[:, None]], 1).reshape(-1, 4)
        else:
            map_rows, map_weights = _plain(np.array([newline]))
        pictures.append((np.concatenate([rows, map_rows]), np.concatenate([weights, map_weights])))
        start += count * per_tile
    return pictures


def _plain(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row by itself as a weighted sum of four."""
    weights = np.zeros((len(rows), 4), np.float32)
    weights[:, 0] = 1
    return np.repeat(rows[:, None], 4, 1), weights
