"""Pictures as packed patches: where each patch lies, and which patches attend to each other.

Processors of this layout cut every picture into patches and list those of all pictures one behind the other, the
`merge_size` x `merge_size` patches that become one image token side by side. What follows from the pictures' sizes is
worked out here, on the host: it depends on values, and a graph has to run for any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Grids = Sequence[Sequence[int]] | np.ndarray  # of each picture: frames, patches in height, patches in width


def patch_positions(grids: Grids, merge_size: int) -> np.ndarray:
    """Row and column of every patch in its picture, [patches, 2] int64."""
    pictures = []
    for frames, height, width in grids:
        order = _merge_order(int(height), int(width), merge_size)
        pictures.append(np.tile(np.stack(np.divmod(order, int(width)), -1), (int(frames), 1)))
    return np.concatenate(pictures).astype(np.int64)


def grid_taps(grids: Grids, merge_size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a square grid of learned positions stretched over each picture, corner to corner: what every patch takes.

    Args:
        grids: see `Grids`.
        merge_size: patches an image token has on a side.
        side: rows and columns of the square grid.

    Returns:
        Rows of the flattened grid, int64, and their weights, float32 (bilinear), [patches, 4] each.
    """
    pictures = []
    for frames, height, width in grids:
        place = patch_positions([(frames, height, width)], merge_size)
        source = place * ((side - 1) / np.maximum([int(height) - 1, int(width) - 1], 1))
        lower = source.astype(np.int64)
        upper, share = np.minimum(lower + 1, side - 1), source - lower
        axes = [((lower[:, axis], 1 - share[:, axis]), (upper[:, axis], share[:, axis])) for axis in (0, 1)]
        taps = [(row * side + column, down * across) for row, down in axes[0] for column, across in axes[1]]
        pictures.append(tuple(np.stack(part, -1) for part in zip(*taps, strict=True)))
    rows, weights = (np.concatenate(part) for part in zip(*pictures, strict=True))
    return rows, weights.astype(np.float32)


def frame_segments(grids: Grids) -> np.ndarray:
    """Patches of every frame, which attend to each other: [frames, most patches of a frame] int64, -1 behind the last.

    A picture is one frame.
    """
    sizes = np.concatenate([np.repeat(int(height) * int(width), int(frames)) for frames, height, width in grids])
    ends = sizes.cumsum()
    return _table([np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)], int(sizes.max()))


def window_segments(grids: Grids, merge_size: int, window: int) -> np.ndarray:
    """Patches of every window, which attend to each other where attention is local.

    Args:
        grids: see `Grids`.
        merge_size: patches an image token has on a side.
        window: image tokens a window has on a side; a picture's last windows may be cut off.

    Returns:
        [windows, (window * merge_size) ** 2] int64, -1 behind the last patch of a window that is cut off.
    """
    unit, windows, start = merge_size**2, [], 0
    for frames, height, width in grids:
        rows, columns = int(height) // merge_size, int(width) // merge_size
        cells = np.arange(rows * columns).reshape(rows, columns)
        for _ in range(int(frames)):
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    inside = cells[top : top + window, left : left + window].reshape(-1, 1)
                    windows.append((start + inside * unit + np.arange(unit)).reshape(-1))
            start += rows * columns * unit
    return _table(windows, window**2 * unit)


def _merge_order(height: int, width: int, merge_size: int) -> np.ndarray:
    """Raster numbers of a frame's patches in the order of the processor."""
    raster = np.arange(height * width).reshape(height // merge_size, merge_size, width // merge_size, merge_size)
    return raster.transpose(0, 2, 1, 3).reshape(-1)


def _table(segments: Sequence[np.ndarray], longest: int) -> np.ndarray:
    table = np.full((len(segments), longest), -1, np.int64)
    for row, segment in zip(table, segments, strict=True):
        row[: len(segment)] = segment
    return table
