"""Ten questions of easy-VQA with our loop's answers, for the tests in Node and in the browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL.Image import Image

from splitq_edge.evaluate.tasks import load_task
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens, open_image
from splitq_edge.runtime_ops.open_model import open_model
from splitq_edge.runtime_ops.session import ExportedModel

QUESTIONS, NEW_TOKENS, EVERY = 10, 64, 37


def our_tokens(model: ExportedModel, picture: Image, text: str, most: int) -> list[int]:
    """The greedy answer of our loop, at most so many tokens."""
    inputs = Generator(model).chat(text, [picture])
    steps = greedy_tokens(
        model,
        inputs["input_ids"].astype(np.int64),
        inputs["attention_mask"],
        model.encode_images(inputs["pixel_values"]),
        max_new_tokens=most,
    )
    return [int(step[0]) for step in steps]


def write_questions(export: Path, path: Path) -> None:
    """A JSON list of {"image": path, "question", "rgba": path of raw pixels, "tokens": greedy tokens}.

    Args:
        export: portable export of easyvqa-tiny.
        path: file to write; the raw pixels go beside it.
    """
    model = open_model(export, native=False, threads=1)
    asked = []
    for number, question in enumerate(load_task("easyvqa", "test")[::EVERY][:QUESTIONS]):
        picture = open_image(question.image)
        raw = path.with_name(f"{number}.rgba")
        raw.write_bytes(np.asarray(picture.convert("RGBA")).tobytes())
        tokens = our_tokens(model, picture, question.text, NEW_TOKENS)
        entry = {"image": str(question.image), "question": question.text, "rgba": str(raw), "tokens": tokens}
        asked.append(entry)
    path.write_text(json.dumps(asked), encoding="utf-8")
