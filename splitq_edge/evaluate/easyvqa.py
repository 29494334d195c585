"""Questions of easy-VQA: one coloured shape a picture, 13 possible answers.

Source: the PyPI package `easy-vqa` (MIT, https://github.com/vzhou842/easy-VQA), which carries the pictures.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.tasks import Question

SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")


def load(split: str) -> list[Question]:
    """Questions of one split in the order of the package.

    Args:
        split: "train" (38,575 questions, 4,000 images) or "test" (9,673 questions, 1,000 other images).

    Returns:
        Questions of type "shape", "color" or "yesno"; the questions of one image follow each other.

    Raises:
        SplitQError: package easy-vqa is not installed, or its data files are missing or of another form.
    """
    folder = _data_folder() / split
    file = folder / "questions.json"
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        return [
            Question(folder / "images" / f"{int(image)}.png", str(text), str(answer), _type(answer))
            for text, answer, image in records
        ]
    except (OSError, ValueError, TypeError) as error:
        raise SplitQError(
            f"{file}: expected easy-VQA questions as [text, answer, image] ({error}); "
            "pip install --force-reinstall easy-vqa"
        ) from error


def _data_folder() -> Path:
    # Found, not imported: the package reads all its JSON files at import.
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SplitQError(
            "task 'easyvqa': expected package easy-vqa, got none installed; pip install splitq-edge[tasks]"
        )
    return Path(spec.origin).parent / "data"


def _type(answer: str) -> str:
    if answer in YES_NO:
        return "yesno"
    return "shape" if answer in SHAPES else "color"
