"""What smolvqa-135m learns from: pictures at 96 x 96, questions as token ids, labels for the vision encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from architecture import FAKE, GLOBAL, GRID, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE
from PIL import Image

from splitq_edge.evaluate import easyvqa, photos, words
from splitq_edge.evaluate.drawing import (
    COLORS,
    SHAPES,
    Thing,
    counting_question,
    counting_scene,
    draw,
    spatial_question,
    spatial_scene,
)
from splitq_edge.evaluate.pictures import generator

TASKS = ("easyvqa", "ocr", "counting", "spatial", "fashion", "cifar10")
HELD_OUT = 1000  # examples (easyvqa: images) of the training data that only validate
QUESTIONS = 4  # of a drawn scene
BINS = 8
CHUNK = 500
EASY_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# What the vision encoder is trained to say of a picture, slot by slot; a picture answers only its task's slots.
SLOTS = (
    ["cifar10", "fashion", "easy shape", "easy color"]
    + [f"letter {index}" for index in range(words.LETTERS[1])]
    + ["count", *(f"count {name}" for name in (*COLORS, *SHAPES))]
    + [f"{axis} {name}" for name in COLORS for axis in "xy"]
)
SLOT = {name: index for index, name in enumerate(SLOTS)}
CLASSES = 27
NO_LABEL = -1
# What a patch shows, for the pictures that we draw: a letter, nothing, or a coloured shape.
GROUND = len(LETTERS)
PATCH_CLASSES = GROUND + 1 + len(COLORS) * len(SHAPES)
CENTRES = np.arange(GRID) * PATCH_SIZE + PATCH_SIZE / 2
WORD_QUESTION = "What word is written here?"  # beside the task's own, which asks for the letters

Row = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Drawn:
    """One picture with what is asked of it.

    Attributes:
        pixels: [96, 96, 3] uint8.
        rows: questions with their answers.
        labels: class by slot name.
        patches: [patches] int8, class of every patch; None where it is not known.
    """

    pixels: np.ndarray
    rows: Sequence[Row]
    labels: dict[str, int]
    patches: np.ndarray | None = None


@dataclass(frozen=True)
class TaskData:
    """A task's examples as tensors on the training device.

    Attributes:
        pixels: [images, 96, 96, 3] uint8.
        labels: [images, slots] int8, `NO_LABEL` where nothing is known.
        patches: [images, patches] int8, likewise.
        image: [rows] int64, the picture of each question.
        ids: [rows, longest] int64, from behind the picture to the end token, 0 behind it.
        length: [rows] int64, tokens of a row.
        answer: [rows] int64, where the answer begins.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    patches: torch.Tensor
    image: torch.Tensor
    ids: torch.Tensor
    length: torch.Tensor
    answer: torch.Tensor

    def to(self, device: torch.device) -> TaskData:
        """The same on another device."""
        return TaskData(**{name: value.to(device) for name, value in vars(self).items()})


def resized(picture: Image.Image) -> np.ndarray:
    """As the image processor scales: Lanczos to 96 x 96."""
    return np.asarray(picture.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def draw_word(split: str, index: int) -> Drawn:
    """A word of a split; every other training picture shows random letters."""
    rng = generator("smolvqa ocr", split, index)
    known = words.words(split)
    word = known[int(rng.integers(len(known)))]
    if split == "train" and index % 2 == 0:
        word = "".join(LETTERS[letter] for letter in rng.integers(26, size=len(word)))
        while words.split_of(word) != "train":
            word = word[::-1] + LETTERS[int(rng.integers(26))]
            word = word[-words.LETTERS[1] :]
    labels = {f"letter {place}": 26 for place in range(words.LETTERS[1])}
    labels |= {f"letter {place}": LETTERS.index(letter) for place, letter in enumerate(word)}
    picture = words.render(word, rng)
    rows = [(WORD_QUESTION, word), (words.QUESTION, words.spelled(word))]
    return Drawn(picture.pixels, rows, labels, _letters_of_patches(word, picture))


def _letters_of_patches(word: str, picture: words.Rendered) -> np.ndarray:
    """[patches] int8: the letter under the middle of each patch."""
    x, y = CENTRES[None, :] - picture.centre[0], CENTRES[:, None] - picture.centre[1]
    cos, sin = np.cos(picture.turn), np.sin(picture.turn)
    along, down = x * cos - y * sin + picture.centre[0], x * sin + y * cos + picture.centre[1]
    letter = np.searchsorted(picture.edges, along, side="right") - 1
    inside = (letter >= 0) & (letter < len(word)) & (down > picture.top - 1) & (down < picture.bottom + 1)
    codes = np.array([LETTERS.index(one) for one in word])
    return np.where(inside, codes[letter.clip(0, len(word) - 1)], GROUND).astype(np.int8).ravel()


def _things_of_patches(things: Sequence[Thing]) -> np.ndarray:
    """[patches] int8: the shape under the middle of each patch."""
    patches = np.full((GRID, GRID), GROUND, np.int8)
    for thing in things:
        near = (CENTRES[None, :] - thing.x) ** 2 + (CENTRES[:, None] - thing.y) ** 2 < (0.85 * thing.radius) ** 2
        kind = list(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
        patches[near] = GROUND + 1 + kind
    return patches.ravel()


def draw_counting(split: str, index: int) -> Drawn:
    """A scene to count in."""
    rng = generator("smolvqa counting", split, index)
    things = counting_scene(rng)
    asked = {counting_question(things, rng)[:2] for _ in range(QUESTIONS)}
    return Drawn(draw(things, rng), sorted(asked), _counts(things), _things_of_patches(things))


def draw_spatial(split: str, index: int) -> Drawn:
    """A scene of shapes beside each other."""
    rng = generator("smolvqa spatial", split, index)
    things = spatial_scene(rng)
    asked = {spatial_question(things, rng)[:2] for _ in range(QUESTIONS)}
    labels = {f"{axis} {color}": BINS for color in COLORS for axis in "xy"}
    for thing in things:
        labels[f"x {thing.color}"] = int(thing.x * BINS / IMAGE_SIZE)
        labels[f"y {thing.color}"] = int(thing.y * BINS / IMAGE_SIZE)
    return Drawn(draw(things, rng), sorted(asked), labels, _things_of_patches(things))


def _counts(things: Sequence[Thing]) -> dict[str, int]:
    labels = {"count": len(things)}
    labels |= {f"count {color}": sum(thing.color == color for thing in things) for color in COLORS}
    return labels | {f"count {shape}": sum(thing.shape == shape for thing in things) for shape in SHAPES}


def drawn_many(make: Callable[[str, int], Drawn], split: str, count: int, workers: int) -> list[Pictures]:
    """So many pictures, made in several processes; the result does not depend on their number."""
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(partial(_some, make, split, count), starts))


def _some(make: Callable[[str, int], Drawn], split: str, count: int, start: int) -> Pictures:
    return stacked([make(split, index) for index in range(start, min(start + CHUNK, count))])


@dataclass(frozen=True)
class Pictures:
    """Several pictures as arrays.

    Attributes:
        pixels: [pictures, 96, 96, 3] uint8.
        labels: [pictures, slots] int8.
        patches: [pictures, patches] int8.
        rows: questions and answers of every picture.
    """

    pixels: np.ndarray
    labels: np.ndarray
    patches: np.ndarray
    rows: list[Sequence[Row]]

    def part(self, chosen: slice) -> Pictures:
        """Some of them."""
        return Pictures(self.pixels[chosen], self.labels[chosen], self.patches[chosen], self.rows[chosen])


def stacked(drawn: Sequence[Drawn]) -> Pictures:
    """Single pictures as arrays."""
    labels = np.full((len(drawn), len(SLOTS)), NO_LABEL, np.int8)
    patches = np.full((len(drawn), GRID * GRID), NO_LABEL, np.int8)
    for number, one in enumerate(drawn):
        for name, value in one.labels.items():
            labels[number, SLOT[name]] = value
        if one.patches is not None:
            patches[number] = one.patches
    return Pictures(np.stack([one.pixels for one in drawn]), labels, patches, [one.rows for one in drawn])


def joined(parts: Sequence[Pictures]) -> Pictures:
    """Several sets as one."""
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "labels", "patches"))
    return Pictures(*arrays, [rows for part in parts for rows in part.rows])


def photos_of(task: str, workers: int) -> Pictures:
    """All training photos of "fashion" or "cifar10"."""
    pixels, names = photos.fashion_mnist("train") if task == "fashion" else photos.cifar10_photos("train")
    order = photos.CLOTHES if task == "fashion" else photos.THINGS
    text = photos.CLOTHES_QUESTION if task == "fashion" else photos.THINGS_QUESTION
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(_resized_many, (pixels[start : start + CHUNK] for start in range(0, len(pixels), CHUNK)))
        large = np.concatenate(list(parts))
    labels = np.full((len(large), len(SLOTS)), NO_LABEL, np.int8)
    labels[:, SLOT[task]] = [order.index(name) for name in names]
    patches = np.full((len(large), GRID * GRID), NO_LABEL, np.int8)
    return Pictures(large, labels, patches, [[(text, name)] for name in names])


def _resized_many(pictures: np.ndarray) -> np.ndarray:
    return np.stack([resized(Image.fromarray(picture)) for picture in pictures])


def easy_scenes() -> Pictures:
    """easy-VQA's training images; shape and colour follow from the questions that name them."""
    found = []
    for path, group in groupby(easyvqa.load("train"), key=lambda question: question.image):
        asked = list(group)
        labels = {}
        for question in asked:
            if question.type == "shape":
                labels["easy shape"] = easyvqa.SHAPES.index(question.answer)
            elif question.type == "color":
                labels["easy color"] = EASY_COLORS.index(question.answer)
        found.append(Drawn(resized(Image.open(path)), [(q.text, q.answer) for q in asked], labels))
    return stacked(found)


def load_task_data(
    task: str, tokenizer: Any, *, words_count: int, scenes_count: int, workers: int
) -> tuple[TaskData, TaskData]:
    """Training and validation data of a task; neither holds a test picture, word or scene."""
    make = {"ocr": draw_word, "counting": draw_counting, "spatial": draw_spatial}.get(task)
    if make is not None:
        count = words_count if task == "ocr" else scenes_count
        kept = joined(drawn_many(make, "train", count, workers))
        held_out = joined(drawn_many(make, "validation", HELD_OUT, workers))
    else:
        whole = easy_scenes() if task == "easyvqa" else photos_of(task, workers)
        cut = len(whole.rows) - (HELD_OUT // 5 if task == "easyvqa" else HELD_OUT)
        kept, held_out = whole.part(slice(cut)), whole.part(slice(cut, None))
    return as_tensors(kept, tokenizer), as_tensors(held_out, tokenizer)


def as_tensors(pictures: Pictures, tokenizer: Any) -> TaskData:
    """Tokenize the questions."""
    kinds = sorted({row for rows in pictures.rows for row in rows})
    known = dict(zip(kinds, tails_of(tokenizer, kinds), strict=True))
    image = [number for number, rows in enumerate(pictures.rows) for _ in rows]
    tails = [known[row][0] for rows in pictures.rows for row in rows]
    starts = [known[row][1] for rows in pictures.rows for row in rows]
    ids = np.zeros((len(tails), max(map(len, tails))), np.int64)
    for index, tokens in enumerate(tails):
        ids[index, : len(tokens)] = tokens
    arrays = pictures.pixels, pictures.labels, pictures.patches, np.array(image), ids
    length, answer = np.array([len(tokens) for tokens in tails]), np.array(starts)
    return TaskData(*(torch.from_numpy(array) for array in (*arrays, length, answer)))


def prefix(tokenizer: Any) -> list[int]:
    """Token ids up to and with the picture's end, the same in every row."""
    text = f"<|im_start|>user\n{FAKE}{GLOBAL}{IMAGE * IMAGE_TOKENS}{FAKE}"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tails_of(tokenizer: Any, rows: Sequence[Row]) -> list[tuple[list[int], int]]:
    """Of every row: token ids from behind the picture to the end token, and where the answer begins among them."""
    asked = [f"{question}<|im_end|>\n<|im_start|>assistant\n" for question, _ in rows]
    whole = [f"{text}{answer}<|im_end|>" for text, (_, answer) in zip(asked, rows, strict=True)]
    before, ids = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (asked, whole))
    for row, first, both in zip(rows, before, ids, strict=True):
        assert both[: len(first)] == first, row
    return [(both, len(first)) for first, both in zip(before, ids, strict=True)]
