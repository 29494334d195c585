"""The built-in tasks: deterministic, splits apart, answers true to the scenes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splitq_edge.calibration.data import load_samples
from splitq_edge.commands.evaluate import average
from splitq_edge.errors import SplitQError
from splitq_edge.evaluate import drawing, photos, pictures, words
from splitq_edge.evaluate.drawing import Thing, counting_question, side, spatial_question
from splitq_edge.evaluate.pictures import Example, generator, kept_questions
from splitq_edge.evaluate.tasks import TASKS, load_task, task_names


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and few examples a split."""
    monkeypatch.setenv("SPLITQ_DATA", str(tmp_path))
    monkeypatch.setattr(pictures, "COUNTS", {"train": 30, "test": 20})
    for module in (drawing, words, photos):
        monkeypatch.setattr(module, "COUNTS", {"train": 30, "test": 20})
    return tmp_path


@pytest.mark.parametrize("task", ["ocr", "counting", "spatial"])
def test_drawn_task_is_the_same_every_time(data: Path, task: str) -> None:
    first = [(q.text, q.answer, q.type, q.image.read_bytes()) for q in load_task(task, "test")]
    for path in sorted(data.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    again = [(q.text, q.answer, q.type, q.image.read_bytes()) for q in load_task(task, "test")]
    assert first == again
    assert len(first) == 20
    assert len({image for *_, image in first}) == 20


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("task", ["ocr", "counting", "spatial"])
def test_drawn_splits_have_other_pictures(task: str) -> None:
    seen = {split: {q.image.read_bytes() for q in load_task(task, split)} for split in ("train", "test")}
    assert not seen["train"] & seen["test"]


@pytest.mark.usefixtures("data")
def test_pictures_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_task("counting", "test")
    monkeypatch.setattr(drawing, "counting_example", None)  # calling it would fail
    assert load_task("counting", "test") == before


def test_no_word_is_in_two_splits() -> None:
    found = {split: set(words.words(split)) for split in ("train", "validation", "test")}
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]
    assert len(found["test"]) >= 1000
    low, high = words.LETTERS
    assert all(low <= len(word) <= high and word.islower() for split in found.values() for word in split)


def test_a_word_lies_inside_its_picture() -> None:
    for index in range(40):
        picture = words.render("qjwmyg", generator("test", "test", index))
        assert 0 <= picture.edges[0] < picture.edges[-1] <= 96
        assert 0 <= picture.top < picture.bottom <= 96
        assert picture.pixels.shape == (96, 96, 3)


def thing(shape: str, color: str, x: float = 0.0, y: float = 0.0) -> Thing:
    return Thing(shape, color, x, y, 8.0)


def test_counting_answers_count() -> None:
    things = [thing("star", "red"), thing("star", "blue"), thing("circle", "red"), thing("star", "red")]
    expected = {
        "How many shapes are there?": "4",
        "How many red shapes are there?": "3",
        "How many stars are there?": "3",
        "How many red stars are there?": "2",
        "How many blue circles are there?": "0",
    }
    rng = np.random.default_rng(0)
    asked = {text: answer for text, answer, _ in (counting_question(things, rng) for _ in range(3000))}
    assert expected.items() <= asked.items()


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(50, 10, "right"), (-50, 10, "left"), (5, 40, "below"), (5, -40, "above"), (30, 29, None)],
)
def test_side_of_another_thing(x: float, y: float, expected: str | None) -> None:
    assert side(thing("star", "red", x, y), thing("star", "blue")) == expected


def test_spatial_answers_agree_with_the_scene() -> None:
    things = [thing("star", "red", 60, 10), thing("circle", "blue", 10, 14)]
    rng = np.random.default_rng(0)
    asked = {text: answer for text, answer, _ in (spatial_question(things, rng) for _ in range(400))}
    assert asked["Where is the red star relative to the blue circle?"] == "right"
    assert asked["Where is the blue circle relative to the red star?"] == "left"
    assert asked["Is the red star to the right of the blue circle?"] == "yes"
    assert asked["Is the red star below the blue circle?"] == "no"


def test_scattered_things_never_touch() -> None:
    for index in range(20):
        things = drawing.counting_scene(generator("test", "test", index))
        pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
        assert all((a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2 for a, b in pairs)
        assert all(min(t.x, t.y, 96 - t.x, 96 - t.y) > t.radius for t in things)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_fashion_pictures_and_names(data: Path) -> None:
    images = np.arange(20 * 28 * 28).reshape(20, 28, 28) % 251
    write_idx(data / "fashion-mnist" / "t10k-images-idx3-ubyte.gz", images)
    write_idx(data / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz", np.arange(20) % 10)
    asked = load_task("fashion", "test")
    assert [q.answer for q in asked[:10]] == list(photos.CLOTHES)
    assert np.array_equal(np.asarray(Image.open(asked[7].image))[..., 1], images[7])


def test_cifar_photos_and_names(data: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (20, 1024, 3), dtype=np.uint8)
    (data / "cifar10").mkdir()
    Image.fromarray(rows).save(data / "cifar10" / "test_batch.png")
    (data / "cifar10" / "test_lables.json").write_text(json.dumps([index % 10 for index in range(20)]))
    asked = load_task("cifar10", "test")
    assert [q.answer for q in asked[:10]] == list(photos.THINGS)
    assert np.array_equal(np.asarray(Image.open(asked[3].image)), rows[3].reshape(32, 32, 3))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("task", ["fashion", "cifar10"])
def test_missing_photos_are_one_clear_line(task: str) -> None:
    with pytest.raises(SplitQError, match=r"expected .*; run models/smolvqa-135m/fetch_data.py"):
        load_task(task, "test")


def test_damaged_idx_file_is_one_clear_line(data: Path) -> None:
    write_idx(data / "fashion-mnist" / "t10k-images-idx3-ubyte.gz", np.zeros((2, 2), np.uint8))
    with pytest.raises(SplitQError, match=r"expected Fashion-MNIST in IDX format \(magic 00000802"):
        load_task("fashion", "test")


def test_stop_while_pictures_are_made_leaves_nothing(data: Path) -> None:
    def stopped() -> Callable[[], object]:
        yield Example(np.zeros((4, 4, 3), np.uint8), "a?", "b", "c")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_questions("x", "test", stopped)
    assert not list((data / "pictures" / "x").iterdir())


def test_names_of_tasks() -> None:
    assert task_names("all") == list(TASKS)
    assert task_names("ocr, spatial,ocr") == ["ocr", "spatial"]
    with pytest.raises(SplitQError, match="task 'x': expected one of"):
        task_names("ocr,x")


def test_average_gives_every_task_the_same_weight() -> None:
    mean = average([{"accuracy": 0.5, "stderr": 0.03}, {"accuracy": 1.0, "stderr": 0.04}])
    assert mean == {"accuracy": 0.75, "stderr": pytest.approx(0.025)}


@pytest.mark.usefixtures("data")
def test_calibration_on_several_tasks_takes_each_in_turn() -> None:
    samples = load_samples("ocr,counting,spatial", 8, seed=0)
    assert [sample.origin for sample in samples] == ["ocr", "counting", "spatial"] * 2 + ["ocr", "counting"]
    alone = load_samples("counting", 3, seed=0)
    assert [sample.messages for sample in alone] != [sample.messages for sample in samples if sample.origin == "ocr"]
    assert len({str(sample.messages) for sample in samples}) == 8
