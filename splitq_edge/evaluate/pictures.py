"""Sets of questions whose pictures are made or unpacked by us: one folder of PNG files a set, made once.

The folder is `$SPLITQ_DATA` or `~/.cache/splitq-edge`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.tasks import Question

SIZE = 96  # of drawn pictures, in pixels a side
SPLITS = {"train": 0, "test": 1, "validation": 2}
COUNTS = {"train": 2000, "test": 1000}


@dataclass(frozen=True)
class Example:
    """A question with its picture in memory.

    Attributes:
        pixels: [height, width, 3] uint8.
        text: the question.
        answer: the one right answer, lower case.
        type: question type.
    """

    pixels: np.ndarray
    text: str
    answer: str
    type: str


def generator(task: str, split: str, index: int) -> np.random.Generator:
    """Random numbers of one example: other splits and indices never share a stream."""
    name = int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "big")
    return np.random.default_rng([name, SPLITS[split], index])


def data_folder() -> Path:
    """Where data sets are looked for and pictures are kept."""
    folder = os.environ.get("SPLITQ_DATA")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "splitq-edge"


def kept_questions(task: str, split: str, examples: Callable[[], Iterator[Example]]) -> list[Question]:
    """Questions of a set whose pictures are files; the files are made at the first call.

    Args:
        task: name of the set, with a version: a folder that is there is not made again.
        split: "train" or "test".
        examples: makes them, in order.

    Raises:
        SplitQError: the folder cannot be written or is damaged.
    """
    folder = data_folder() / "pictures" / task / split
    index = folder / "questions.jsonl"
    try:
        if not index.is_file():
            _make(folder, examples())
        records = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        return [Question(folder / image, text, answer, kind) for image, text, answer, kind in records]
    except (OSError, ValueError) as error:
        raise SplitQError(
            f"task pictures {folder}: expected a folder that can be made and read ({error}); "
            "delete it or set SPLITQ_DATA"
        ) from error


def _make(folder: Path, examples: Iterator[Example]) -> None:
    from PIL import Image

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with (beside / "questions.jsonl").open("w", encoding="utf-8") as file:
            for number, example in enumerate(examples):
                name = f"{number:05d}.png"
                Image.fromarray(example.pixels).save(beside / name)
                file.write(json.dumps([name, example.text, example.answer, example.type]) + "\n")
        beside.chmod(0o755)
        if (folder / "questions.jsonl").is_file():  # another process was faster
            return
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
