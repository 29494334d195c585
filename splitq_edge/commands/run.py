"""`splitq-edge run`: answer one question with an exported folder. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from splitq_edge.runtime_ops.generate import Generator, open_image
from splitq_edge.runtime_ops.session import ExportedModel


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
    generator = Generator(ExportedModel(out, native=native, threads=threads))
    yield from generator.stream(prompt, pictures, max_new_tokens=max_new_tokens)
