"""Train smolvqa-135m: a vision encoder from scratch in front of SmolLM2-135M-Instruct.

Two stages: the vision encoder and the connector learn labels (names, letters, counts, places) through a throw-away
head; then all answer questions, the language model through low-rank adapters.

    python models/smolvqa-135m/train.py --work build/smolvqa-135m

writes the delta to the base model (`delta.safetensors`) and the log (`training.csv`) beside this script, or to --out.
An interrupted run goes on where the last checkpoint in --work was written. No test picture, word or scene is read.
Needs splitq-edge[quantize,tasks], gguf, and what fetch_data.py fetches.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from architecture import (
    BASE_VOCABULARY,
    GRID,
    IMAGE,
    IMAGE_TOKENS,
    LANGUAGE,
    NEW_TOKENS,
    VISION,
    VISION_PARTS,
    add_adapters,
    build_model,
    build_tokenizer,
    checkpoint,
    delta_of,
    language_linears,
)
from dataset import CLASSES, GROUND, NO_LABEL, PATCH_CLASSES, SLOTS, TASKS, TaskData, load_task_data, prefix
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
# Shares of a batch and strength of the picture's variation: shift and scale (shares of the side), mirrored or not.
SHARES = {
    "vision": {"easyvqa": 0.02, "ocr": 0.50, "counting": 0.14, "spatial": 0.12, "fashion": 0.06, "cifar10": 0.16},
    "answers": {"easyvqa": 0.03, "ocr": 0.34, "counting": 0.14, "spatial": 0.30, "fashion": 0.07, "cifar10": 0.12},
}
VARIATION = {
    "easyvqa": (0.05, 0.10, False),
    "ocr": (0.0, 0.0, False),  # drawn by us, each differently; the labels of patches would move
    "counting": (0.0, 0.0, False),
    "spatial": (0.0, 0.0, False),
    "fashion": (0.06, 0.10, True),
    "cifar10": (0.12, 0.20, True),
}
DRAWN = ("ocr", "counting", "spatial")
LONGEST_ANSWER = 7  # tokens: six letters and the end
GROUND_WEIGHT = 0.1  # most patches show nothing
CHECKPOINT_SECONDS = 60
SAVED = "checkpoint.pt"

log = logging.getLogger("smolvqa-135m")


class LabelHead(nn.Module):
    """Image tokens [batch, tokens, hidden] -> [batch, slots, classes]: one learned query a slot looks at them."""

    def __init__(self, hidden: int, width: int = 384) -> None:
        super().__init__()
        self.inside = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width) * 0.02)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 8, batch_first=True) for _ in range(2))
        self.mix = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.out = nn.Parameter(torch.randn(len(SLOTS), width, CLASSES) * 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits."""
        tokens = self.norm(self.inside(tokens))
        states = self.queries.expand(len(tokens), -1, -1)
        for attention, mix in zip(self.attention, self.mix, strict=True):
            states = states + attention(states, tokens, tokens, need_weights=False)[0]
            states = states + mix(states)
        return torch.einsum("bsw,swc->bsc", states, self.out.to(states.dtype))


class Trainer:
    """Both stages over data that lives on the device.

    Args:
        base: folder of SmolLM2's weights.
        work: where checkpoints go.
        device: torch device.
        seed: of the initial weights and of the batches.
        compile_layers: compile the transformer layers (pays on a GPU).
    """

    def __init__(self, base: Path, work: Path, device: str, seed: int, *, compile_layers: bool) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.work = work
        self.tokenizer = build_tokenizer(base)
        self.model = build_model(base, self.tokenizer).requires_grad_(False)
        add_adapters(self.model)
        language = self.model.get_submodule(LANGUAGE)
        self.model.model.vision_model.requires_grad_(True)
        self.model.model.connector.requires_grad_(True)
        self.adapters = [p for name, p in language.named_parameters() if name.endswith((".down", ".up"))]
        embedding = language.embed_tokens.weight.detach()
        self.tokens = nn.Parameter(embedding[:BASE_VOCABULARY].mean(0, keepdim=True).repeat(len(NEW_TOKENS), 1))
        self.head = LabelHead(embedding.shape[1])
        self.patch_head = nn.Linear(VISION["hidden_size"], PATCH_CLASSES)
        self.model.to(self.device)
        rotary = copy.deepcopy(language.rotary_emb)  # its frequencies stay in float32, as in the model that ships
        language.to(torch.bfloat16)
        language.rotary_emb = rotary
        for adapter in self.adapters:
            adapter.data = adapter.data.float()
            adapter.requires_grad_(True)
        self.head.to(self.device)
        self.patch_head.to(self.device)
        self.tokens.data = self.tokens.data.to(self.device)
        self.prefix = torch.tensor(prefix(self.tokenizer), device=self.device)
        self.places = torch.arange(GRID * GRID, device=self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.data: dict[str, TaskData] = {}
        self.held_out: dict[str, TaskData] = {}
        self.rows: list[dict[str, object]] = []
        if compile_layers:
            for layer in (*language.layers, *self.model.model.vision_model.encoder.layers):
                layer.compile()

    def label_parameters(self) -> list[nn.Parameter]:
        """Of the heads that the first stage throws away."""
        return [*self.head.parameters(), *self.patch_head.parameters()]

    def start_from(self, delta: dict[str, torch.Tensor]) -> None:
        """Go on from what an earlier training wrote, see `delta_of`."""
        self.tokens.data.copy_(delta["tokens"])
        for part in VISION_PARTS:
            module = self.model.get_submodule(part)
            module.load_state_dict({name: delta[f"{part}.{name}"].float() for name in module.state_dict()})
        language = self.model.get_submodule(LANGUAGE)
        for name in language_linears(self.model):
            adapter = language.get_submodule(name)
            adapter.down.data.copy_(delta[f"lora.{name}.down"])
            adapter.up.data.copy_(delta[f"lora.{name}.up"])

    def load(self, words_count: int, scenes_count: int, workers: int) -> None:
        """Draw and read the pictures of every task."""
        for task in TASKS:
            begin = time.monotonic()
            kept, held_out = load_task_data(
                task, self.tokenizer, words_count=words_count, scenes_count=scenes_count, workers=workers
            )
            self.data[task], self.held_out[task] = kept.to(self.device), held_out.to(self.device)
            log.info(
                "%s: %d pictures, %d questions, %.0f s",
                task,
                len(kept.pixels),
                len(kept.ids),
                time.monotonic() - begin,
            )

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, 96, 96] -> [batch, patches, hidden]; the encoder's own steps for whole pictures."""
        vision = self.model.model.vision_model
        patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        states = patches + vision.embeddings.position_embedding(self.places)
        for layer in vision.encoder.layers:
            output = layer(states, attention_mask=None)
            states = output if isinstance(output, torch.Tensor) else output[0]
        return vision.post_layernorm(states)

    def choose(self, task: str, count: int) -> torch.Tensor:
        """Random question rows of a task."""
        return torch.randint(len(self.data[task].ids), (count,), generator=self.generator, device=self.device)

    def varied(self, task: str, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 96, 96, 3] uint8 -> [batch, 3, 96, 96] as the processor normalizes; most photos moved and scaled."""
        x = normalized(pixels)
        count = len(x)

        def chance(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=self.generator, device=self.device) * 2 - 1

        contrast = 1 + 0.2 * chance(count, 1, 1, 1)
        x = x * contrast + 0.1 * chance(count, 1, 1, 1)
        if task == "ocr":  # any colours do: mix the channels, and turn half of the pictures to negatives
            order = torch.rand(count, 3, generator=self.generator, device=self.device).argsort(1)
            x = x.gather(1, order[..., None, None].expand_as(x)) * torch.where(chance(count, 1, 1, 1) > 0, 1.0, -1.0)
        shift, scale, mirrored = VARIATION[task]
        if not shift:
            return x
        kept = (chance(count) > -0.5).float()  # a quarter stays as it is: sampling softens the others
        grow = 1 + scale * chance(count) * kept
        flip = torch.where((chance(count) > 0) & mirrored, -1.0, 1.0)
        moves = 2 * shift * chance(count, 2) * kept[:, None]
        zero = torch.zeros_like(grow)
        theta = torch.stack(
            [torch.stack([grow * flip, zero, moves[:, 0]], -1), torch.stack([zero, grow, moves[:, 1]], -1)], 1
        )
        grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
        x = functional.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return self._erased(x) if task == "cifar10" else x

    def _erased(self, x: torch.Tensor) -> torch.Tensor:
        """Grey out a random rectangle of half of the pictures."""
        count, side = len(x), x.shape[-1]
        centre = torch.rand(count, 2, generator=self.generator, device=self.device) * side
        half = (0.05 + 0.17 * torch.rand(count, 2, generator=self.generator, device=self.device)) * side
        half = half * (torch.rand(count, 1, generator=self.generator, device=self.device) < 0.5)
        along = torch.arange(side, device=self.device)
        inside = [(along - centre[:, axis : axis + 1]).abs() < half[:, axis : axis + 1] for axis in (0, 1)]
        return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)

    def vision_loss(self, counts: dict[str, int]) -> dict[str, torch.Tensor]:
        """Stage 1: cross entropy of the labels and of what the patches show, by task."""
        pixels, labels, shown = [], [], []
        for task, count in counts.items():
            data = self.data[task]
            images = data.image[self.choose(task, count)]
            pixels.append(self.varied(task, data.pixels[images]))
            labels.append(data.labels[images].long())
            shown.append(data.patches[images].long())
        patches = self.patches(torch.cat(pixels))
        sizes = list(counts.values())
        logits = self.head(self.model.model.connector(patches)).float().split(sizes)
        shapes = self.patch_head(patches).float().split(sizes)
        losses = {}
        for task, part, wanted, shape, seen in zip(counts, logits, labels, shapes, shown, strict=True):
            losses[task] = functional.cross_entropy(part.flatten(0, 1), wanted.flatten(), ignore_index=NO_LABEL)
            if task in DRAWN:
                nll = functional.cross_entropy(shape.flatten(0, 1), seen.flatten(), reduction="none")
                weight = torch.where(seen.flatten() == GROUND, GROUND_WEIGHT, 1.0)
                losses[task] = losses[task] + (nll * weight).sum() / weight.sum()
        return losses

    def answer_loss(self, counts: dict[str, int]) -> dict[str, torch.Tensor]:
        """Stage 2: cross entropy of the answers' tokens, each answer with weight 1, by task."""
        pixels, rows = [], []
        for task, count in counts.items():
            chosen = self.choose(task, count)
            data = self.data[task]
            pixels.append(self.varied(task, data.pixels[data.image[chosen]]))
            rows.append((data.ids[chosen], data.length[chosen], data.answer[chosen]))
        longest = max(ids.shape[1] for ids, _, _ in rows)
        ids = torch.cat([functional.pad(ids, (0, longest - ids.shape[1])) for ids, _, _ in rows])
        length, answer = (torch.cat([row[index] for row in rows]) for index in (1, 2))
        nll, _, known = self._answers(torch.cat(pixels), ids, length, answer)
        by_row = (nll * known).sum(1) / known.sum(1)
        return {task: part.mean() for task, part in zip(counts, by_row.split(list(counts.values())), strict=True)}

    def _answers(
        self, pixels: torch.Tensor, ids: torch.Tensor, length: torch.Tensor, answer: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Of the answers' tokens, each [batch, longest answer]: NLL, whether it is the likeliest, whether it exists."""
        language = self.model.get_submodule(LANGUAGE)
        images = self.model.model.connector(self.patches(pixels))
        table = torch.cat([language.embed_tokens.weight[:BASE_VOCABULARY], self.tokens.to(torch.bfloat16)])
        whole = torch.cat([self.prefix.expand(len(ids), -1), ids], 1)
        embeds = functional.embedding(whole, table)
        first = int((self.prefix == self.tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[0])
        embeds = torch.cat(
            [embeds[:, :first], images.to(torch.bfloat16), embeds[:, first + IMAGE_TOKENS :]], 1
        )  # [batch, tokens, hidden]
        # Padding is behind the answer: causal attention never reads it.
        states = language(inputs_embeds=embeds, use_cache=False).last_hidden_state
        place = answer[:, None] + torch.arange(LONGEST_ANSWER, device=self.device)
        known = place < length[:, None]
        place = torch.minimum(place, length[:, None] - 1)
        index = (len(self.prefix) + place - 1)[..., None].expand(-1, -1, states.shape[-1])
        logits = functional.linear(states.gather(1, index), table).float()
        targets = ids.gather(1, place)
        nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return nll.view_as(targets), logits.argmax(-1) == targets, known

    def fit(
        self,
        stage: str,
        losses_of: Callable[[dict[str, int]], dict[str, torch.Tensor]],
        rates: Sequence[tuple[Sequence[nn.Parameter], float]],
        *,
        steps: int,
        minutes: float,
        batch: int,
        log_every: int,
    ) -> None:
        """AdamW with warm-up and cosine decay over the steps or the minutes, whichever ends first.

        Goes on from a checkpoint of the same stage.
        """
        counts = {task: max(1, round(batch * share)) for task, share in SHARES[stage].items()}
        groups = [{"params": list(parameters), "lr": rate} for parameters, rate in rates]
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.03, fused=True)
        warm = min(200, steps // 10 + 1)
        done, before = self._resume(stage, parameters, optimizer)
        saved = time.monotonic()
        begin = saved - before
        rates_now = [rate for _, rate in rates]
        sums = {task: torch.zeros((), device=self.device) for task in counts}
        shares = {task: count / sum(counts.values()) for task, count in counts.items()}
        logged = done
        for step in range(done + 1, steps + 1):
            share = min(1.0, max((step - 1) / steps, (time.monotonic() - begin) / (60 * minutes)))
            last = step == steps or share == 1.0
            for group, rate in zip(optimizer.param_groups, rates_now, strict=True):
                group["lr"] = rate * min(1.0, step / warm) * (0.5 + 0.5 * math.cos(math.pi * share))
            with torch.autocast(self.device.type, torch.bfloat16):
                losses = losses_of(counts)
                loss = sum(shares[task] * value for task, value in losses.items())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for task, value in losses.items():
                sums[task] += value.detach()
            if step % log_every == 0 or last:
                means = {task: round(float(total) / (step - logged), 4) for task, total in sums.items()}
                logged = step
                self.rows.append({"stage": stage, "step": step, "seconds": round(time.monotonic() - begin), **means})
                log.info("%s %d/%d, %.0f s, %s", stage, step, steps, time.monotonic() - begin, means)
                for total in sums.values():
                    total.zero_()
            if time.monotonic() - saved > CHECKPOINT_SECONDS or last:
                self._save(stage, step, time.monotonic() - begin, parameters, optimizer)
                saved = time.monotonic()
            if last:
                break

    def _save(
        self,
        stage: str,
        step: int,
        seconds: float,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        content = {
            "stage": stage,
            "step": step,
            "seconds": seconds,
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "vision": self.model.model.vision_model.state_dict(),
            "connector": self.model.model.connector.state_dict(),
            "rows": self.rows,
        }
        torch.save(content, self.work / f"{SAVED}.new")
        os.replace(self.work / f"{SAVED}.new", self.work / SAVED)

    def saved(self) -> dict[str, object] | None:
        """The last checkpoint, if there is one."""
        path = self.work / SAVED
        return torch.load(path, map_location=self.device) if path.is_file() else None

    def _resume(
        self, stage: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float]:
        """Steps and seconds that a checkpoint has behind it, 0 without one."""
        content = self.saved()
        if content is None:
            return 0, 0.0
        self.rows = content["rows"]
        self.generator.set_state(content["generator"].cpu())
        if content["stage"] != stage:  # the first stage is done
            self.model.model.vision_model.load_state_dict(content["vision"])
            self.model.model.connector.load_state_dict(content["connector"])
            return 0, 0.0
        for parameter, value in zip(parameters, content["parameters"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(content["optimizer"])
        log.info("%s: goes on behind step %d", stage, content["step"])
        return content["step"], content["seconds"]

    @torch.inference_mode()
    def validate(self, most: int, batch: int = 250) -> dict[str, float]:
        """Share of at most so many held-out training questions a task whose every answer token is the likeliest."""
        shares = {}
        for task, data in self.held_out.items():
            count = min(most, len(data.ids))
            right = torch.zeros(count, dtype=torch.bool, device=self.device)
            for begin in range(0, count, batch):
                part = slice(begin, min(begin + batch, count))
                with torch.autocast(self.device.type, torch.bfloat16):
                    pixels = normalized(data.pixels[data.image[part]])
                    _, same, known = self._answers(pixels, data.ids[part], data.length[part], data.answer[part])
                right[part] = (same | ~known).all(1)
            shares[task] = round(float(right.float().mean()), 4)
        return shares


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """[batch, 96, 96, 3] uint8 -> [batch, 3, 96, 96] float32 with mean 0.5 and deviation 0.5."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    """Train, validate, write the delta."""
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        checkpoint(options.base), options.work, options.device, options.seed, compile_layers=options.compile
    )
    if options.init is not None:
        trainer.start_from(load_file(options.init))
    trainer.load(options.words, options.scenes, options.workers)
    model = trainer.model.model
    vision, connector = list(model.vision_model.parameters()), list(model.connector.parameters())
    stages = {
        "vision": (trainer.vision_loss, [([*vision, *connector, *trainer.label_parameters()], options.vision_lr)]),
        "answers": (
            trainer.answer_loss,
            [(vision, 0.3 * options.lr), (connector, options.lr), ([*trainer.adapters, trainer.tokens], options.lr)],
        ),
    }
    content = trainer.saved()
    for stage, (losses_of, rates) in stages.items():
        if stage == "vision" and content is not None and content["stage"] != stage:
            continue
        steps = options.vision_steps if stage == "vision" else options.answer_steps
        minutes = options.vision_minutes if stage == "vision" else options.answer_minutes
        batch = options.vision_batch if stage == "vision" else options.batch
        trainer.fit(stage, losses_of, rates, steps=steps, minutes=minutes, batch=batch, log_every=options.log_every)
    save_file(delta_of(trainer.model, trainer.tokens), options.out / "delta.safetensors")
    shares = trainer.validate(options.validate)
    log.info("accuracy on held-out training questions: %s", shares)
    trainer.rows.append({"stage": "held-out accuracy", **shares})
    with (options.out / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["stage", "step", "seconds", *TASKS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(trainer.rows)


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train smolvqa-135m and write its delta.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=Path("build/smolvqa-135m"), help="folder of checkpoints")
    parser.add_argument("--base", type=Path, default=Path("build/smollm2-135m"), help="folder of SmolLM2's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init", type=Path, help="delta of an earlier training to go on from")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw pictures")
    parser.add_argument("--words", type=int, default=120_000, help="pictures of words")
    parser.add_argument("--scenes", type=int, default=40_000, help="scenes for each of counting and spatial")
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--vision-minutes", type=float, default=math.inf, help="end the first stage by then")
    parser.add_argument("--vision-batch", type=int, default=512)
    parser.add_argument("--vision-lr", type=float, default=1e-3)
    parser.add_argument("--answer-steps", type=int, default=5000)
    parser.add_argument("--answer-minutes", type=float, default=math.inf, help="end the second stage by then")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--validate", type=int, default=2000, help="held-out questions a task")
    parser.add_argument("--log-every", type=int, default=50)
    return parser.parse_args()


if __name__ == "__main__":
    main()
