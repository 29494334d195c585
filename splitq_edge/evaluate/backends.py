"""Answer many questions with a torch model or an exported folder, greedily, and score the right answers.

One pass with the right answer behind the prompt gives its likelihood. Where the most likely token is the answer's own
at every position, greedy generation would say just that; only the other questions are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from splitq_edge.evaluate.likelihood import Forced, TopTokens, force
from splitq_edge.evaluate.prompts import Prompts, left_padded, right_padded, shared_prefix
from splitq_edge.evaluate.tasks import Answer, Question
from splitq_edge.image_layout import Arrays, ImageLayout, join

if TYPE_CHECKING:
    from splitq_edge.loading import LoadedModel
    from splitq_edge.runtime_ops.cache import Cache
    from splitq_edge.targets import Target

MAX_NEW_TOKENS = 8
BATCH = 32  # rows of one run of the language model
CHUNK_QUESTIONS = 128
CHUNK_IMAGES = 16


References = Sequence[TopTokens] | None


class Backend(Protocol):
    """Something that answers questions."""

    def answer(self, questions: Sequence[Question], references: References = None) -> list[Answer]:
        """Greedy answers of a chunk of questions, in their order; see `answer_all`."""


def answer_all(
    backend: Backend,
    questions: Sequence[Question],
    *,
    references: References = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Greedy answers in the order of the questions.

    Args:
        backend: who answers.
        questions: what is asked; questions of one image that follow each other share the work on it.
        references: of every question, what a reference model held likely; the answers then tell the divergence.
        progress: called with the number of questions answered by each chunk.
    """
    answers: list[Answer] = []
    for chunk in chunks(questions):
        done = len(answers)
        answers += backend.answer(chunk, None if references is None else references[done : done + len(chunk)])
        if progress is not None:
            progress(len(chunk))
    return answers


def chunks(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Consecutive questions, few enough to hold all their images; an image is not divided unless it must be."""
    chunk: list[Question] = []
    images = 0
    for _, group in groupby(questions, key=lambda question: question.image):
        waiting = list(group)
        if chunk and (len(chunk) + len(waiting) > CHUNK_QUESTIONS or images == CHUNK_IMAGES):
            yield chunk
            chunk, images = [], 0
        while len(waiting) > CHUNK_QUESTIONS:
            yield waiting[:CHUNK_QUESTIONS]
            waiting = waiting[CHUNK_QUESTIONS:]
        chunk, images = chunk + waiting, images + 1
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Asked:
    """A question as token ids; `image` counts the images of its chunk."""

    image: int
    prompt: list[int]
    answer: list[int]
    reference: TopTokens | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of prompt and answer."""
        return len(self.prompt), len(self.answer)


class _Chunk:
    """Pictures and token ids of a chunk; each picture is opened and resized once."""

    def __init__(self, questions: Sequence[Question], prompts: Prompts, references: References) -> None:
        from splitq_edge.runtime_ops.generate import open_image

        pictures = {path: open_image(path) for path in dict.fromkeys(question.image for question in questions)}
        self._pictures = list(pictures.values())
        self._prompts = prompts
        number = {path: index for index, path in enumerate(pictures)}
        known: Sequence[TopTokens | None] = [None] * len(questions) if references is None else references
        self.asked = [
            _Asked(
                number[question.image],
                prompts.prompt(question.text, pictures[question.image]),
                prompts.answer(question.text, question.answer),
                reference,
            )
            for question, reference in zip(questions, known, strict=True)
        ]

    def pictures(self, layout: ImageLayout) -> list[Arrays]:
        """Each picture by itself, see `ImageLayout.pictures`."""
        return [layout.pictures(self._prompts.encode("", picture)) for picture in self._pictures]

    def batches(self) -> Iterator[list[int]]:
        """Numbers of questions of about the same length, so that little is padding."""
        order = sorted(range(len(self.asked)), key=lambda index: self.asked[index].lengths)
        for start in range(0, len(order), BATCH):
            yield order[start : start + BATCH]


def _groups(pictures: list[Arrays]) -> Iterator[list[Arrays]]:
    """Pictures that one run of the vision encoder takes: at most `CHUNK_IMAGES` tiles, or one picture."""
    group: list[Arrays] = []
    for picture in pictures:
        if group and sum(map(_images, group)) + _images(picture) > CHUNK_IMAGES:
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def _images(picture: Arrays) -> int:
    """Images or tiles of a picture; packed patches are one."""
    pixels = picture["pixel_values"]
    return len(pixels) if pixels.ndim == 4 else 1


def _forced(logits: np.ndarray, rows: Sequence[_Asked], image_token_id: int | None) -> list[Forced]:
    answers, references = [asked.answer for asked in rows], [asked.reference for asked in rows]
    return force(logits, answers, image_token_id, references)


def _ends(tokens: Sequence[int], end_tokens: Sequence[int]) -> bool:
    """Whether greedy generation stops behind these tokens."""
    return len(tokens) >= MAX_NEW_TOKENS or tokens[-1] in end_tokens


def _begun(asked: _Asked, forced: Forced) -> list[int]:
    """The greedy answer as far as a teacher-forced pass knows it: at least one token."""
    return [*asked.answer[: forced.same], *forced.greedy[forced.same : forced.same + 1]][:MAX_NEW_TOKENS]


def _answers(processor: Any, rows: list[_Asked], forced: list[Forced], tokens: list[list[int]]) -> list[Answer]:
    texts = [str(processor.decode(row, skip_special_tokens=True)).strip() for row in tokens]
    return [
        Answer(text, said.nll, len(asked.answer), said.top, said.kl)
        for text, said, asked in zip(texts, forced, rows, strict=True)
    ]


class OrtBackend:
    """An exported folder in ONNX Runtime.

    The part of the prompts up to the image's last token runs once an image and its cache serves all the questions. Not
    so with a quantized cache, which rounds what one call leaves to the next: there a prompt runs in one call and the
    right answer token by token, as in generation.

    Args:
        folder: the export.
        native: True for the native kernels, False for the function bodies; of no matter for static graphs.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        target: the NPU that the folder was compiled for, None for the CPU.
    """

    def __init__(self, folder: Path, *, native: bool, threads: int = 0, target: Target | None = None) -> None:
        from splitq_edge.runtime_ops.generate import load_processor
        from splitq_edge.runtime_ops.open_model import open_model

        self.model = open_model(folder, native=native, threads=threads, target=target)
        self.processor = load_processor(folder)
        self._ends: list[int] = self.model.manifest["eos_token_ids"]
        self._image_token: int = self.model.manifest["image_token_id"]
        # A static graph rounds keys and values inside a call just as between calls.
        self._exact_cache = self.model.manifest["cache"]["dtype"] == "float32" or "static" in self.model.manifest
        self._shares = self._exact_cache and not self.model.manifest.get("prompt_input")
        self._prompts = Prompts(self.processor, self._ends)

    def answer(self, questions: Sequence[Question], references: References = None) -> list[Answer]:
        """See `Backend.answer`."""
        chunk = _Chunk(questions, self._prompts, references)
        pictures = chunk.pictures(self.model.image_layout)
        features = [part for group in _groups(pictures) for part in self._encode(group)]
        start = shared_prefix([asked.prompt for asked in chunk.asked], self._image_token) if self._shares else 0
        prefix = self._prefill(chunk.asked[0].prompt[:start], features, pictures) if start else None
        answers: dict[int, Answer] = {}
        for batch in chunk.batches():
            rows = [chunk.asked[index] for index in batch]
            images = [asked.image for asked in rows]
            cache = self.model.empty_cache(len(rows)) if prefix is None else prefix.take(np.array(images))
            shown = np.concatenate([features[image] for image in images])
            own = join([pictures[image] for image in images])
            answers.update(zip(batch, self._batch(rows, shown, own, cache), strict=True))
        return [answers[index] for index in range(len(questions))]

    def _encode(self, pictures: list[Arrays]) -> list[np.ndarray]:
        """Image features of each picture."""
        layout = self.model.image_layout
        features = self.model.encode_images(join(pictures))
        sizes = [sum(layout.rows(picture)) if layout.flat else _images(picture) for picture in pictures]
        return np.split(features, np.cumsum(sizes)[:-1])

    def _prefill(self, prefix: list[int], features: list[np.ndarray], pictures: list[Arrays]) -> Cache:
        """The cache behind the prompts' common prefix, one row an image."""
        ids = np.tile(np.array(prefix, np.int64), (len(features), 1))
        mask = np.ones_like(ids)
        embeds, modality = self.model.embed(ids, np.concatenate(features))
        empty = self.model.empty_cache(len(ids), room=ids.shape[1])
        positions = self.model.positions(ids, mask, join(pictures))
        return self.model.decode(embeds, modality, mask, empty, positions, logits_to_keep=1)[1]

    def _batch(self, rows: list[_Asked], features: np.ndarray, pictures: Arrays, cache: Cache) -> list[Answer]:
        """Answers of rows whose first tokens are in the cache; an empty cache takes the image features."""
        logits, mask, cache = self._teach(rows, features, pictures, cache)
        forced = _forced(logits, rows, self._image_token)
        tokens = [_begun(asked, said) for asked, said in zip(rows, forced, strict=True)]
        open_rows = [index for index, row in enumerate(tokens) if not _ends(row, self._ends)]
        if open_rows:
            first = mask.shape[1] - logits.shape[1] + 1  # place of the answers' first token
            for index in open_rows:  # forget the right answer behind the point where the model leaves it
                mask[index, first + forced[index].same :] = 0
            self._generate([tokens[index] for index in open_rows], mask[open_rows], cache.take(np.array(open_rows)))
        return _answers(self.processor, rows, forced, tokens)

    def _teach(
        self, rows: list[_Asked], features: np.ndarray, pictures: Arrays, cache: Cache
    ) -> tuple[np.ndarray, np.ndarray, Cache]:
        """Feed the rest of the prompts and the right answers.

        Returns:
            Logits that predict the answers [rows, longest answer, vocabulary], the mask of all that the cache holds
            now [rows, total] int64, and the cache. All answers begin at one place.
        """
        start, pad = cache.length, self.model.manifest["pad_token_id"]
        ids, mask = left_padded([asked.prompt[start:] for asked in rows], pad)
        mask = np.concatenate([np.ones((len(rows), start), np.int64), mask], -1)
        answer_ids, answer_mask = right_padded([asked.answer[:-1] for asked in rows], pad)
        ids, mask = np.concatenate([ids, answer_ids], -1), np.concatenate([mask, answer_mask], -1)
        answers = answer_ids.shape[1]
        embeds, modality = self.model.embed(ids, features[:0] if start else features)
        positions = None if start else self.model.positions(ids, mask, pictures)
        prompt = np.broadcast_to(np.arange(ids.shape[1]) < ids.shape[1] - answers, ids.shape).astype(np.int8)
        width = ids.shape[1]
        ends, kept = ([width], answers + 1) if self._exact_cache else (range(width - answers, width + 1), 1)
        logits, begin = [], 0
        for end in ends:
            piece = slice(begin, end)
            own = None if positions is None else positions[..., piece]
            part, cache = self.model.decode(
                embeds[:, piece],
                modality[:, piece],
                mask[:, : start + end],
                cache,
                own,
                logits_to_keep=kept,
                prompt=prompt[:, piece],
            )
            logits.append(part)
            begin = end
        return np.concatenate(logits, 1), mask, cache

    def _generate(self, begun: list[list[int]], mask: np.ndarray, cache: Cache) -> None:
        """Append the greedy tokens; the last token of each row is not in the cache yet."""
        from splitq_edge.runtime_ops.generate import greedy_tokens

        last = np.array([[row[-1]] for row in begun], np.int64)
        mask = np.concatenate([mask, np.ones_like(last)], -1)
        wanted = MAX_NEW_TOKENS - min(len(row) for row in begun)
        no_images = self.model.encode_images(None)
        for step in greedy_tokens(self.model, last, mask, no_images, max_new_tokens=wanted, cache=cache):
            for row, token in zip(begun, step, strict=True):
                if not _ends(row, self._ends):
                    row.append(int(token))


class TorchBackend:
    """A transformers model in torch, as float32 checkpoint or with quantized sites in it.

    Args:
        model: folder or hub id, or a loaded model.
    """

    def __init__(self, model: str | LoadedModel) -> None:
        from splitq_edge.loading import load_model

        self.loaded = load_model(model) if isinstance(model, str) else model
        self.processor = self.loaded.processor
        end = self.loaded.model.generation_config.eos_token_id
        end = self.processor.tokenizer.eos_token_id if end is None else end
        self._ends = [int(token) for token in (end if isinstance(end, list) else [end]) if token is not None]
        self._prompts = Prompts(self.processor, self._ends)
        self._layout = self.loaded.image_layout

    def answer(self, questions: Sequence[Question], references: References = None) -> list[Answer]:
        """See `Backend.answer`; the model encodes an image again with every question, as transformers does."""
        import torch

        chunk = _Chunk(questions, self._prompts, references)
        pictures = chunk.pictures(self._layout)
        answers: dict[int, Answer] = {}
        with torch.inference_mode(), self.loaded.modality_from_inputs():
            for batch in chunk.batches():
                rows = [chunk.asked[index] for index in batch]
                images = [pictures[asked.image] for asked in rows]
                answers.update(zip(batch, self._batch(rows, images), strict=True))
        return [answers[index] for index in range(len(questions))]

    def _batch(self, rows: list[_Asked], pictures: list[Arrays]) -> list[Answer]:
        logits = self._logits(rows, join(pictures))
        forced = _forced(logits, rows, self.loaded.image_token_id)
        tokens = [_begun(asked, said) for asked, said in zip(rows, forced, strict=True)]
        open_rows = [index for index, row in enumerate(tokens) if not _ends(row, self._ends)]
        if open_rows:
            generated = self._generate(
                [rows[index].prompt for index in open_rows], join([pictures[index] for index in open_rows])
            )
            for index, row in zip(open_rows, generated, strict=True):
                tokens[index] = row
        return _answers(self.processor, rows, forced, tokens)

    def _logits(self, rows: list[_Asked], pictures: Arrays) -> np.ndarray:
        """What predicts the right answers, [rows, longest answer, vocabulary] float32."""
        prompts = left_padded([asked.prompt for asked in rows], self._pad)
        answers = right_padded([asked.answer[:-1] for asked in rows], self._pad)
        ids, mask = (np.concatenate(pair, -1) for pair in zip(prompts, answers, strict=True))
        behind = np.broadcast_to(np.arange(ids.shape[1]) >= prompts[0].shape[1], ids.shape).astype(np.int64)
        inputs = self._inputs(ids, mask, pictures, behind)
        logits = self.loaded.model(**inputs, position_ids=self._positions(ids, mask, pictures), use_cache=False).logits
        return np.asarray(logits[:, prompts[0].shape[1] - 1 :].numpy())

    def _positions(self, ids: np.ndarray, mask: np.ndarray, pictures: Arrays) -> Any:
        import torch

        assert self.loaded.image_token_id is not None
        found = self._layout.positions(ids, mask, pictures, self.loaded.image_token_id)
        return torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0) if found is None else found)

    def _inputs(self, ids: np.ndarray, mask: np.ndarray, pictures: Arrays, answers: np.ndarray) -> dict[str, Any]:
        """What the model takes; answers: [batch, sequence] int64, 1 behind the prompt."""
        import torch

        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            **self._layout.model_inputs(pictures),
        }
        if kind := self.loaded.adapter.token_types:
            prompt = self.loaded.adapter.bidirectional == "prompt"
            arrays[kind] = answers if prompt else (ids == self.loaded.image_token_id).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _generate(self, prompts: list[list[int]], pictures: Arrays) -> list[list[int]]:
        ids, mask = left_padded(prompts, self._pad)
        tokens = self.loaded.model.generate(
            **self._inputs(ids, mask, pictures, np.zeros_like(ids)),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            suppress_tokens=[self.loaded.image_token_id],
        )
        return [[int(token) for token in row] for row in tokens[:, ids.shape[1] :]]

    @property
    def _pad(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)
