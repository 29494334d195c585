"""Calibration samples: image-text chats from a built-in task's training split or from a user's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.tasks import TASKS, load_task, task_names
from splitq_edge.image_layout import ImageLayout

Message = dict[str, Any]


@dataclass(frozen=True)
class CalibrationSample:
    """One conversation; image parts hold a path under the key "path".

    Attributes:
        messages: chat messages in transformers' form, `{"role", "content": [{"type": "image" | "text", ...}]}`.
        origin: where the sample came from, for messages ("file:line" or task name).
    """

    messages: tuple[Message, ...]
    origin: str


def check_count(count: int) -> None:
    """Check a number of samples.

    Raises:
        SplitQError: below 1.
    """
    if count < 1:
        raise SplitQError(f"calibration: expected at least 1 sample, got --calib-samples {count}; raise it")


def load_samples(source: str, count: int, *, seed: int) -> list[CalibrationSample]:
    """Calibration samples.

    Args:
        source: built-in tasks as `task_names` reads them (their training splits are used, each gives the same number of
            samples) or a folder that holds images and one `.jsonl` file
            with one `{"messages": [...]}` object a line; image paths are relative to the folder.
        count: samples wanted; a folder with fewer gives all it has, and the caller reports how many were used.
        seed: of the choice of samples.

    Raises:
        SplitQError: unknown source, no samples, a line that is no chat, an image file that is missing.
    """
    check_count(count)
    generator = torch.Generator().manual_seed(seed)
    if _is_tasks(source):
        piles: list[list[CalibrationSample]] = []
        names = task_names(source)
        for number, name in enumerate(names):
            questions = load_task(name, "train")
            share = (count + len(names) - 1 - number) // len(names)
            chosen = torch.randperm(len(questions), generator=generator)[:share].tolist()
            piles.append([_from_question(name, questions[index]) for index in chosen])
        # In turn, so that any first part holds all tasks.
        return [sample for turn in zip_longest(*piles) for sample in turn if sample is not None]
    folder = Path(source)
    if not folder.is_dir():
        raise SplitQError(
            f"calibration data {source}: expected a folder or built-in tasks ({', '.join(sorted(TASKS))}, all), "
            "got neither"
        )
    samples = _read_folder(folder)
    chosen = torch.randperm(len(samples), generator=generator)[:count].tolist()
    return [samples[index] for index in chosen]


def _is_tasks(source: str) -> bool:
    """Whether a source names tasks; a folder of the same name has to be written with a slash."""
    return source == "all" or all(name.strip() in TASKS for name in source.split(","))


def _from_question(task: str, question: Any) -> CalibrationSample:
    return CalibrationSample(
        (
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": str(question.image)},
                    {"type": "text", "text": question.text},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ),
        task,
    )


def _read_folder(folder: Path) -> list[CalibrationSample]:
    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        raise SplitQError(f"calibration data {folder}: expected one .jsonl file of chats, got {len(files)}")
    samples = []
    try:
        text = files[0].read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise SplitQError(f"calibration data {files[0]}: expected a readable UTF-8 file ({error}); mend it") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold U+2028
        if line.strip():
            samples.append(_parse_line(folder, f"{files[0].name}:{number}", line))
    if not samples:
        raise SplitQError(f"calibration data {files[0]}: expected at least one chat, got none; add samples")
    return samples


def _parse_line(folder: Path, origin: str, line: str) -> CalibrationSample:
    try:
        messages = json.loads(line)["messages"]
        parsed = tuple(_parse_message(folder, message) for message in messages)
        if not parsed:
            raise ValueError("no message")
    except (ValueError, KeyError, TypeError) as error:
        raise SplitQError(
            f'calibration data {origin}: expected {{"messages": [{{"role", "content"}}]}} ({error!r}); mend the line'
        ) from error
    for message in parsed:
        for part in message["content"]:
            if part["type"] == "image" and not Path(part["path"]).is_file():
                raise SplitQError(
                    f"calibration data {origin}: expected image {part['path']}, found none; mend the path"
                )
    return CalibrationSample(parsed, origin)


def _parse_message(folder: Path, message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for part in content:
        if part["type"] == "image":
            parts.append({"type": "image", "path": str(folder / (part.get("path") or part["image"]))})
        elif part["type"] != "text":
            raise ValueError(f"type {part['type']!r}, neither image nor text")
        elif not isinstance(part["text"], str):
            raise ValueError(f"text {part['text']!r}")
        else:
            parts.append({"type": "text", "text": part["text"]})
    return {"role": message["role"], "content": parts}


def encode_sample(processor: Any, sample: CalibrationSample, layout: ImageLayout) -> dict[str, torch.Tensor]:
    """Model inputs of one conversation, answer included (answer tokens count as text).

    Returns:
        What `model(**inputs)` takes: input_ids [1, sequence], attention_mask, those of `ImageLayout.model_inputs`, ...;
        and "answer" [1, sequence] bool, the tokens of the last assistant turn; left out where the chat does not end
        with one, or where the template renders the prompt otherwise without it.

    Raises:
        SplitQError: an image cannot be read or the processor refuses the chat.
    """
    answered = sample.messages[-1]["role"] == "assistant"
    if layout.answer_apart and answered:
        encoded = _behind_prompt(processor, sample)
    else:
        encoded = _render(processor, sample, list(sample.messages), generate=False)
    encoded.pop("labels", None)
    pictures = layout.model_inputs(layout.pictures(encoded))
    encoded.pop("pixel_attention_mask", None)
    encoded.update({name: torch.from_numpy(array) for name, array in pictures.items()})
    if answered:
        prompt = _render(processor, sample, list(sample.messages[:-1]), generate=True)["input_ids"]
        ids, length = encoded["input_ids"], prompt.shape[1]
        if length < ids.shape[1] and torch.equal(ids[:, :length], prompt):
            encoded["answer"] = torch.arange(ids.shape[1])[None] >= length
    return encoded


def _behind_prompt(processor: Any, sample: CalibrationSample) -> dict[str, Any]:
    """The processed prompt with the answer's tokens and the end token behind it, of token type 1."""
    encoded = _render(processor, sample, list(sample.messages[:-1]), generate=True)
    text = "".join(part["text"] for part in sample.messages[-1]["content"])
    ids = processor.tokenizer(text + processor.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    behind = torch.tensor([ids])
    ones = torch.ones_like(behind)
    for name, tokens in (("input_ids", behind), ("attention_mask", ones), ("token_type_ids", ones)):
        encoded[name] = torch.cat([encoded[name], tokens], 1)
    return encoded


def _render(processor: Any, sample: CalibrationSample, messages: list[Message], *, generate: bool) -> dict[str, Any]:
    try:
        return dict(
            processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=generate
            )
        )
    except Exception as error:
        fault = _template_fault(processor)
        if fault is not None:
            raise SplitQError(
                f"model: expected a chat template for a picture and a text, the model's own {fault}; "
                "copy it from the original checkpoint"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise SplitQError(f"calibration data {sample.origin}: the processor refused the sample ({reason})") from error


def _template_fault(processor: Any) -> str | None:
    """What the model's chat template does wrong with the plainest question, None for nothing: then it is the data."""
    pictures = hasattr(processor, "image_processor")
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": "what?"}]
    try:
        text = processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"cannot be rendered ({type(error).__name__}: {reason})"
    marks = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    if pictures and any(marks) and not any(mark in text for mark in marks if mark):
        return f"writes no {next(filter(None, marks))} in the place of a picture"
    return None


def describe_source(source: str, samples: Sequence[CalibrationSample]) -> dict[str, object]:
    """What export.json keeps of the calibration data."""
    return {"source": source if _is_tasks(source) else Path(source).name, "samples": len(samples)}
