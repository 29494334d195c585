"""Answer many questions with a torch model or an exported folder, batch by batch, greedily."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from splitq_edge.evaluate.tasks import Question

BATCH = 32
MAX_NEW_TOKENS = 8


class Backend(Protocol):
    """Something that answers questions."""

    def encode_image(self, image: Path) -> Any:
        """Image rows of one picture, to be reused by all its questions."""

    def answer(self, texts: Sequence[str], images: Sequence[Path], features: Sequence[Any]) -> list[str]:
        """Greedy answers of a batch, one image a question."""


def answer_all(
    backend: Backend, questions: Sequence[Question], *, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Greedy answers in the order of the questions; every image is encoded once.

    Args:
        backend: who answers.
        questions: what is asked.
        progress: called with the number of questions answered by each batch.
    """
    answers: list[str] = []
    cache: dict[Path, Any] = {}
    for batch in _batches(questions):
        for question in batch:
            if question.image not in cache:
                cache[question.image] = backend.encode_image(question.image)
        features = [cache[question.image] for question in batch]
        answers += backend.answer([q.text for q in batch], [q.image for q in batch], features)
        if progress is not None:
            progress(len(batch))
    return answers


def _batches(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]


class _Prompts:
    """Turns questions into padded token ids with the model's own processor; an image's size is read once."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._ids: dict[str, list[int]] = {}

    def batch(self, texts: Sequence[str], pictures: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded input_ids and attention_mask [batch, sequence] int64."""
        rows = [self._tokens(text, picture) for text, picture in zip(texts, pictures, strict=True)]
        width = max(len(row) for row in rows)
        pad = self.processor.tokenizer.pad_token_id
        ids = np.full((len(rows), width), pad, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = row
            mask[index, width - len(row) :] = 1
        return ids, mask

    def _tokens(self, text: str, picture: Any) -> list[int]:
        key = f"{picture.size} {text}"
        if key not in self._ids:
            encoded = self.processor.apply_chat_template(
                chat(text, picture),
                tokenize=True,
                return_dict=True,
                return_tensors="np",
                add_generation_prompt=True,
            )
            self._ids[key] = [int(token) for token in encoded["input_ids"][0]]
        return self._ids[key]


def chat(text: str, picture: Any) -> list[dict[str, Any]]:
    """One user turn: the picture, then the question."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


class OrtBackend:
    """An exported folder in ONNX Runtime.

    Args:
        folder: the export.
        native: True for the native kernels, False for the function bodies.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
    """

    def __init__(self, folder: Path, *, native: bool, threads: int = 0) -> None:
        from splitq_edge.runtime_ops.generate import load_processor, open_image
        from splitq_edge.runtime_ops.session import ExportedModel

        self.model = ExportedModel(folder, native=native, threads=threads)
        self.processor = load_processor(folder)
        self._open = open_image
        self._prompts = _Prompts(self.processor)

    def encode_image(self, image: Path) -> np.ndarray:
        """[1, image_tokens, hidden] float32."""
        pixels = self.processor.image_processor(images=[self._open(image)], return_tensors="np")["pixel_values"]
        return self.model.encode_images(np.asarray(pixels))

    def answer(self, texts: Sequence[str], images: Sequence[Path], features: Sequence[np.ndarray]) -> list[str]:
        """See `Backend.answer`."""
        from splitq_edge.runtime_ops.generate import greedy_tokens

        ids, mask = self._prompts.batch(texts, [self._open(image) for image in images])
        rows = np.concatenate(list(features))
        steps = greedy_tokens(self.model, ids, mask, rows, max_new_tokens=MAX_NEW_TOKENS)
        tokens = np.stack(list(steps), axis=1)
        return [self._text(row) for row in tokens]

    def _text(self, tokens: np.ndarray) -> str:
        return str(self.processor.decode(tokens.tolist(), skip_special_tokens=True)).strip()


class TorchBackend:
    """A transformers checkpoint in torch, float32.

    Args:
        source: folder or hub id.
    """

    def __init__(self, source: str) -> None:
        from splitq_edge.loading import load_model
        from splitq_edge.runtime_ops.generate import open_image

        self.loaded = load_model(source)
        self.processor = self.loaded.processor
        self._open = open_image
        self._prompts = _Prompts(self.processor)

    def encode_image(self, image: Path) -> np.ndarray:
        """[1, 3, height, width] float32: the model encodes it again with every question, as transformers does."""
        pixels = self.processor.image_processor(images=[self._open(image)], return_tensors="np")["pixel_values"]
        return np.asarray(pixels)

    def answer(self, texts: Sequence[str], images: Sequence[Path], features: Sequence[np.ndarray]) -> list[str]:
        """See `Backend.answer`."""
        import torch

        ids, mask = self._prompts.batch(texts, [self._open(image) for image in images])
        with torch.inference_mode(), self.loaded.modality_from_inputs():
            tokens = self.loaded.model.generate(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                pixel_values=torch.from_numpy(np.concatenate(list(features))),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        new = tokens[:, ids.shape[1] :]
        return [str(self.processor.decode(row.tolist(), skip_special_tokens=True)).strip() for row in new]
