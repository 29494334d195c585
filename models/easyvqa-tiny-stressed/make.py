"""Make easyvqa-tiny-stressed: plant modality-specific outlier channels in easyvqa-tiny and teach it to live with them.

1. Draw 16 channels of the residual stream. 8 get a constant offset for vision tokens, through the bias of the
   projector's last layer; the other 8 get one for text tokens, through the embedding table.
2. Fine-tune the whole model for a short time on the training split, with the trainer of easyvqa-tiny.

    python models/easyvqa-tiny-stressed/make.py --out /some/folder

writes a Hugging Face folder and `planted.json`, the planted channels and their offsets. Without --out the folder of
this script is meant; files that are there are replaced with --force only. The test split is never read. Needs
splitq-edge[quantize,tasks].
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from splitq_edge.artifacts import write_json
from splitq_edge.loading import load_model

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "easyvqa-tiny"
sys.path.insert(0, str(BASE))
from scenes import load_scenes  # noqa: E402 - found through the line above
from train import Trainer, accuracy, answers  # noqa: E402 - likewise

SCHEMA = 1
CHANNELS = 8  # a modality
# Fine-tuning leaves the processor as it is; copies stay equal to the base model's files byte for byte.
COPIED = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")

log = logging.getLogger("easyvqa-tiny-stressed")


@dataclass(frozen=True)
class Plant:
    """The offsets of one modality.

    Attributes:
        channels: ascending channel numbers of the residual stream.
        offsets: what is added to each of them.
    """

    channels: list[int]
    offsets: list[float]


def draw(hidden: int, size: float, *, seed: int) -> dict[str, Plant]:
    """Disjoint channels of text and vision tokens with offsets of +size or -size.

    Args:
        hidden: channels of the residual stream.
        size: magnitude of every offset.
        seed: of channels and signs.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(hidden, generator=generator)[: 2 * CHANNELS].view(2, CHANNELS).sort(dim=-1).values
    signs = torch.randint(0, 2, (2, CHANNELS), generator=generator) * 2 - 1
    return {
        name: Plant(channels.tolist(), (size * sign).tolist())
        for name, channels, sign in zip(("text", "vision"), chosen, signs, strict=True)
    }


@torch.no_grad()
def feature_rms(trainer: Trainer, images: int = 64) -> float:
    """Root mean square of the image features that enter the language model."""
    pixels = trainer.pixel_values(np.arange(min(images, len(trainer.scenes))))
    features = trainer.model.model.get_image_features(pixel_values=pixels).pooler_output
    return torch.cat(list(features)).square().mean().sqrt().item()


@torch.no_grad()
def plant(trainer: Trainer, plants: dict[str, Plant], rms: float) -> None:
    """Add the offsets, vision through the projector's bias and text through the embedding table.

    The table is scaled to the magnitude of the image features before: its own, 0.02, would vanish beside the offsets.
    """
    table = trainer.model.get_input_embeddings().weight  # [vocab, hidden]
    table *= rms / table.square().mean().sqrt()
    bias = trainer.model.model.multi_modal_projector.linear_2.bias  # [hidden]
    for name, target in (("text", table), ("vision", bias)):
        target[..., plants[name].channels] += torch.tensor(plants[name].offsets, device=target.device)


def main() -> None:
    """Plant, fine-tune, write, and measure on images kept out of the training."""
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)

    scenes = load_scenes(options.images)
    cut = len(scenes) - options.held_out
    kept, held_out = scenes[:cut], scenes[cut:]
    base = load_model(str(BASE))
    trainer = Trainer(base.processor, kept, seed=options.seed, device=options.device, model=base.model, autocast=False)
    rms = feature_rms(trainer)
    plants = draw(base.model.config.text_config.hidden_size, options.magnitude * rms, seed=options.seed)
    log.info("rms of the image features %.3f, offsets of magnitude %.3f", rms, options.magnitude * rms)
    for name, values in plants.items():
        log.info("%s channels %s", name, values.channels)
    plant(trainer, plants, rms)
    trainer.train_answers(options.epochs, batch_size=options.batch, lr=options.lr, vision_lr=options.lr)

    trainer.model.save_pretrained(options.out)
    for name in COPIED:
        shutil.copyfile(BASE / name, options.out / name)
    write_json(
        options.out / "planted.json",
        {"schema": SCHEMA, "seed": options.seed, **{name: asdict(values) for name, values in plants.items()}},
    )
    log.info("wrote %s", options.out)
    if held_out:
        questions = [question for scene in held_out for question in scene.questions]
        shares = accuracy(questions, answers(trainer.model, base.processor, questions))
        log.info("accuracy on %d held-out training images: %s", len(held_out), shares)


def parse_options() -> argparse.Namespace:
    """Command line; --smoke shrinks everything that takes time."""
    parser = argparse.ArgumentParser(description="Make easyvqa-tiny-stressed and write it as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: the folder of this script)")
    parser.add_argument("--force", action="store_true", help="replace a model that is in the folder")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one number, one result")
    parser.add_argument("--magnitude", type=float, default=11, help="offset as a multiple of the image features' rms")
    parser.add_argument("--epochs", type=float, default=1, help="epochs of fine-tuning over the images")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate of fine-tuning")
    parser.add_argument("--held-out", type=int, default=200, help="training images kept to measure accuracy")
    parser.add_argument("--images", type=int, help="use only the first images (default: all 4,000)")
    parser.add_argument("--smoke", action="store_true", help="six steps, to see that it still runs")
    options = parser.parse_args()
    if options.smoke:
        if options.out == HERE:
            parser.error("--smoke: expected --out, got none; name a folder, or it would replace the real model")
        options.images, options.held_out, options.epochs = 96, 32, 0.75
    weights = options.out / "model.safetensors"
    if weights.exists() and not options.force:
        parser.error(f"--out: expected a folder without a model, {weights} exists; name another or give --force")
    return options


if __name__ == "__main__":
    main()
