"""What easyvqa-tiny learns from: training images of easy-VQA, their questions, and how both are varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from splitq_edge.evaluate.easyvqa import load
from splitq_edge.evaluate.tasks import Question

# Shares of the variations.
MIRRORED, CAPITALISED, WITH_MARK = 0.5, 0.5, 0.5


@dataclass(frozen=True)
class Scene:
    """One training image: a shape on a plain background, and what is asked about it.

    Attributes:
        pixels: [64, 64, 3] uint8.
        background: [3] uint8.
        box: rows and columns of the shape.
        questions: all questions about this image.
    """

    pixels: np.ndarray
    background: np.ndarray
    box: tuple[slice, slice]
    questions: tuple[Question, ...]


def load_scenes(limit: int | None = None) -> list[Scene]:
    """Training images in the order of the package."""
    by_image: dict[Path, list[Question]] = {}
    for question in load("train"):
        by_image.setdefault(question.image, []).append(question)
    return [make_scene(image, questions) for image, questions in list(by_image.items())[:limit]]


def make_scene(image: Path, questions: Sequence[Question]) -> Scene:
    """Read an image and find its shape: what differs from the background, the median colour."""
    with Image.open(image) as file:
        pixels = np.asarray(file.convert("RGB"))
    background = np.median(pixels.reshape(-1, 3), axis=0).astype(np.uint8)
    shape = np.abs(pixels.astype(int) - background).max(axis=-1) > 0  # [64, 64]
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return Scene(pixels, background, box, tuple(questions))


def moved(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene's shape somewhere else, half of the time mirrored: [64, 64, 3] uint8."""
    shape = scene.pixels[scene.box]
    if rng.random() < MIRRORED:
        shape = shape[:, ::-1]
    height, width = shape.shape[:2]
    rows, columns = scene.pixels.shape[:2]
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    pixels = np.broadcast_to(scene.background, scene.pixels.shape).copy()
    pixels[top : top + height, left : left + width] = shape
    return pixels


def reworded(text: str, rng: np.random.Generator) -> str:
    """The question as users type it: first letter lower or upper case, with or without the question mark."""
    if rng.random() < CAPITALISED:
        text = text[:1].upper() + text[1:]
    return text if rng.random() < WITH_MARK else text.rstrip("?")


def name_labels(scenes: Sequence[Scene], kind: str) -> tuple[list[str], torch.Tensor]:
    """What the training questions tell about the shapes ("shape") or the colours ("color") of the images.

    Returns:
        The names, and the index of each scene's name, -1 where no question gives it away: [scenes] int64.
    """
    names = sorted({q.answer for scene in scenes for q in scene.questions if q.type == kind})
    labels = torch.full((len(scenes),), -1)
    for row, scene in enumerate(scenes):
        true_words = set().union(*(_true_words(question) for question in scene.questions))
        for index, name in enumerate(names):
            if name in true_words:
                labels[row] = index
    return names, labels


def _true_words(question: Question) -> set[str]:
    words = set(question.text.rstrip("?").split())
    negated = bool(words & {"no", "not"})
    if question.type == "yesno" and (question.answer == "yes") == negated:
        return set()  # what it mentions is not in the image
    return words | {question.answer}
