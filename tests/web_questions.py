"""Ten questions of easy-VQA with our loop's answers, for the tests in Node and in the browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from splitq_edge.evaluate.tasks import load_task
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens, open_image
from splitq_edge.runtime_ops.open_model import open_model

QUESTIONS, NEW_TOKENS, EVERY = 10, 64, 37


def write_questions(export: Path, path: Path) -> None:
    """A JSON list of {"image": path, "question", "rgba": path of raw pixels, "tokens": greedy tokens}.

    Args:
        export: portable export of easyvqa-tiny.
        path: file to write; the raw pixels go beside it.
    """
    model = open_model(export, native=False, threads=1)
    generator = Generator(model)
    asked = []
    for number, question in enumerate(load_task("easyvqa", "test")[::EVERY][:QUESTIONS]):
        picture = open_image(question.image)
        raw = path.with_name(f"{number}.rgba")
        raw.write_bytes(np.asarray(picture.convert("RGBA")).tobytes())
        inputs = generator.chat(question.text, [picture])
        steps = greedy_tokens(
            model,
            inputs["input_ids"].astype(np.int64),
            inputs["attention_mask"],
            model.encode_images(inputs["pixel_values"]),
            max_new_tokens=NEW_TOKENS,
        )
        tokens = [int(step[0]) for step in steps]
        entry = {"image": str(question.image), "question": question.text, "rgba": str(raw), "tokens": tokens}
        asked.append(entry)
    path.write_text(json.dumps(asked), encoding="utf-8")
