"""Tokens that an exported easyvqa-tiny answers here, and whether it answers the same on another processor.

python answers.py record FOLDER FILE    # needs transformers and the questions
python answers.py compare FOLDER FILE   # needs numpy and onnxruntime
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

from splitq_edge.runtime_ops import library_path
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens, open_image
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import verify_files

QUESTIONS = 12
MAX_NEW_TOKENS = 8


def answer(model: ExportedModel, input_ids: np.ndarray, attention_mask: np.ndarray, pixels: np.ndarray) -> list[int]:
    """Greedy tokens of one question."""
    features = model.encode_images(pixels)
    steps = greedy_tokens(model, input_ids, attention_mask, features, max_new_tokens=MAX_NEW_TOKENS)
    return [int(step[0]) for step in steps]


def record(folder: Path, file: Path) -> None:
    """Prepare questions, answer them, and store inputs and tokens."""
    from splitq_edge.evaluate.tasks import load_task

    model = ExportedModel(folder, native=True, threads=1)
    generator = Generator(model)
    arrays: dict[str, np.ndarray] = {}
    questions = load_task("easyvqa", "test")
    for index, question in enumerate(questions[:: len(questions) // QUESTIONS][:QUESTIONS]):
        content = [{"type": "image", "image": open_image(question.image)}, {"type": "text", "text": question.text}]
        inputs = generator.prepare([{"role": "user", "content": content}])
        fed = inputs["input_ids"].astype(np.int64), inputs["attention_mask"], inputs["pixel_values"].astype(np.float32)
        arrays |= {f"{name}{index}": value for name, value in zip(("ids", "mask", "pixels"), fed, strict=True)}
        arrays[f"tokens{index}"] = np.array(answer(model, *fed))
    np.savez(file, **arrays)


def compare(folder: Path, file: Path) -> bool:
    """Answer the stored questions and print what differs; the files must be, to the byte, those that were exported."""
    model = ExportedModel(folder, native=True, threads=2)
    verify_files(model)
    print(f"{len(model.manifest['files'])} files of the {model.manifest['flavour']} export, each with its sha256")
    library = ctypes.CDLL(str(library_path()))
    library.SplitQIsa.restype = ctypes.c_char_p
    same = 0
    with np.load(file) as stored:
        for index in range(QUESTIONS):
            expected = stored[f"tokens{index}"].tolist()
            got = answer(model, stored[f"ids{index}"], stored[f"mask{index}"], stored[f"pixels{index}"])
            same += got == expected
            if got != expected:
                print(f"question {index}: expected {expected}, got {got}")
    print(f"{library.SplitQIsa().decode()} kernels: {same} of {QUESTIONS} answers the same")
    return same == QUESTIONS


if __name__ == "__main__":
    command, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if command == "record":
        record(folder, file)
    elif not compare(folder, file):
        sys.exit(1)
