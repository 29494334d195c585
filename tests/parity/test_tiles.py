"""SmolVLM, whose processor cuts pictures into tiles: what `test_families` leaves out, against transformers' own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from builders import SPECIAL_TOKENS, rng, write_chats
from families import TILE_MARKS, TILE_SIZE, TILE_TOKENS, save_checkpoint, save_processor, tiny_model
from PIL import Image

from splitq_edge.calibration.data import encode_sample, load_samples
from splitq_edge.evaluate.backends import OrtBackend, TorchBackend, answer_all
from splitq_edge.evaluate.prompts import Prompts, chat, shared_prefix
from splitq_edge.evaluate.tasks import Question
from splitq_edge.exporters import export_folder
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.exporters.onnx_export import trace
from splitq_edge.exporters.parts import VisionEncoder
from splitq_edge.image_layout import ImageLayout
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.runtime_ops import library_path
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import verify_files, verify_parity
from splitq_edge.tiles import image_tiles

pytestmark = pytest.mark.slow

WITH_NATIVE = os.environ.get("SPLITQ_EXPECT_NATIVE") == "1" or library_path() is not None
STEPS = 8
TILES = {"wide": 3 + 1, "square": 9 + 1, "tall": 3 + 1}  # and the small copy of the whole
SIZES = {"wide": (100, 30), "square": (64, 64), "tall": (30, 100)}


def picture(shape: str, seed: int = 0) -> Image.Image:
    width, height = SIZES[shape]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@dataclass
class Export:
    loaded: LoadedModel
    folder: Path
    engines: dict[str, ExportedModel]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says letters, none of its special tokens, so that greedy answers run their full length."""
    folder, model = tmp_path_factory.mktemp("smolvlm"), tiny_model("smolvlm")
    with torch.no_grad():
        rows = model.get_input_embeddings().weight  # tied to the output projection
        rows[: len(SPECIAL_TOKENS)] = 0
        rows[-len(TILE_MARKS) :] = 0
    model.save_pretrained(folder)
    save_processor("smolvlm", folder)
    return folder


@pytest.fixture(scope="module")
def samples(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """Chats about pictures with different numbers of tiles."""
    folder = write_chats(tmp_path_factory.mktemp("calibration") / "chats", 3)
    for index, shape in enumerate(SIZES):
        picture(shape, index).save(folder / f"{index}.png")
    processor = load_model(str(checkpoint), lazy=True).processor
    return [encode_sample(processor, sample, ImageLayout("tiles")) for sample in load_samples(str(folder), 3, seed=0)]


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    """Traced graphs by part."""
    return {}


@pytest.fixture(scope="module")
def export(
    checkpoint: Path,
    samples: list[dict[str, torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
    graphs: dict[str, Any],
) -> Export:
    folder, loaded = tmp_path_factory.mktemp("export"), load_model(str(checkpoint))

    def kept(module: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        graphs[type(module).__name__] = graph = trace(module, inputs, **options)
        return graph.clone()

    sample = {name: value for name, value in samples[0].items() if name != "answer"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_folder, "trace", kept)
        write_export(loaded, None, ExportRequest("packed", sample, None, 0), folder)
    engines = {"functions": ExportedModel(folder, native=False, threads=1)}
    if WITH_NATIVE:
        engines["native"] = ExportedModel(folder, native=True, threads=1)
    return Export(loaded, folder, engines)


PROMPTS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    # name: question and pictures of every row
    "one_picture": [("what is it?", ("wide",))],
    "text_only_beside_a_picture": [("hello", ()), ("hello", ("tall",))],
}


def prompt(export: Export, name: str) -> dict[str, torch.Tensor]:
    """What the processor makes of a batch: tiles in a rectangle, filled up with empty ones."""
    processor = export.loaded.processor
    texts = []
    for text, shapes in PROMPTS[name]:
        content = [{"type": "image"} for _ in shapes] + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    pictures = [[picture(shape, 7) for shape in shapes] for _, shapes in PROMPTS[name]]
    images = pictures if any(pictures) else None
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def features_of(model: ExportedModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    if "pixel_values" not in inputs:
        return model.encode_images(None)
    return model.encode_images(image_tiles(inputs["pixel_values"].numpy(), inputs["pixel_attention_mask"].numpy()))


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.inference_mode()
def torch_steps(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Logits of the prompt's real tokens and of `STEPS` greedy ones; these tokens, [batch, 1] each."""
    mask, tokens = inputs["attention_mask"], []
    with loaded.modality_from_inputs():
        output = loaded.model(**inputs, position_ids=positions(mask), use_cache=True)
        logits = [output.logits[mask.bool()].numpy()]
        for _ in range(STEPS):
            tokens.append(output.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            output = loaded.model(
                input_ids=tokens[-1],
                attention_mask=mask,
                position_ids=positions(mask)[:, -1:],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logits.append(output.logits[:, 0].numpy())
    return logits, tokens


def ort_steps(model: ExportedModel, inputs: dict[str, torch.Tensor], tokens: list[torch.Tensor]) -> list[np.ndarray]:
    """The same logits with the tokens given."""
    mask = inputs["attention_mask"].numpy()
    embeds, modality = model.embed(inputs["input_ids"].numpy(), features_of(model, inputs))
    out, cache = model.decode(embeds, modality, mask, model.empty_cache(len(mask)))
    logits = [out[mask.astype(bool)]]
    for token in tokens:
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        embeds, modality = model.embed(token.numpy(), model.encode_images(None))
        out, cache = model.decode(embeds, modality, mask, cache)
        logits.append(out[:, 0])
    return logits


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_of_prompt_and_answer_are_those_of_torch(export: Export, name: str) -> None:
    inputs = prompt(export, name)
    tiles = sum(TILES[shape] for _, shapes in PROMPTS[name] for shape in shapes)
    assert (inputs["input_ids"] == export.loaded.image_token_id).sum() == tiles * TILE_TOKENS
    expected, tokens = torch_steps(export.loaded, inputs)
    for engine, model in export.engines.items():
        for step, (got, wanted) in enumerate(zip(ort_steps(model, inputs, tokens), expected, strict=True)):
            assert got.shape == wanted.shape, engine
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4, err_msg=f"{engine}, step {step}")


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_torch(export: Export, name: str) -> None:
    inputs = prompt(export, name)
    with torch.inference_mode(), export.loaded.modality_from_inputs():
        tokens = export.loaded.model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=[export.loaded.image_token_id]
        )
    expected = tokens[:, inputs["input_ids"].shape[1] :].numpy()
    for engine, model in export.engines.items():
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        steps = greedy_tokens(model, ids, mask, features_of(model, inputs), max_new_tokens=STEPS)
        np.testing.assert_array_equal(np.stack(list(steps), 1), expected, err_msg=engine)


def test_export_verifies_itself_and_names_its_tiles(export: Export) -> None:
    for model in export.engines.values():
        verify_files(model)
        assert [row for row in verify_parity(model) if not row.ok] == []
    manifest = export.engines["functions"].manifest
    assert (manifest["model_type"], manifest["image_tokens"]) == ("smolvlm", TILE_TOKENS)
    session = ort.InferenceSession(str(export.folder / "vision_encoder.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    assert session.get_inputs()[0].shape == ["images", 3, TILE_SIZE, TILE_SIZE]


def test_positions_are_no_part_of_the_vision_graph(export: Export, graphs: dict[str, Any]) -> None:
    kinds = {node.op_type for node in graphs["VisionEncoder"].graph}
    assert {"Conv", "LayerNormalization", "MatMul"} <= kinds
    assert not kinds & {"Where", "Less", "Greater", "Expand", "Gather", "GatherND"}
    model = export.loaded.model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.vision_model.modules())


def test_a_black_tile_of_zeros_is_a_tile(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers takes tiles of zeros for filling; a processor that does not shift colours makes them of black.
    processor = export.loaded.processor
    monkeypatch.setattr(processor.image_processor, "do_normalize", False)
    folder = write_chats(tmp_path / "chats", 1)
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 40:] = 200
    Image.fromarray(half).save(folder / "0.png")
    sample = encode_sample(processor, load_samples(str(folder), 1, seed=0)[0], ImageLayout("tiles"))
    del sample["answer"]
    assert sample["pixel_values"].shape == (TILES["square"], 1, 3, TILE_SIZE, TILE_SIZE)
    assert any(tile.abs().max() < 1e-30 for tile in sample["pixel_values"])
    expected, tokens = torch_steps(export.loaded, sample)
    sample["pixel_attention_mask"] = torch.ones(TILES["square"], 1, TILE_SIZE, TILE_SIZE)
    got = ort_steps(export.engines["functions"], sample, tokens)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-4)


def test_idefics3_has_the_same_vision_graph(tmp_path: Path) -> None:
    loaded = load_model(str(save_checkpoint("idefics3", tmp_path / "model")))
    pixels = torch.randn(3, 3, TILE_SIZE, TILE_SIZE, generator=rng())
    with torch.inference_mode():
        expected = torch.cat(loaded.model.model.get_image_features(pixels[:, None]).pooler_output).numpy()
    graph = trace(
        VisionEncoder(loaded),
        {"pixel_values": pixels[:2].clone()},
        input_names=["pixel_values"],
        output_names=["image_features"],
        dynamic={"pixel_values": {0: "images"}},
    )
    file = tmp_path / "vision.onnx"
    export_folder.ir.save(graph, file)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=0, atol=1e-4)


QUESTIONS = {
    "mixed sizes": ("wide", "square", "tall"),
    "one size": ("square", "square"),
    "not cut": ("wide", "square"),
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_backends_answer_as_transformers_does(export: Export, checkpoint: Path, kind: str, tmp_path: Path) -> None:
    backends = [TorchBackend(str(checkpoint)), OrtBackend(export.folder, native=False, threads=1)]
    questions = []
    for index, shape in enumerate(QUESTIONS[kind]):
        picture(shape, index).save(tmp_path / f"{index}.png")
        texts = ("what?", "is it red?")[: 1 + index % 2]
        questions += [Question(tmp_path / f"{index}.png", text, "abc", "word") for text in texts]
    for backend in backends:
        backend.processor.image_processor.do_image_splitting = kind != "not cut"
    expected = [plain_nll(backends[0].loaded, asked) for asked in questions]
    answers = [answer_all(backend, questions) for backend in backends]
    assert [answer.text for answer in answers[0]] == [answer.text for answer in answers[1]]
    for said in answers:
        assert [answer.nll / answer.tokens for answer in said] == pytest.approx(expected, abs=1e-4)
    prompts = Prompts(backends[1].processor, [2])
    ids = [prompts.prompt(asked.text, Image.open(asked.image)) for asked in questions]
    assert bool(shared_prefix(ids, backends[0].loaded.image_token_id)) == (kind != "mixed sizes")


def plain_nll(loaded: LoadedModel, asked: Question) -> float:
    """Of the right answer a token, by transformers, with the processor's inputs as they are."""
    messages = chat(asked.text, Image.open(asked.image).convert("RGB"))
    inputs = loaded.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    answer = [*loaded.tokenizer(asked.answer, add_special_tokens=False)["input_ids"], 2]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    with torch.inference_mode():
        logits = loaded.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    said = logits[0, -len(answer) - 1 : -1].double().log_softmax(-1)
    return -float(said[range(len(answer)), answer].mean())


RUN_WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "num2words", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None
from splitq_edge.cli import main
main(sys.argv[1:])
"""


def test_a_device_without_torch_answers_about_two_pictures(export: Export, tmp_path: Path) -> None:
    images = []
    for shape in ("wide", "square"):
        picture(shape).save(tmp_path / f"{shape}.png")
        images += ["--image", f"{shape}.png"]
    command = ["run", str(export.folder), *images, "--prompt", "what?", "--max-new-tokens", str(STEPS), "--functions"]
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_TORCH, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    generator = Generator(export.engines["functions"])
    pictures = [picture("wide"), picture("square")]
    assert done.stdout.strip() == generator.answer("what?", pictures, max_new_tokens=STEPS) != ""
