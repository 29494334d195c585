"""The onnx-community layout in transformers.js, from local files, answers as our loop does. `make test-js` runs it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from builders import CLOSED_FORM
from rich.console import Console
from web_questions import our_tokens

from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.config import preset
from splitq_edge.evaluate.tasks import load_task
from splitq_edge.runtime_ops.generate import open_image
from splitq_edge.runtime_ops.session import ExportedModel

MODEL = Path(__file__).resolve().parents[2] / "models" / "easyvqa-tiny"
NODE_MODULES = os.environ.get("SPLITQ_NODE_MODULES")
QUESTIONS, NEW_TOKENS = 20, 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE_MODULES is None, reason="transformers.js is not installed; run: make test-js"),
]


def test_answers_are_those_of_our_loop(tmp_path: Path) -> None:
    folder = tmp_path / "easyvqa-tiny-W4A8"
    config = replace(preset("W4A8"), learning=CLOSED_FORM)
    options = ExportOptions(str(MODEL), folder, calib_samples=16, layout="onnx-community")
    run_export(options, Console(quiet=True), config)
    questions = load_task("easyvqa", "test")[:QUESTIONS]
    asked = [{"image": str(question.image), "text": question.text} for question in questions]
    (tmp_path / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    command = ["node", "answers.mjs", str(folder), str(tmp_path / "questions.json"), str(NEW_TOKENS)]
    done = subprocess.run(command, cwd=NODE_MODULES, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    model = ExportedModel(folder, native=False)
    assert said == [our_tokens(model, open_image(question.image), question.text, NEW_TOKENS) for question in questions]
    answers = {tuple(tokens) for tokens in said}
    assert len(answers) > 3  # not one answer to everything
