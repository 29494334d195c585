"""Token ids of questions and answers against the processor's own, and the prefix that prompts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import CHAT_TEMPLATE, IMAGE_TOKEN_ID, IMAGE_TOKENS, prompt_ids, tiny_processor, write_image
from PIL import Image

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.prompts import Prompts, chat, left_padded, right_padded, shared_prefix

END = 2


def processor_with(behind_answer: str) -> Any:
    """The tiny processor; its template writes this text behind an assistant's words instead of the line's end."""
    processor = tiny_processor()
    line_end = "{% if message['role'] == 'assistant' %}" + behind_answer + "{% else %}\n{% endif %}"
    processor.chat_template = CHAT_TEMPLATE.replace("\n{% endfor %}{% if add", line_end + "{% endfor %}{% if add")
    return processor


def text_ids(text: str) -> list[int]:
    return list(tiny_processor().tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def picture(tmp_path: Path) -> Image.Image:
    return Image.open(write_image(tmp_path / "image.png"))


def test_prompt_is_what_the_processor_makes_of_the_chat(picture: Image.Image) -> None:
    processor = tiny_processor()
    prompts = Prompts(processor, [END])
    for text in ("what is it?", "red?", "what is it?"):
        expected = processor.apply_chat_template(
            chat(text, picture), tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
        )
        assert prompts.prompt(text, picture) == expected["input_ids"][0].tolist()
    image = [IMAGE_TOKEN_ID] * IMAGE_TOKENS
    assert prompts.prompt("red?", picture) == [1, *text_ids("user:"), *image, *text_ids("red?assistant:")]


def test_answer_ends_with_the_end_token_that_the_template_writes() -> None:
    assert Prompts(processor_with("</s>"), [END]).answer("what?", "red") == [*text_ids("red"), END]


def test_answer_stops_at_the_end_token() -> None:
    assert Prompts(processor_with("</s>\n"), [END]).answer("what?", "red") == [*text_ids("red"), END]


@pytest.mark.parametrize("behind", ["", " ", "{{ ' \\n' }}"])
def test_answer_of_a_template_without_end_token_gets_one(behind: str) -> None:
    assert Prompts(processor_with(behind), [END, 7]).answer("what?", "red") == [*text_ids("red"), END]


def test_answer_without_words_is_the_end_token() -> None:
    assert Prompts(processor_with("</s>"), [END]).answer("what?", "") == [END]


def test_answer_needs_an_end_token() -> None:
    with pytest.raises(SplitQError, match="expected an end token"):
        Prompts(processor_with(""), []).answer("what?", "red")


def test_template_that_rewrites_the_prompt_is_an_error() -> None:
    processor = tiny_processor()
    processor.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(SplitQError, match="expected the answer behind the generation prompt"):
        Prompts(processor, [END]).answer("what?", "red")


def test_token_across_the_border_of_prompt_and_answer_is_not_used() -> None:
    from tokenizers import models, pre_tokenizers

    processor = tiny_processor()
    vocabulary = dict(processor.tokenizer.get_vocab())
    vocabulary[":r"] = len(vocabulary)
    backend = processor.tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab=vocabulary, merges=[(":", "r")])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = processor.tokenizer("assistant:red", add_special_tokens=False)["input_ids"]
    assert vocabulary[":r"] in whole
    assert Prompts(processor, [END]).answer("what?", "red") == [*text_ids("red"), END]


def test_left_padded_rows_end_together() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_right_padded_rows_begin_together() -> None:
    ids, mask = right_padded([[5, 6, 7], [8], []], pad=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert right_padded([[], []], pad=9)[0].shape == (2, 0)


def test_shared_prefix_ends_with_the_image() -> None:
    prompts = [prompt_ids("user:", 1, text) for text in ("a", "ab")]
    assert shared_prefix(prompts, IMAGE_TOKEN_ID) == len(prompt_ids("user:")) + IMAGE_TOKENS


@pytest.mark.parametrize(
    "prompts",
    [
        [prompt_ids("a", 1, "x"), prompt_ids("b", 1, "x")],  # text before the image differs
        [prompt_ids("a", 1, "x"), prompt_ids("a", 2, "x")],  # more image tokens
        [prompt_ids("a", 2, "x"), prompt_ids("a", 1, "x")],
        [prompt_ids("a", 1, "x"), prompt_ids("a", 1)],  # nothing behind the image
        [prompt_ids("a"), prompt_ids("a")],  # no image
    ],
)
def test_prompts_without_a_shared_prefix(prompts: list[list[int]]) -> None:
    assert shared_prefix(prompts, IMAGE_TOKEN_ID) == 0
