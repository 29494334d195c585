"""A tiny random model of every family: exported graphs, our loop and onnxruntime-genai against transformers."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CLOSED_FORM, SPECIAL_TOKENS, calibration_state, write_chats
from families import save_processor, tiny_model
from PIL import Image

from splitq_edge.adapters.registry import ADAPTERS
from splitq_edge.calibration.data import encode_sample, load_samples
from splitq_edge.config import preset
from splitq_edge.convert import assemble
from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.backends import OrtBackend, TorchBackend, answer_all
from splitq_edge.evaluate.tasks import Question
from splitq_edge.exporters import export_folder
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.exporters.layouts.registry import layout_named
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.runtime_ops import library_path
from splitq_edge.runtime_ops.genai import PACKAGE, GenaiGenerator, why_not
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import verify_files, verify_parity

pytestmark = pytest.mark.slow

FAMILIES = sorted(name for name, adapter in ADAPTERS.items() if adapter.pixel_layout)
WITH_PICTURE = ("paligemma",)  # their processors refuse a prompt without one
WITH_NATIVE = os.environ.get("SPLITQ_EXPECT_NATIVE") == "1" or library_path() is not None
needs_genai = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="onnxruntime-genai is not installed")
STEPS = 8
SIZES = {"wide": (150, 60), "square": (90, 90), "tall": (40, 130)}

PROMPTS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    # name: question and pictures of every row
    "two_sizes_in_a_prompt": [("which one is larger?", ("tall", "square"))],
    "text_only": [("hello, who are you?", ())],
    "two_sizes_in_a_batch": [("what shape is in the picture?", ("square",)), ("red?", ("wide",))],
    "three_pictures_beside_one": [("a", ("wide", "square", "tall")), ("hello", ("tall",))],
}


def picture(shape: str, seed: int = 0) -> Image.Image:
    width, height = SIZES[shape]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@dataclass
class Export:
    family: str
    scheme: str
    loaded: LoadedModel
    folder: Path
    engines: dict[str, ExportedModel]
    genai: ExportedModel | None  # the same in its layout, where genai runs the family


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says letters, none of its special tokens, so that greedy answers run their full length."""
    folder, model = tmp_path_factory.mktemp(request.param), tiny_model(request.param, tied=False)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[: len(SPECIAL_TOKENS)] = 0
        head[len(SPECIAL_TOKENS) + 256 :] = 0
    model.save_pretrained(folder)
    save_processor(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def samples(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """Chats about pictures of different sizes."""
    folder = write_chats(tmp_path_factory.mktemp("calibration") / "chats", 3)
    for index, shape in enumerate(SIZES):
        picture(shape, index).save(folder / f"{index}.png")
    loaded = load_model(str(checkpoint), lazy=True)
    return [
        encode_sample(loaded.processor, sample, loaded.image_layout) for sample in load_samples(str(folder), 3, seed=0)
    ]


@pytest.fixture(scope="module")
def graphs(checkpoint: Path) -> dict[str, Any]:
    """Traced graphs of a family by part; vision encoder and embedding are float in both exports."""
    return {}


@pytest.fixture(scope="module", params=["none", "W4A8"])
def export(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    samples: list[dict[str, torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
    graphs: dict[str, Any],
) -> Export:
    scheme, folder = request.param, tmp_path_factory.mktemp(request.param)
    loaded, quantized = load_model(str(checkpoint)), None
    if scheme != "none":
        config = replace(preset(scheme), learning=CLOSED_FORM)
        place = tmp_path_factory.mktemp("state")
        state = calibration_state(load_model(str(checkpoint), lazy=True), config, samples, place)
        quantized = assemble(loaded, config, state)
    trace, trace_decoder = export_folder.trace, export_folder.trace_decoder

    def traced_once(module: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        part = type(module).__name__
        if part not in graphs:
            graphs[part] = trace(module, inputs, **options)
        return graphs[part].clone()

    def decoder_traced_once(*given: Any, **options: Any) -> Any:
        if scheme not in graphs:
            graphs[scheme] = trace_decoder(*given, **options)
        return graphs[scheme].clone()

    sample = {name: value for name, value in samples[0].items() if name != "answer"}
    layouts = ["flat", "genai"] if loaded.adapter.genai_type else ["flat"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_folder, "trace", traced_once)
        patch.setattr(export_folder, "trace_decoder", decoder_traced_once)
        for layout in layouts:
            (folder / layout).mkdir()
            request_ = ExportRequest("packed", sample, None, 0, layout=layout)
            write_export(loaded, quantized, request_, folder / layout)
    engines = {"functions": ExportedModel(folder / "flat", native=False, threads=1)}
    if WITH_NATIVE:
        engines["native"] = ExportedModel(folder / "flat", native=True, threads=1)
    genai = ExportedModel(folder / "genai", threads=1) if "genai" in layouts else None
    return Export(loaded.adapter.model_type, scheme, loaded, folder / "flat", engines, genai)


def prompt(export: Export, name: str) -> dict[str, torch.Tensor]:
    """What the family's processor makes of a batch."""
    processor = export.loaded.processor
    texts = []
    for text, shapes in PROMPTS[name]:
        content = [{"type": "image"} for _ in shapes] + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    pictures = [[picture(shape, 7) for shape in shapes] for _, shapes in PROMPTS[name]]
    images = pictures if any(pictures) else None
    return model_inputs(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def model_inputs(encoded: Any) -> dict[str, torch.Tensor]:
    """What a processor made, without what is for training."""
    return {name: value for name, value in encoded.items() if name != "labels"}


@torch.inference_mode()
def torch_steps(export: Export, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By transformers alone: logits of the prompt's real tokens, those of the greedy steps, and the tokens."""
    loaded = export.loaded
    with loaded.modality_from_inputs():
        prefill = loaded.model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=STEPS + 1,
            do_sample=False,
            suppress_tokens=[loaded.image_token_id],
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert tokens.shape[1] == STEPS + 1  # no row ended early
    return prefill.numpy(), torch.stack(output.logits, 1).numpy(), tokens.numpy()


def ort_steps(
    model: ExportedModel, inputs: dict[str, torch.Tensor], tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same logits with the tokens given."""
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    pictures = model.image_layout.pictures(inputs)
    embeds, modality = model.embed(ids, model.encode_images(pictures))
    positions = model.positions(ids, mask, pictures)
    logits, cache = model.decode(embeds, modality, mask, model.empty_cache(len(mask)), positions)
    steps = [logits[:, -1]]
    for index in range(STEPS):
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        embeds, modality = model.embed(tokens[:, index : index + 1], model.encode_images(None))
        out, cache = model.decode(embeds, modality, mask, cache)
        steps.append(out[:, 0])
    return logits[inputs["attention_mask"].bool().numpy()], np.stack(steps, 1)


def sqnr(got: np.ndarray, expected: np.ndarray) -> float:
    noise = float(((got.astype(np.float64) - expected) ** 2).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float((expected.astype(np.float64) ** 2).sum()) / noise)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_greedy_tokens_are_those_of_torch(export: Export, name: str) -> None:
    if name == "text_only" and export.family in WITH_PICTURE:
        with pytest.raises(ValueError, match="image"):
            prompt(export, name)
        return
    inputs = prompt(export, name)
    *expected, tokens = torch_steps(export, inputs)
    assert np.abs(expected[0]).max() > 0.5  # logits that say something
    for engine, model in export.engines.items():
        for got, wanted in zip(ort_steps(model, inputs, tokens), expected, strict=True):
            assert got.shape == wanted.shape, engine
            if export.scheme == "none":
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4, err_msg=engine)
            else:
                assert sqnr(got, wanted) >= model.manifest["parts"]["decoder"]["parity_limit_db"], engine
        if export.scheme == "none":  # at 8 bits a code that tips may decide between two tokens
            np.testing.assert_array_equal(greedy(model, inputs), tokens, err_msg=engine)


def greedy(model: ExportedModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    pictures = model.image_layout.pictures(inputs)
    steps = greedy_tokens(
        model,
        ids,
        mask,
        model.encode_images(pictures),
        max_new_tokens=STEPS + 1,
        positions=model.positions(ids, mask, pictures),
    )
    return np.stack(list(steps), 1)


@needs_genai
@pytest.mark.parametrize("name", ["two_sizes_in_a_prompt", "text_only"])
def test_genai_says_what_our_loop_says(export: Export, name: str) -> None:
    model = export.genai
    if model is None:
        with pytest.raises(SplitQError, match="expected a model type that onnxruntime-genai can run"):
            layout_named("genai").check(export.loaded.adapter, None, flavour="packed", attention="fused")
        return
    assert why_not(model, native=None) is None
    inputs = prompt(export, name)
    given = {key: inputs[key].numpy() for key in ("input_ids", "attention_mask")}
    given |= model.image_layout.pictures(inputs)
    said = list(GenaiGenerator(model).tokens(given, max_new_tokens=STEPS + 1))
    assert len(said) == STEPS + 1
    assert said == greedy(model, inputs)[0].tolist()
    assert said == greedy(export.engines["native" if WITH_NATIVE else "functions"], inputs)[0].tolist()


def test_export_verifies_itself(export: Export) -> None:
    for model in [*export.engines.values(), *filter(None, [export.genai])]:
        verify_files(model)
        assert [row for row in verify_parity(model) if not row.ok] == []
        assert model.manifest["model_type"] == export.family


@pytest.mark.parametrize("export", ["none"], indirect=True)
def test_generator_answers_as_transformers_does(export: Export) -> None:
    generator = Generator(export.engines["functions"])
    for shapes in (("wide", "square"), ()):
        if not shapes and export.family in WITH_PICTURE:
            with pytest.raises(SplitQError, match="prompt: the model's processor refused it"):
                generator.answer("what?", [])
            continue
        content: list[dict[str, Any]] = [{"type": "image", "image": picture(shape)} for shape in shapes]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}]
        inputs = export.loaded.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        *_, tokens = torch_steps(export, model_inputs(inputs))
        said = generator.answer("what?", [picture(shape) for shape in shapes], max_new_tokens=STEPS + 1)
        assert said == export.loaded.processor.decode(tokens[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("export", ["none"], indirect=True)
@pytest.mark.parametrize("shapes", [("wide", "square", "tall"), ("wide", "wide")], ids="-".join)
def test_backends_answer_as_transformers_does(
    export: Export, checkpoint: Path, shapes: tuple[str, ...], tmp_path: Path
) -> None:
    backends = [TorchBackend(str(checkpoint)), OrtBackend(export.folder, native=False, threads=1)]
    questions = []
    for index, shape in enumerate(shapes):
        picture(shape, index).save(tmp_path / f"{index}.png")
        texts = ("what?", "is it red?")[: 1 + index % 2]
        questions += [Question(tmp_path / f"{index}.png", text, "abc", "word") for text in texts]
    expected = [plain_nll(export.loaded, asked) for asked in questions]
    answers = [answer_all(backend, questions) for backend in backends]
    assert [answer.text for answer in answers[0]] == [answer.text for answer in answers[1]]
    for said in answers:
        assert [answer.nll / answer.tokens for answer in said] == pytest.approx(expected, abs=1e-4)


def plain_nll(loaded: LoadedModel, asked: Question) -> float:
    """Of the right answer a token, by transformers, fed one token after the other behind the prompt."""
    content = [{"type": "image", "image": Image.open(asked.image)}, {"type": "text", "text": asked.text}]
    inputs = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    inputs = model_inputs(inputs)
    answer = [*loaded.tokenizer(asked.answer, add_special_tokens=False)["input_ids"], 2]
    begun = inputs["input_ids"].shape[1]

    def forced(_row: int, ids: torch.Tensor) -> list[int]:
        return [answer[len(ids) - begun]]

    with torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=len(answer),
            do_sample=False,
            prefix_allowed_tokens_fn=forced,
            output_logits=True,
            return_dict_in_generate=True,
        )
    said = torch.cat(output.logits).double().log_softmax(-1)
    return -float(said[range(len(answer)), answer].mean())
