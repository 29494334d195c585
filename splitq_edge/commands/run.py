"""`splitq-edge run`: answer one question with an exported folder. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from splitq_edge.runtime_ops.generate import Generator, open_image
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.tiles import image_tiles


def stream_answer(
    out: Path,
    images: tuple[Path, ...],
    prompt: str,
    *,
    native: bool | None,
    threads: int,
    max_new_tokens: int,
) -> Iterator[str]:
    """Pieces of the greedy answer.

    Raises:
        SplitQError: folder, image or prompt is not usable.
    """
    pictures = [open_image(path) for path in images]
    generator = TileGenerator(ExportedModel(out, native=native, threads=threads))
    yield from generator.stream(prompt, pictures, max_new_tokens=max_new_tokens)


class TileGenerator(Generator):
    """A generator that also takes the pixels of processors which cut an image into tiles."""

    def prepare(self, messages: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """See `Generator.prepare`; pixel_values come as the vision encoder takes them, [images or tiles, 3, H, W]."""
        inputs = super().prepare(messages)
        mask = inputs.pop("pixel_attention_mask", None)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = image_tiles(inputs["pixel_values"], mask)
        return inputs
