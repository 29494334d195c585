"""Token ids of questions and of their right answers, made with the model's own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from splitq_edge.errors import SplitQError

Message = dict[str, Any]


class Prompts:
    """Token ids, made once for every distinct question.

    Args:
        processor: tokenizer, image processor and chat template.
        end_tokens: ids that end an answer; the first one is put where the template writes none.
    """

    def __init__(self, processor: Any, end_tokens: Sequence[int]) -> None:
        self.processor = processor
        self.end_tokens = end_tokens
        self._prompts: dict[tuple[Any, str], list[int]] = {}
        self._answers: dict[tuple[str, str], list[int]] = {}

    def prompt(self, text: str, picture: Any) -> list[int]:
        """Ids of the chat up to where the answer begins.

        Args:
            text: the question.
            picture: a PIL image; only its size matters here.
        """
        key = (picture.size, text)
        if key not in self._prompts:
            self._prompts[key] = [int(token) for token in self.encode(text, picture)["input_ids"][0]]
        return self._prompts[key]

    def encode(self, text: str, picture: Any) -> Any:
        """What the processor makes of the chat up to where the answer begins, as numpy arrays by name."""
        return self.processor.apply_chat_template(
            chat(text, picture), tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
        )

    def answer(self, text: str, answer: str) -> list[int]:
        """Ids that the chat template puts behind the generation prompt for an answer, its end token included.

        What the template writes behind the end token is left out. If it writes none, the text's trailing white space
        is left out and an end token is added.

        Raises:
            SplitQError: the chat with the answer does not begin with the chat without it.
        """
        key = (text, answer)
        if key not in self._answers:
            self._answers[key] = self._answer(text, answer)
        return self._answers[key]

    def _answer(self, text: str, answer: str) -> list[int]:
        asked = chat(text)
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompt = self.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = self.processor.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise SplitQError(
                f"chat template: expected the answer behind the generation prompt {prompt[-40:]!r}, got "
                f"{whole[-40:]!r}; mend the model's chat template"
            )
        ids = self._behind(prompt, whole)
        for index, token in enumerate(ids):
            if token in self.end_tokens:
                return ids[: index + 1]
        if not self.end_tokens:
            raise SplitQError("model: expected an end token in its generation config or tokenizer, got none; add one")
        return [*self._behind(prompt, prompt + whole[len(prompt) :].rstrip()), self.end_tokens[0]]

    def _behind(self, prompt: str, whole: str) -> list[int]:
        head, ids = self._tokens(prompt), self._tokens(whole)
        if ids[: len(head)] == head:
            return ids[len(head) :]
        return self._tokens(whole[len(prompt) :])  # a token would span the border: the model never sees it

    def _tokens(self, text: str) -> list[int]:
        return [int(token) for token in self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]]


def chat(text: str, picture: Any = None) -> list[Message]:
    """One user turn: the picture, then the question; without `picture` its place alone."""
    image = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and attention_mask, [rows, longest row] int64 each, 0 in the mask for padding."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with the padding behind; rows may all be empty."""
    ids, mask = left_padded([row[::-1] for row in rows], pad)
    return ids[:, ::-1], mask[:, ::-1]


def shared_prefix(prompts: Sequence[Sequence[int]], image_token_id: int) -> int:
    """Length of the prefix that ends with the last image token, if all prompts share it and go on behind it; else 0."""
    first = list(prompts[0])
    if image_token_id not in first:
        return 0
    length = len(first) - first[::-1].index(image_token_id)
    shared = all(
        len(prompt) > length and list(prompt[:length]) == first[:length] and image_token_id not in prompt[length:]
        for prompt in prompts
    )
    return length if shared else 0
