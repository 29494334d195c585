"""easyvqa-tiny with its ops in Python says what its function bodies say, token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CLOSED_FORM
from rich.console import Console
from web_questions import NEW_TOKENS, QUESTIONS, write_questions

from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.commands.python_ops import use_python_ops
from splitq_edge.config import preset
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens, open_image
from splitq_edge.runtime_ops.open_model import open_model

pytest.importorskip("onnxruntime_extensions", reason="needs onnxruntime-extensions (splitq-edge[pyops])")

MODEL = Path(__file__).resolve().parents[2] / "models" / "easyvqa-tiny"
CASES = [("W4A8", "portable"), ("W3A3", "packed")]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "flavour"), CASES)
def test_answers_are_those_of_the_function_bodies(scheme: str, flavour: str, tmp_path: Path) -> None:
    folder = tmp_path / "easyvqa-tiny"
    config = replace(preset(scheme), learning=CLOSED_FORM)
    options = ExportOptions(str(MODEL), folder, calib_samples=16, flavour=flavour, layout="flat")
    run_export(options, Console(quiet=True), config)
    write_questions(folder, tmp_path / "questions.json")  # asked of the function bodies
    model = open_model(folder, native=False, threads=1)
    use_python_ops(model)
    generator, said, wanted = Generator(model), [], []
    for entry in json.loads((tmp_path / "questions.json").read_text()):
        inputs = generator.chat(entry["question"], [open_image(Path(entry["image"]))])
        ids, features = inputs["input_ids"].astype(np.int64), model.encode_images(inputs["pixel_values"])
        steps = greedy_tokens(model, ids, inputs["attention_mask"], features, max_new_tokens=NEW_TOKENS)
        said.append([int(step[0]) for step in steps])
        wanted.append(entry["tokens"])
    assert len(said) == QUESTIONS
    assert said == wanted
