"""Train easyvqa-tiny, a 2.5 million parameter LLaVA, from scratch on the training split of easy-VQA.

Two stages, because a language model learns nothing from features that carry nothing yet:

1. the vision tower alone learns to name shape and colour; the labels are derived from the training questions;
2. the whole model learns to answer, all questions of an image packed behind one copy of the image.

    python models/easyvqa-tiny/train.py --out /some/folder

writes a Hugging Face folder: config, weights (float32), tokenizer, processor, chat template. Without --out it
replaces the files beside this script. The test split is never read. Needs splitq-edge[quantize,tasks].
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from architecture import (
    IMAGE,
    IMAGE_TOKENS,
    VISION_HIDDEN,
    build_model,
    build_processor,
    conversation,
)
from PIL import Image
from scenes import Scene, load_scenes, moved, name_labels, reworded
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from splitq_edge.evaluate.tasks import Question

HERE = Path(__file__).resolve().parent
# The end token follows every answer and is learned at once; at full weight it would only dilute the loss.
END_WEIGHT = 0.1

log = logging.getLogger("easyvqa-tiny")


@dataclass(frozen=True)
class Batch:
    """Questions of several images, the questions of an image packed in one row behind its image tokens.

    Attributes:
        input_ids: [rows, tokens] int64.
        position_ids: [rows, tokens] int64; every question continues at the end of the image prefix.
        attention_mask: [rows, 1, tokens, tokens] bool; a question sees the prefix and itself.
        predict_at: [2, targets] int64, row and column of the tokens that predict a target.
        targets: [targets] int64, per question the answer token and the end token in turn.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    predict_at: torch.Tensor
    targets: torch.Tensor


class Trainer:
    """What both stages share: model, processor, the images, the random generator and the loop.

    Args:
        processor: tokenizer, image steps and chat template.
        scenes: the images to learn from.
        seed: of the initial weights, the order of the images and their variations.
        device: torch device.
        log_every: steps between two lines of the log.
        model: a model to go on from; without one an untrained model is built.
        autocast: bfloat16 where torch's autocast allows it, else float32 (faster on a CPU without bfloat16).
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        scenes: Sequence[Scene],
        *,
        seed: int,
        device: str,
        log_every: int = 50,
        model: LlavaForConditionalGeneration | None = None,
        autocast: bool = True,
    ) -> None:
        torch.manual_seed(seed)  # transformers draws the initial weights from the global generator
        self.rng = np.random.default_rng(seed)
        self.processor = processor
        self.scenes = scenes
        self.device = torch.device(device)
        self.log_every = log_every
        self.autocast = autocast
        self.model = (model or build_model(processor.tokenizer)).to(self.device)
        steps = processor.image_processor
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (steps.image_mean, steps.image_std)
        )
        self.token_cache: dict[tuple[str, str], list[int]] = {}
        self.prefix = self._prefix()

    def train_vision(self, epochs: float, *, batch_size: int = 64, lr: float = 1e-3) -> None:
        """Stage 1: the vision tower and a throw-away head name the shape and the colour of single images."""
        labels = [name_labels(self.scenes, kind) for kind in ("shape", "color")]
        sizes = [len(names) for names, _ in labels]
        targets = torch.stack([values for _, values in labels], dim=1)  # [scenes, 2]
        unknown = (targets < 0).sum(dim=0).tolist()
        log.info("images without a known shape: %d, colour: %d, of %d", *unknown, len(targets))
        tower = self.model.model.vision_tower
        head = nn.Sequential(nn.LayerNorm(VISION_HIDDEN), nn.Linear(VISION_HIDDEN, sum(sizes)))
        head.to(self.device)

        def loss_of(rows: np.ndarray) -> torch.Tensor:
            hidden = tower(pixel_values=self.pixel_values(rows)).last_hidden_state  # [rows, 1 + 64, hidden]
            logits = head(hidden[:, 1:].mean(dim=1)).float().split(sizes, dim=-1)  # [rows, names] each
            wanted = targets[rows].to(self.device)
            terms = [
                functional.cross_entropy(part, wanted[:, i], ignore_index=-1, reduction="sum")
                for i, part in enumerate(logits)
            ]
            return torch.stack(terms).sum() / len(rows)

        self._fit("vision", loss_of, [(tower, lr), (head, lr)], epochs=epochs, batch_size=batch_size)

    def train_answers(self, epochs: float, *, batch_size: int = 16, lr: float = 1e-3, vision_lr: float = 3e-4) -> None:
        """Stage 2: the whole model answers; the trained tower moves more slowly than the new rest."""

        def loss_of(rows: np.ndarray) -> torch.Tensor:
            batch = self.pack([self.ask(self.scenes[row].questions) for row in rows])
            hidden = self.model.model(
                input_ids=batch.input_ids,
                pixel_values=self.pixel_values(rows),
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state  # [rows, tokens, hidden]
            logits = self.model.lm_head(hidden[batch.predict_at[0], batch.predict_at[1]]).float()  # [targets, vocab]
            loss = functional.cross_entropy(logits, batch.targets, reduction="none").view(-1, 2).mean(dim=0)
            return loss[0] + END_WEIGHT * loss[1]

        model = self.model.model
        rates = [
            (model.vision_tower, vision_lr),
            (model.multi_modal_projector, lr),
            (model.language_model, lr),
            (self.model.lm_head, lr),
        ]
        self._fit("answers", loss_of, rates, epochs=epochs, batch_size=batch_size)

    def ask(self, questions: Sequence[Question], most: int = 12) -> list[list[int]]:
        """Tokens behind the image of at most `most` of the questions, each reworded at random."""
        chosen = self.rng.permutation(len(questions))[:most]
        return [self.tokens(reworded(questions[i].text, self.rng), questions[i].answer) for i in chosen]

    def tokens(self, text: str, answer: str) -> list[int]:
        """Token ids of a question and its answer, from behind the image up to the end token."""
        if (text, answer) not in self.token_cache:
            rendered = self.processor.apply_chat_template(conversation(text, answer), tokenize=False)
            ids = self.processor.tokenizer(rendered.partition(f"{IMAGE}\n")[2])["input_ids"]
            self.token_cache[text, answer] = ids
        return self.token_cache[text, answer]

    def pack(self, dialogs: Sequence[Sequence[list[int]]]) -> Batch:
        """One row an image: prefix, then question after question, each blind to the others."""
        start = len(self.prefix)
        length = start + max(sum(len(ids) - 1 for ids in row) for row in dialogs)
        input_ids = torch.full((len(dialogs), length), self.processor.tokenizer.pad_token_id)
        position_ids = torch.zeros(len(dialogs), length, dtype=torch.long)
        owner = torch.full((len(dialogs), length), -1)  # 0 image prefix, 1.. question, -1 padding
        input_ids[:, :start], position_ids[:, :start], owner[:, :start] = (
            torch.tensor(self.prefix),
            torch.arange(start),
            0,
        )
        predict_at, targets = [], []
        for row, dialog in enumerate(dialogs):
            begin = start
            for number, ids in enumerate(dialog, 1):
                end = begin + len(ids) - 1  # the end token is only predicted, never read
                input_ids[row, begin:end] = torch.tensor(ids[:-1])
                position_ids[row, begin:end] = torch.arange(start, start + end - begin)
                owner[row, begin:end] = number
                predict_at += [(row, end - 2), (row, end - 1)]
                targets += ids[-2:]  # every answer is one token: the tokenizer was made so
                begin = end
        reader, read = owner[:, :, None], owner[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        batch = Batch(
            input_ids,
            position_ids,
            (((reader == read) | (read == 0)) & causal)[:, None],
            torch.tensor(predict_at).T,
            torch.tensor(targets),
        )
        return Batch(**{name: value.to(self.device) for name, value in vars(batch).items()})

    def pixel_values(self, rows: np.ndarray) -> torch.Tensor:
        """Freshly augmented images as the processor would give them: [rows, 3, 64, 64] float32."""
        pixels = np.stack([moved(self.scenes[row], self.rng) for row in rows])
        return (torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2) / 255 - self.mean) / self.std

    def _prefix(self) -> list[int]:
        """Token ids up to the line break behind the image, the image token repeated as by the processor."""
        rendered = self.processor.apply_chat_template(conversation(""), tokenize=False)
        text = rendered.partition("\n")[0].replace(IMAGE, IMAGE * IMAGE_TOKENS) + "\n"
        return self.processor.tokenizer(text)["input_ids"]

    def _fit(
        self,
        stage: str,
        loss_of: Callable[[np.ndarray], torch.Tensor],
        rates: Sequence[tuple[nn.Module, float]],
        *,
        epochs: float,
        batch_size: int,
    ) -> None:
        """AdamW with warm-up and cosine decay; the weights are float32 with and without autocast."""
        groups = [{"params": list(module.parameters()), "lr": lr} for module, lr in rates]
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        steps = max(1, round(epochs * len(self.scenes) / batch_size))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        self.model.train()
        begin, recent = time.monotonic(), []
        for step, rows in zip(range(1, steps + 1), self._batches(batch_size), strict=False):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = loss_of(rows)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent.append(loss.item())
            if step % self.log_every == 0 or step in (1, 2, 3, steps):
                minutes = (time.monotonic() - begin) / 60
                log.info("%s step %d/%d, %.1f min, loss %.6f", stage, step, steps, minutes, np.mean(recent))
                recent.clear()

    def _batches(self, batch_size: int) -> Iterator[np.ndarray]:
        while True:
            order = self.rng.permutation(len(self.scenes))
            for begin in range(0, max(1, len(order) - batch_size + 1), batch_size):
                yield order[begin : begin + batch_size]


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers in float32 through the plain path of a user: processor, generate, decode."""
    model.eval()
    found: list[str] = []
    for begin in range(0, len(questions), batch_size):
        chunk = questions[begin : begin + batch_size]
        chats = [conversation(question.text) for question in chunk]
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
        images = [Image.open(question.image).convert("RGB") for question in chunk]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    return found


def accuracy(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """Share of exact matches in all and by question type."""
    marks: dict[str, list[bool]] = {}
    for question, text in zip(questions, texts, strict=True):
        for key in ("all", question.type):
            marks.setdefault(key, []).append(text.strip().lower() == question.answer)
    return {key: sum(values) / len(values) for key, values in marks.items()}


def main() -> None:
    """Train, write, and measure on images kept out of the training."""
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)

    scenes = load_scenes(options.images)
    cut = len(scenes) - options.held_out
    kept, held_out = scenes[:cut], scenes[cut:]
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    processor = build_processor(template, [question for scene in scenes for question in scene.questions])
    trainer = Trainer(processor, kept, seed=options.seed, device=options.device)
    log.info("%.2f million parameters", sum(p.numel() for p in trainer.model.parameters()) / 1e6)
    trainer.train_vision(options.vision_epochs)
    trainer.train_answers(options.answer_epochs)

    trainer.model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    log.info("wrote %s", options.out)
    if held_out:
        questions = [question for scene in held_out for question in scene.questions]
        shares = accuracy(questions, answers(trainer.model, processor, questions))
        log.info("accuracy on %d held-out training images: %s", len(held_out), shares)


def parse_options() -> argparse.Namespace:
    """Command line; --smoke shrinks everything that takes time."""
    parser = argparse.ArgumentParser(description="Train easyvqa-tiny and write it as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, help="folder to write (default: the folder of this script)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one number, one result")
    parser.add_argument("--vision-epochs", type=float, default=24, help="epochs of stage 1 over the images")
    parser.add_argument("--answer-epochs", type=float, default=6, help="epochs of stage 2 over the images")
    parser.add_argument("--held-out", type=int, default=200, help="training images kept to measure accuracy")
    parser.add_argument("--images", type=int, help="use only the first images (default: all 4,000)")
    parser.add_argument("--smoke", action="store_true", help="three steps a stage, to see that it still runs")
    options = parser.parse_args()
    if options.smoke:
        if options.out is None:
            parser.error("--smoke: expected --out, got none; name a folder, or it would replace the real model")
        options.images, options.held_out, options.vision_epochs, options.answer_epochs = 96, 32, 3, 0.75
    options.out = options.out or HERE
    return options


if __name__ == "__main__":
    main()
