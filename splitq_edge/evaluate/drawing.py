"""Tasks on drawn scenes: how many shapes there are, and where one lies beside another. All scenes are made by us."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitq_edge.evaluate.pictures import COUNTS, SIZE, Example, generator, kept_questions
from splitq_edge.evaluate.tasks import Question

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 205, 20),
    "purple": (140, 60, 190),
    "orange": (255, 127, 14),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
SIDES = ("left", "right", "above", "below")
MOST = 8  # shapes a picture
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One shape: its kind, its colour, centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """As a question calls it: "red circle"."""
        return f"{self.color} {self.shape}"


def counting(split: str) -> list[Question]:
    """1,000 held-out (2,000 training) questions of types "all", "color", "shape" and "both"; answers "0" to "8"."""
    return kept_questions("counting-1", split, lambda: _examples(counting_example, "counting", split))


def spatial(split: str) -> list[Question]:
    """1,000 held-out (2,000 training) questions: "where" (one of four sides) and "yesno", half of them yes."""
    return kept_questions("spatial-1", split, lambda: _examples(spatial_example, "spatial", split))


def _examples(make: Any, task: str, split: str) -> Iterator[Example]:
    for index in range(COUNTS[split]):
        yield make(generator(task, split, index))


def counting_example(rng: np.random.Generator) -> Example:
    """A scene of one to eight shapes and one question how many there are."""
    things = counting_scene(rng)
    text, answer, kind = counting_question(things, rng)
    return Example(draw(things, rng), text, answer, kind)


def counting_scene(rng: np.random.Generator) -> list[Thing]:
    """One to eight shapes that do not touch, of few kinds, so that a question finds several of one."""
    shapes = list(rng.choice(SHAPES, size=int(rng.integers(1, 4)), replace=False))
    colors = list(rng.choice(list(COLORS), size=int(rng.integers(1, 4)), replace=False))
    return scatter(rng, [(str(rng.choice(shapes)), str(rng.choice(colors))) for _ in range(rng.integers(1, MOST + 1))])


def counting_question(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str, str]:
    """Question, answer and type; one in eight asks for what is not there."""
    kind = str(rng.choice(("all", "color", "shape", "both")))
    model = things[int(rng.integers(len(things)))]
    color, shape = model.color, model.shape
    if rng.random() < 1 / 8:
        color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
    wanted = {
        "all": ("shapes", lambda _thing: True),
        "color": (f"{color} shapes", lambda thing: thing.color == color),
        "shape": (f"{shape}s", lambda thing: thing.shape == shape),
        "both": (f"{color} {shape}s", lambda thing: thing.name == f"{color} {shape}"),
    }[kind]
    return f"How many {wanted[0]} are there?", str(sum(map(wanted[1], things))), kind


def spatial_example(rng: np.random.Generator) -> Example:
    """A scene of two to four different shapes and one question where one lies beside another."""
    things = spatial_scene(rng)
    text, answer, kind = spatial_question(things, rng)
    return Example(draw(things, rng), text, answer, kind)


def spatial_scene(rng: np.random.Generator) -> list[Thing]:
    """Two to four shapes of different colours; the first two lie clearly on one side of each other."""
    while True:
        colors = rng.choice(list(COLORS), size=int(rng.integers(2, 5)), replace=False)
        things = scatter(rng, [(str(rng.choice(SHAPES)), str(color)) for color in colors])
        if side(things[0], things[1]) is not None:
            return things


def side(thing: Thing, other: Thing) -> str | None:
    """On which side of another a thing lies; None where it is not clear."""
    right, down = thing.x - other.x, thing.y - other.y
    if max(abs(right), abs(down)) < 1.5 * min(abs(right), abs(down)):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


def spatial_question(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str, str]:
    """Question, answer and type, about the first two things."""
    first, second = (things[0], things[1]) if rng.random() < 0.5 else (things[1], things[0])
    true = side(first, second)
    assert true is not None  # the scene was made so, and the sides of a pair are opposite
    if rng.random() < 0.5:
        return f"Where is the {first.name} relative to the {second.name}?", true, "where"
    said = true if rng.random() < 0.5 else str(rng.choice([other for other in SIDES if other != true]))
    words = {"left": "to the left of", "right": "to the right of"}.get(said, said)
    return f"Is the {first.name} {words} the {second.name}?", "yes" if said == true else "no", "yesno"


def scatter(rng: np.random.Generator, kinds: Sequence[tuple[str, str]]) -> list[Thing]:
    """Things of the given shapes and colours at random places, none touching another."""
    things: list[Thing] = []
    while len(things) < len(kinds):
        radius = float(rng.uniform(6, 12))
        x, y = (float(value) for value in rng.uniform(radius + 2, SIZE - radius - 2, size=2))
        if all((x - o.x) ** 2 + (y - o.y) ** 2 > (1.25 * (radius + o.radius)) ** 2 for o in things):
            things.append(Thing(*kinds[len(things)], x, y, radius))
        elif rng.random() < 0.002:  # a crowded start: begin again
            things = []
    return things


def draw(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray:
    """[96, 96, 3] uint8: the things on a light, slightly noisy ground."""
    from PIL import Image, ImageDraw

    ground = tuple(int(value) for value in rng.integers(200, 256, size=3))
    picture = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, ground)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        shade = np.clip(np.array(COLORS[thing.color]) + rng.integers(-15, 16, size=3), 0, 255)
        outline = _outline(thing, float(rng.uniform(0, 2 * np.pi)))
        pen.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline], fill=tuple(int(v) for v in shade))
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    return np.clip(pixels + rng.normal(0, 4, size=pixels.shape), 0, 255).astype(np.uint8)


def _outline(thing: Thing, turn: float) -> list[tuple[float, float]]:
    corners = {"circle": 40, "square": 4, "triangle": 3, "star": 10}[thing.shape]
    angles = turn + np.arange(corners) * (2 * np.pi / corners)
    radii = np.full(corners, thing.radius)
    if thing.shape == "star":
        radii[1::2] *= 0.42
    return [
        (thing.x + r * float(np.cos(a)), thing.y + r * float(np.sin(a))) for r, a in zip(radii, angles, strict=True)
    ]
