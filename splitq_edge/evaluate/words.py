"""The task of reading one rendered word.

Words: the frequency lists of the PyPI package zxcvbn (MIT). Fonts: matplotlib's (DejaVu, STIX, Computer Modern). The
pictures are made by us.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.pictures import COUNTS, SIZE, Example, generator, kept_questions
from splitq_edge.evaluate.tasks import Question

QUESTION = "Spell the word."
LETTERS = (3, 6)  # fewest and most a word
LISTS = ("english_wikipedia", "us_tv_and_film")
SHARE = 10  # one word in so many is a test word, another one a validation word
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmtt10",
)


def ocr(split: str) -> list[Question]:
    """1,000 held-out (2,000 training) words of three to six letters, to be spelled; no word is in both splits."""
    return kept_questions("ocr-2", split, lambda: _examples(split))


def spelled(word: str) -> str:
    """The answer: "w o r d". Letters one by one, so that reading is asked for and not the tokenizer's vocabulary."""
    return " ".join(word)


def _examples(split: str) -> Iterator[Example]:
    found = words(split)
    if split == "test":
        found = tuple(found[index] for index in generator("ocr", split, 0).permutation(len(found)))
    for index in range(COUNTS[split]):
        rng = generator("ocr", split, index + 1)
        word = found[index] if split == "test" else found[int(rng.integers(len(found)))]
        yield Example(render(word, rng).pixels, QUESTION, spelled(word), "word")


@lru_cache
def words(split: str) -> tuple[str, ...]:
    """Lower-case words of one split, in the order of the lists."""
    try:
        from zxcvbn.frequency_lists import FREQUENCY_LISTS
    except ImportError as error:
        raise SplitQError(
            "task 'ocr': expected package zxcvbn, got none installed; pip install splitq-edge[tasks]"
        ) from error
    chosen = [word for name in LISTS for word in FREQUENCY_LISTS[name]]
    low, high = LETTERS
    fits = [w for w in dict.fromkeys(chosen) if low <= len(w) <= high and w.isascii() and w.isalpha()]
    return tuple(word for word in fits if split_of(word) == split)


def split_of(word: str) -> str:
    """The split that a word belongs to, by its hash."""
    return {0: "test", 1: "validation"}.get(hashlib.sha256(word.encode()).digest()[0] % SHARE, "train")


@lru_cache
def _font(name: str, size: int) -> Any:
    from PIL import ImageFont

    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise SplitQError(
            "task 'ocr': expected package matplotlib (its fonts), got none installed; pip install splitq-edge[tasks]"
        )
    return ImageFont.truetype(str(Path(spec.origin).parent / f"mpl-data/fonts/ttf/{name}.ttf"), size)


@dataclass(frozen=True)
class Rendered:
    """A picture of a word and where its letters are.

    Attributes:
        pixels: [96, 96, 3] uint8.
        edges: left edge of every letter and the right edge of the last, in pixels, before the turn.
        top, bottom: upper and lower edge of the word, before the turn.
        centre: x and y of the point that the word is turned about.
        turn: anticlockwise, in radians.
    """

    pixels: np.ndarray
    edges: tuple[float, ...]
    top: float
    bottom: float
    centre: tuple[float, float]
    turn: float


def render(word: str, rng: np.random.Generator) -> Rendered:
    """The word in a random font, size, place and colour, a little turned and noisy."""
    from PIL import Image, ImageDraw

    name = FONTS[int(rng.integers(len(FONTS)))]
    size = int(rng.integers(15, 32))
    while size > 12 and _font(name, size).getlength(word) > SIZE - 10:
        size -= 1
    font = _font(name, size)
    left, top, right, bottom = font.getbbox(word)
    ground = rng.integers(0, 256, size=3)
    while True:
        ink = rng.integers(0, 256, size=3)
        if abs(_luminance(ink) - _luminance(ground)) > 100:
            break
    width, height = right - left, bottom - top
    x = float(rng.uniform(4, max(4.5, SIZE - 4 - width)))
    y = float(rng.uniform(8, max(8.5, SIZE - 8 - height)))
    mask = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(mask).text((x - left, y - top), word, fill=255, font=font)
    # Turned about the middle of the word, so that no letter leaves the picture.
    most = min(6.0, float(np.degrees(np.arctan2(min(y, SIZE - y - height), width / 2 + 1))))
    centre = (x + width / 2, y + height / 2)
    turn = float(rng.uniform(-most, most))
    turned = mask.rotate(turn, Image.Resampling.BICUBIC, center=centre)
    cover = np.asarray(turned, np.float32)[..., None] / 255
    pixels = ground * (1 - cover) + ink * cover
    pixels = np.clip(pixels + rng.normal(0, rng.uniform(0, 10), size=pixels.shape), 0, 255).astype(np.uint8)
    edges = tuple(x - left + font.getlength(word[:count]) for count in range(len(word) + 1))
    return Rendered(pixels, edges, y, y + height, centre, float(np.radians(turn)))


def _luminance(color: np.ndarray) -> float:
    return float(color @ np.array([0.299, 0.587, 0.114]))
