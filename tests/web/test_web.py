"""The portable flavour in onnxruntime-node and, on the demo page, in headless Chromium. `make test-web` runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import CLOSED_FORM
from rich.console import Console
from web_questions import QUESTIONS, write_questions

from splitq_edge.commands.demo import make_server
from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.config import preset

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "easyvqa-tiny"
NODE = os.environ.get("SPLITQ_WEB_MODULES")  # folder with node_modules
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
EXPECTED = bool(os.environ.get("SPLITQ_EXPECT_NODE"))
SCREENSHOT = os.environ.get("SPLITQ_WEB_SCREENSHOT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason="the npm packages are not installed; run: make test-web"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "easyvqa-tiny-W4A8"
    config = replace(preset("W4A8"), learning=CLOSED_FORM)
    options = ExportOptions(str(MODEL), folder, calib_samples=16, attention="standard", layout="flat")
    run_export(options, Console(quiet=True), config)
    return folder


@pytest.fixture(scope="module")
def questions(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    write_questions(export, path)
    return path


@pytest.fixture
def url(export: Path) -> Iterator[str]:
    with make_server(export, Path(str(NODE)) / "node_modules", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{server.server_address[0]!s}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def run_node(script: str, *arguments: object) -> str:
    """Standard output of a script beside the modules."""
    place = Path(str(NODE)) / script
    shutil.copyfile(Path(__file__).with_name(script), place)
    command = ["node", str(place), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(questions: Path) -> list[list[int]]:
    return [entry["tokens"] for entry in json.loads(questions.read_text())]


def test_node_says_the_same_tokens(export: Path, questions: Path) -> None:
    lines = run_node("node.mjs", export, questions, ROOT / "docs" / "demo" / "engine.js").splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == QUESTIONS
    assert answers == expected(questions)


@pytest.mark.skipif(CHROMIUM is None and not EXPECTED, reason="Chromium is not installed")
def test_the_page_says_the_same_tokens_and_asks_nobody_else(url: str, questions: Path) -> None:
    assert CHROMIUM is not None, "SPLITQ_EXPECT_NODE=1, but Chromium is not installed"
    found: dict[str, Any] = json.loads(run_node("browser.mjs", url, questions, CHROMIUM, SCREENSHOT))
    assert found["errors"] == []
    assert found["outside"] == []
    assert found["answers"] == expected(questions)
    assert all(found["texts"])
