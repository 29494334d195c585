"""Greedy text from an exported model: the thin loop around the three sessions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.processors import load_image_only
from splitq_edge.runtime_ops.cache import Cache
from splitq_edge.runtime_ops.session import ExportedModel


def greedy_tokens(
    model: ExportedModel,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    image_features: np.ndarray,
    *,
    max_new_tokens: int,
    cache: Cache | None = None,
    positions: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Greedy decoding of a batch.

    Args:
        model: the exported model.
        input_ids: [batch, sequence] int64, left-padded.
        attention_mask: [batch, past + sequence] int64.
        image_features: rows of all images of the batch in reading order, see `ExportedModel.embed`.
        max_new_tokens: limit of new tokens a row.
        cache: of the tokens before input_ids; none: the batch begins here.
        positions: of input_ids, what `ExportedModel.positions` gave.

    Yields:
        [batch] int64, the next token of every row; after a row's end token its padding token. Ends when all rows have
        ended or the context is full.

    Raises:
        SplitQError: the prompt leaves no room in the context.
    """
    room = room_for_answer(model, attention_mask.shape[1], max_new_tokens)
    eos, pad = np.array(model.manifest["eos_token_ids"]), model.manifest["pad_token_id"]
    embeds, modality = model.embed(input_ids, image_features)
    mask = attention_mask.astype(np.int64)
    if cache is None:
        cache = model.empty_cache(input_ids.shape[0], room=input_ids.shape[1] + room)
    done = np.zeros(input_ids.shape[0], bool)
    no_images = image_features[:0]
    for step in range(room):
        logits, cache = model.decode(embeds, modality, mask, cache, positions, logits_to_keep=1)
        last = logits[:, -1].copy()
        last[:, model.manifest["image_token_id"]] = -np.inf  # a placeholder without an image has no meaning
        tokens = np.where(done, pad, last.argmax(-1))
        yield tokens
        done |= np.isin(tokens, eos)
        if done.all() or step + 1 == room:
            return
        embeds, modality = model.embed(tokens[:, None], no_images)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], -1)
        positions = None


def room_for_answer(model: ExportedModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens that an answer may have: as many as are asked for, or as the context still holds.

    Args:
        model: the exported model.
        prompt_tokens: of the prompt, those of its pictures and padding among them.
        max_new_tokens: asked for.

    Raises:
        SplitQError: the prompt leaves no room for a token.
    """
    if model.context is None:
        return max_new_tokens
    if prompt_tokens >= model.context:
        wider = ", or export again with a larger --context" if "static" in model.manifest else ""
        raise SplitQError(
            f"prompt: expected fewer tokens than the model's context of {model.context}, got {prompt_tokens} prompt "
            f"tokens, pictures included; shorten the text or give fewer or smaller pictures{wider}"
        )
    return min(max_new_tokens, model.context - prompt_tokens)


class Generator:
    """Answers questions with an exported model.

    Args:
        model: the exported model; its folder also holds tokenizer, image processor and chat template.
    """

    def __init__(self, model: ExportedModel) -> None:
        self.model = model
        self.processor = load_processor(model.folder)

    def prepare(self, messages: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Model inputs of one chat as numpy arrays: input_ids, attention_mask and those of `ImageLayout.pictures`.

        Raises:
            SplitQError: the processor refuses the chat, for example an image that cannot be read.
        """
        try:
            encoded = self.processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise SplitQError(f"prompt: the model's processor refused it ({reason})") from error
        tokens = {name: np.asarray(encoded[name]).astype(np.int64) for name in ("input_ids", "attention_mask")}
        return {**tokens, **self.model.image_layout.pictures(encoded)}

    def chat(self, prompt: str, images: list[Any]) -> dict[str, np.ndarray]:
        """Model inputs of one question, see `prepare`.

        Args:
            prompt: the user's text.
            images: PIL images, put before the text.
        """
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return self.prepare([{"role": "user", "content": content}])

    def stream(
        self, prompt: str, images: list[Any], *, max_new_tokens: int = 64, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Pieces of the greedy answer as they come.

        Args:
            prompt: the user's text.
            images: PIL images, put before the text.
            max_new_tokens: limit.
            stop: the answer ends before the first of these texts.

        Raises:
            SplitQError: the processor refuses the prompt, or it is longer than the context.
        """
        inputs = self.chat(prompt, images)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        steps = greedy_tokens(
            self.model,
            ids,
            mask,
            self.model.encode_images(inputs),
            max_new_tokens=max_new_tokens,
            positions=self.model.positions(ids, mask, inputs),
        )
        return answer_pieces(self.processor, (int(step[0]) for step in steps), stop)

    def answer(self, prompt: str, images: list[Any], *, max_new_tokens: int = 64) -> str:
        """The whole greedy answer."""
        return "".join(self.stream(prompt, images, max_new_tokens=max_new_tokens)).strip()


def answer_pieces(processor: Any, tokens: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Text of an answer, piece by piece, as its tokens come.

    Args:
        processor: decodes tokens.
        tokens: ids of the answer's tokens.
        stop: the answer ends before the first of these texts. A piece that may be the start of one waits for the rest.
    """
    seen: list[int] = []
    shown = text = ""
    for token in tokens:
        seen.append(token)
        text = processor.decode(seen, skip_special_tokens=True).lstrip()
        end = min((place for place in map(text.find, stop) if place >= 0), default=-1)
        if end >= 0:
            text = text[:end]
            break
        whole = "" if text.endswith("\ufffd") else text  # half of a character: wait for the rest
        whole = whole[: len(whole) - max((_begun(whole, word) for word in stop), default=0)]
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
    if len(text) > len(shown):
        yield text[len(shown) :]


def _begun(text: str, word: str) -> int:
    """How many characters at the end of a text are the beginning of a word."""
    return next((count for count in range(len(word) - 1, 0, -1) if text.endswith(word[:count])), 0)


def load_processor(folder: Path) -> Any:
    """Tokenizer, image processor and chat template of an exported folder (transformers, without torch).

    Raises:
        SplitQError: they cannot be loaded.
    """
    try:
        return load_image_only(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SplitQError(f"processor {folder}: cannot be loaded ({reason}); export the model again") from error


def open_image(path: Path) -> Any:
    """A picture file as a PIL image in RGB.

    Raises:
        SplitQError: missing or no readable picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise SplitQError(f"image {path}: expected a file, found none; check the path") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SplitQError(f"image {path}: expected a readable picture ({reason}); give a PNG or JPEG file") from error
