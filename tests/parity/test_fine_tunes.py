"""Checkpoints as users have them after fine-tuning: exported, they answer as their own weights do in torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import lora_adapter, rng, write_chats, write_checkpoint
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.loading import load_model
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens
from splitq_edge.runtime_ops.session import ExportedModel

pytestmark = pytest.mark.slow

NEW_TOKENS = 12
TUNED = ("perturbed", "adapter")


@dataclass
class Models:
    """Checkpoints and their exports by name."""

    checkpoints: dict[str, Path]
    exports: dict[str, Path]


def perturbed(base: Path, folder: Path) -> Path:
    """A copy under another name with every weight of the language model moved, stored in bfloat16."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    generator = rng(1)
    tensors = {
        name: (tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    place = tmp_path_factory.mktemp("fine-tunes")
    base = write_checkpoint(place / "base")
    checkpoints = {
        "base": base,
        "perturbed": perturbed(base, place / "a name of its own"),
        "adapter": lora_adapter(place / "adapter", base=str(base)),
    }
    chats = str(write_chats(place / "chats"))
    exports = {}
    for name, checkpoint in checkpoints.items():
        exports[name] = place / f"{name}-export"
        options = ExportOptions(str(checkpoint), exports[name], method="rtn", calib=chats, calib_samples=2)
        run_export(options, Console(quiet=True))
    return Models(checkpoints, exports)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(4).integers(0, 256, (4, 56, 56, 3), np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def said(folder: Path) -> list[list[int]]:
    """Greedy tokens about each picture."""
    model = ExportedModel(folder, native=False, threads=1)
    generator = Generator(model)
    answers = []
    for picture in pictures():
        inputs = generator.chat("what is it?", [picture])
        features = model.encode_images(inputs)
        steps = greedy_tokens(model, inputs["input_ids"], inputs["attention_mask"], features, max_new_tokens=NEW_TOKENS)
        answers.append([int(step[0]) for step in steps])
    return answers


def test_fine_tuned_copies_answer_otherwise_than_the_base(models: Models) -> None:
    answers = {name: said(folder) for name, folder in models.exports.items()}
    for name in TUNED:
        different = sum(mine != base for mine, base in zip(answers[name], answers["base"], strict=True))
        assert different >= 3, name
    assert answers["perturbed"] != answers["adapter"]


@pytest.mark.parametrize("name", ["base", *TUNED])
def test_logits_are_near_those_of_their_own_weights_and_of_no_others(models: Models, name: str) -> None:
    """Rounding to 4 bits moves logits; other weights move them far more."""
    exported = ExportedModel(models.exports[name], native=False, threads=1)
    inputs = Generator(exported).chat("what is it?", pictures()[:1])
    embeds, modality = exported.embed(inputs["input_ids"], exported.encode_images(inputs))
    got = exported.decode(embeds, modality, inputs["attention_mask"], exported.empty_cache(1))[0]
    quality = {}
    for other, checkpoint in models.checkpoints.items():
        loaded = load_model(str(checkpoint))
        given = {key: torch.from_numpy(value) for key, value in inputs.items()}
        with torch.inference_mode():
            expected = loaded.model(**given, use_cache=False).logits.numpy()
        noise = ((got - expected) ** 2).sum()
        quality[other] = 10 * np.log10((expected**2).sum() / noise)
    own = quality.pop(name)
    assert own > max(quality.values()) + 5, (own, quality)


def test_manifest_and_card_name_the_base(models: Models) -> None:
    for name, base in (("perturbed", "a name of its own"), ("adapter", "base")):
        manifest = json.loads((models.exports[name] / "export.json").read_text(encoding="utf-8"))
        assert manifest["source"] == models.checkpoints[name].name
        assert manifest["base_model"] == base
        card = (models.exports[name] / "README.md").read_text(encoding="utf-8")
        assert card.startswith(f"---\nbase_model: {base}\nbase_model_relation: quantized\n")
        assert "pipeline_tag: image-text-to-text" in card
        assert set(manifest["files"]) >= {"README.md"}
