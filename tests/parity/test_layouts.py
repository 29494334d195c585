"""One model in every layout: the same answers through our loop and, where a layout has one, through its own engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from builders import (
    CLOSED_FORM,
    SPECIAL_TOKENS,
    calibration_state,
    prompt_ids,
    random_pixels,
    rng,
    tiny_llava,
    tiny_processor,
    write_chats,
)
from families import TILE_MARKS, save_processor, tiny_model

from splitq_edge.calibration.data import encode_sample, load_samples
from splitq_edge.cli import LAYOUT_NAMES
from splitq_edge.config import QuantConfig, preset
from splitq_edge.convert import assemble
from splitq_edge.errors import SplitQError
from splitq_edge.exporters import export_folder
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.exporters.layouts import onnx_community
from splitq_edge.exporters.layouts.registry import layout_named
from splitq_edge.exporters.onnx_export import trace
from splitq_edge.loading import load_model
from splitq_edge.runtime_ops import library_path
from splitq_edge.runtime_ops.genai import PACKAGE, GenaiGenerator, Sampling, why_not
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens
from splitq_edge.runtime_ops.session import PARTS, ExportedModel
from splitq_edge.runtime_ops.verify import verify_files, verify_parity

pytestmark = pytest.mark.slow

NEW_TOKENS = 12
needs_genai = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="onnxruntime-genai is not installed")
# Read by text rows alone, so that the modality must arrive; without, no channel is added.
RECIPES = {"masked": preset("W4A8"), "unmasked": replace(preset("W3A2"), scheme="W3A2")}


@dataclass
class Exports:
    """A model in all layouts."""

    model_type: str
    masked: bool
    folders: dict[str, Path]

    def model(self, layout: str, *, native: bool | None = False) -> ExportedModel:
        return ExportedModel(self.folders[layout], native=native, threads=1)


def save_tiny(model_type: str, folder: Path) -> Path:
    """A model that says no special token."""
    if model_type == "llava":
        tiny_llava().save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
        return folder
    model = tiny_model(model_type)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[: len(SPECIAL_TOKENS)] = 0
        rows[-len(TILE_MARKS) :] = 0
    model.save_pretrained(folder)
    save_processor(model_type, folder)
    return folder


CASES = [("llava", "masked"), ("llava", "unmasked"), ("smolvlm", "masked")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    model_type, recipe = request.param
    config = replace(RECIPES[recipe], learning=CLOSED_FORM)
    place = tmp_path_factory.mktemp(f"{model_type}-{recipe}")
    checkpoint = str(save_tiny(model_type, place / "checkpoint"))
    chats = load_samples(str(write_chats(place / "chats")), 2, seed=0)
    loaded = load_model(checkpoint, lazy=True)
    samples = [encode_sample(loaded.processor, sample, loaded.image_layout) for sample in chats]
    state = calibration_state(load_model(checkpoint, lazy=True), config, samples, place)
    sample = {name: value for name, value in samples[0].items() if name != "answer"}
    graphs: dict[str, Any] = {}

    def traced_once(module: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        part = type(module).__name__
        if part not in graphs:
            graphs[part] = trace(module, inputs, **options)
        return graphs[part].clone()

    trace_decoder = export_folder.trace_decoder

    def decoder_traced_once(loaded: Any, cache: Any, attention: str, **options: Any) -> Any:
        if attention not in graphs:
            graphs[attention] = trace_decoder(loaded, cache, attention, **options)
        return graphs[attention].clone()

    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_folder, "trace", traced_once)
        patch.setattr(export_folder, "trace_decoder", decoder_traced_once)
        patch.setattr(onnx_community, "trace", traced_once)
        for layout in LAYOUT_NAMES:
            loaded = load_model(checkpoint, lazy=True)
            quantized = assemble(loaded, config, state)
            loaded.read_rest()
            folders[layout] = place / layout
            folders[layout].mkdir()
            attention = layout_named(layout).attention
            source = {"source": "chats", "samples": 2}
            request_ = ExportRequest("portable", sample, source, 0, attention=attention, layout=layout)
            write_export(loaded, quantized, request_, folders[layout])
    return Exports(model_type, recipe == "masked", folders)


def inputs_of(model: ExportedModel, text: str, images: int, seed: int = 3) -> dict[str, np.ndarray]:
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (images, 40, 72, 3), np.uint8)
    return Generator(model).chat(text, [Image.fromarray(picture) for picture in noise])


def loop_tokens(model: ExportedModel, inputs: dict[str, np.ndarray]) -> list[int]:
    features = model.encode_images(inputs)
    ids = inputs["input_ids"].astype(np.int64)
    steps = greedy_tokens(model, ids, inputs["attention_mask"], features, max_new_tokens=NEW_TOKENS)
    return [int(step[0]) for step in steps]


PROMPTS = [("what is it?", 1), ("which one is larger?", 2), ("hello, who are you?", 0)]


def test_every_layout_verifies_itself(exports: Exports) -> None:
    for layout in LAYOUT_NAMES:
        model = exports.model(layout)
        verify_files(model)
        rows = verify_parity(model)
        assert {row.part.split()[0] for row in rows} == set(PARTS), layout
        assert [row for row in rows if not row.ok] == [], layout
        assert model.manifest["layout"] == layout
        assert set(model.manifest["files"]) | {"export.json"} == {
            path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*") if path.is_file()
        }


def test_graphs_pass_the_checker_and_strict_shape_inference(exports: Exports) -> None:
    for layout in LAYOUT_NAMES:
        for entry in exports.model(layout).manifest["parts"].values():
            path = exports.folders[layout] / entry["file"]
            onnx.checker.check_model(str(path), full_check=True)
            onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)


def test_the_decoder_of_an_engine_takes_no_mask_of_its_own(exports: Exports) -> None:
    for layout in LAYOUT_NAMES:
        model = exports.model(layout)
        graph = onnx.load(
            str(model.folder / model.manifest["parts"]["decoder"]["file"]), load_external_data=False
        ).graph
        widths = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in graph.input}
        assert ("modality" in widths) == (exports.masked and layout == "flat")
        assert widths["inputs_embeds"] == 96 + (exports.masked and layout != "flat")
        assert model.manifest["hidden_size"] == widths["inputs_embeds"]


@pytest.mark.parametrize(("text", "images"), PROMPTS)
def test_our_loop_says_the_same_in_every_layout(exports: Exports, text: str, images: int) -> None:
    said = {}
    for layout in LAYOUT_NAMES:
        model = exports.model(layout)
        said[layout] = loop_tokens(model, inputs_of(model, text, images))
    assert len(said["flat"]) == NEW_TOKENS
    assert said["genai"] == said["onnx-community"] == said["flat"]


@needs_genai
@pytest.mark.parametrize(("text", "images"), PROMPTS)
def test_genai_says_what_our_loop_says(exports: Exports, text: str, images: int) -> None:
    model = exports.model("genai", native=None)
    assert why_not(model, native=None) is None
    inputs = inputs_of(model, text, images)
    tokens = list(GenaiGenerator(model).tokens(inputs, max_new_tokens=NEW_TOKENS))
    assert tokens == loop_tokens(model, inputs)


@needs_genai
@pytest.mark.parametrize("attention", ["fused", "standard"])
def test_genai_passes_a_float16_cache_on(attention: str, tmp_path: Path) -> None:
    config = replace(RECIPES["masked"], learning=CLOSED_FORM, kv_cache_bits=16)
    checkpoint = str(save_tiny("llava", tmp_path / "checkpoint"))
    chats = load_samples(str(write_chats(tmp_path / "chats")), 2, seed=0)
    loaded = load_model(checkpoint)
    samples = [encode_sample(loaded.processor, sample, loaded.image_layout) for sample in chats]
    quantized = assemble(loaded, config, calibration_state(load_model(checkpoint), config, samples, tmp_path))
    sample = {name: value for name, value in samples[0].items() if name != "answer"}
    (folder := tmp_path / "out").mkdir()
    write_export(loaded, quantized, ExportRequest("portable", sample, {}, 0, attention, "genai"), folder)
    model = ExportedModel(folder)
    inputs = inputs_of(model, *PROMPTS[0])
    tokens = list(GenaiGenerator(model).tokens(inputs, max_new_tokens=NEW_TOKENS))
    assert tokens == loop_tokens(model, inputs)


CONTEXTS = {"llava": 256, "smolvlm": 512}  # max_position_embeddings


def filled_to(model: ExportedModel, tokens: int) -> dict[str, np.ndarray]:
    """A text prompt of so many tokens."""
    inputs = inputs_of(model, "hello", 0)
    ids = inputs["input_ids"].astype(np.int64)
    more = np.repeat(ids[:, -2:-1], tokens - ids.shape[1], -1)
    ids = np.concatenate([ids[:, :-1], more, ids[:, -1:]], -1)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_an_answer_ends_where_the_context_does_in_every_layout_and_engine(exports: Exports) -> None:
    context = CONTEXTS[exports.model_type]
    for layout in LAYOUT_NAMES:
        model = exports.model(layout)
        near = loop_tokens(model, filled_to(model, context - 3))
        assert len(near) == 3
        with pytest.raises(SplitQError, match=f"context of {context}, got {context + 2} prompt tokens, .*; shorten"):
            loop_tokens(model, filled_to(model, context + 2))
        if layout == "genai" and importlib.util.find_spec(PACKAGE) is not None:
            engine = GenaiGenerator(exports.model("genai", native=None))
            assert list(engine.tokens(filled_to(model, context - 3), max_new_tokens=NEW_TOKENS)) == near
            assert len(list(engine.tokens(filled_to(model, context - 1), max_new_tokens=NEW_TOKENS))) == 1
            for length in (context, context + 2):
                with pytest.raises(SplitQError, match=f"context of {context}, got {length} prompt tokens, .*; shorten"):
                    list(engine.tokens(filled_to(model, length), max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize(
    ("config", "context"), [('{"text_config": {"max_position_embeddings": 256}}', 256), ("", None)]
)
def test_the_context_of_an_older_export_is_that_of_its_config(
    exports: Exports, tmp_path: Path, config: str, context: int | None
) -> None:
    model = exports.model("flat")
    assert model.context == CONTEXTS[exports.model_type]
    older = exports.model("flat")
    del older.manifest["max_positions"]
    older.folder = tmp_path
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert older.context == context


@needs_genai
def test_genai_draws_by_seed_and_stops_where_it_is_told(exports: Exports) -> None:
    model = exports.model("genai", native=None)
    generator = GenaiGenerator(model)
    inputs = inputs_of(model, "what is it?", 1)

    def drawn(sampling: Sampling) -> list[int]:
        return list(generator.tokens(inputs, max_new_tokens=NEW_TOKENS, sampling=sampling))

    greedy = drawn(Sampling())
    assert drawn(Sampling(temperature=2.0, seed=1)) == drawn(Sampling(temperature=2.0, seed=1))
    assert len({tuple(drawn(Sampling(temperature=2.0, seed=seed))) for seed in range(4)}) > 1
    assert drawn(Sampling(temperature=2.0, top_k=1)) == greedy
    whole = "".join(generator.stream("what is it?", [], max_new_tokens=NEW_TOKENS))
    stop = whole[2:4]
    ended = "".join(generator.stream("what is it?", [], max_new_tokens=NEW_TOKENS, stop=[stop]))
    assert ended == whole[: whole.find(stop)]


@needs_genai
def test_onnxruntime_genai_alone_opens_the_folder_with_and_without_the_library(
    exports: Exports, tmp_path: Path
) -> None:
    """A process that imports nothing of ours; the inputs are the folder's parity sample."""
    code = (
        "import json, sys, numpy as np, onnxruntime_genai as og\n"
        "folder, count = sys.argv[1], int(sys.argv[2])\n"
        "samples = np.load(folder + '/parity.npz')\n"
        "ids = samples['embed_tokens/prompt/in/input_ids'].astype(np.int32)\n"
        "image = json.load(open(folder + '/genai_config.json'))['model']['image_token_id']\n"
        "model = og.Model(folder)\n"
        "params = og.GeneratorParams(model)\n"
        "params.set_search_options(max_length=ids.shape[1] + count)\n"
        "tensors = og.NamedTensors()\n"
        "tensors['input_ids'] = ids\n"
        "tensors['pixel_values'] = samples['vision_encoder/image/in/pixel_values']\n"
        "tensors['num_image_tokens'] = np.array([(ids == image).sum()], np.int64)\n"
        "generator = og.Generator(model, params)\n"
        "generator.set_inputs(tensors)\n"
        "while not generator.is_done():\n"
        "    generator.generate_next_token()\n"
        "assert not any(name.startswith('splitq') for name in sys.modules)\n"
        "print(json.dumps([int(token) for token in generator.get_sequence(0)[ids.shape[1]:]]))\n"
    )
    model = exports.model("genai", native=None)
    with np.load(model.folder / "parity.npz") as samples:
        prefix = {
            "input_ids": "embed_tokens/prompt/in/input_ids",
            "pixel_values": "vision_encoder/image/in/pixel_values",
        }
        inputs = {name: samples[key] for name, key in prefix.items()}
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    expected = loop_tokens(model, inputs)
    for folder in (model.folder, without_library(model.folder, tmp_path / "portable")):
        command = [sys.executable, "-c", code, str(folder), str(NEW_TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected


def without_library(folder: Path, target: Path) -> Path:
    """A copy whose engine must run the function bodies."""
    import shutil

    shutil.copytree(folder, target)
    path = target / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    library = config["model"]["decoder"]["session_options"].pop("custom_ops_library", None)
    assert (library is not None) == (library_path() is not None)
    path.write_text(json.dumps(config), encoding="utf-8")
    if library:
        (target / library).unlink()
    return target


def test_files_of_the_onnx_community_layout_have_their_names(exports: Exports) -> None:
    folder = exports.folders["onnx-community"]
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged_q4.onnx"} <= names
    assert all(name.endswith((".onnx", ".onnx_data")) for name in names)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["transformers.js_config"]
    assert config["dtype"] == {"vision_encoder": "fp32", "embed_tokens": "fp32", "decoder_model_merged": "q4"}
    files = {"decoder_model_merged": "decoder_model_merged_q4"}
    for session, chunks in config["use_external_data_format"].items():
        assert chunks == 1
        assert f"{files.get(session, session)}.onnx_data" in names
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert (
        processor["processor_class"] == {"llava": "LlavaProcessor", "smolvlm": "Idefics3Processor"}[exports.model_type]
    )
    assert not processor["image_processor_type"].endswith(("Pil", "Fast"))
    assert json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]


def test_empty_tiles_of_a_batch_are_dropped_in_the_graph(exports: Exports) -> None:
    if exports.model_type != "smolvlm":
        return
    model = exports.model("onnx-community")
    tiles = torch.randn(2, 3, 3, 32, 32, generator=rng()).numpy()
    mask = np.ones((2, 3, 32, 32), bool)
    mask[0, 2] = False
    got = model.run("vision_encoder", {"pixel_values": tiles, "pixel_attention_mask": mask})["image_features"]
    kept = np.concatenate([tiles[0, :2], tiles[1]])
    expected = exports.model("flat").encode_images(kept)
    np.testing.assert_allclose(got[..., :96], expected, rtol=0, atol=1e-5)


def test_config_says_how_the_weights_are_stored(exports: Exports) -> None:
    config = json.loads((exports.folders["flat"] / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["quant_method"] == "splitq"
    group = config["config_groups"]["language"]
    recipe: QuantConfig = RECIPES["masked" if exports.masked else "unmasked"]
    assert group["weights"]["num_bits"] == recipe.bits
    assert group["input_activations"]["num_bits"] == recipe.activation_bits
    assert group["input_activations"]["dynamic"] is True
    assert any("q_proj" in target for target in group["targets"])
    assert "lm_head" in config["ignore"]
    assert not set(group["targets"]) & set(config["ignore"])


def test_a_padded_batch_keeps_its_rows_apart_in_every_layout(exports: Exports) -> None:
    if exports.model_type != "llava":
        return
    from builders import left_padded

    ids, mask = left_padded([prompt_ids("user:", 1, "red?"), prompt_ids("user:hello\n")])
    pixels = random_pixels(1).numpy()
    logits = {}
    for layout in LAYOUT_NAMES:
        model = exports.model(layout)
        embeds, modality = model.embed(ids.numpy(), model.encode_images(pixels))
        logits[layout] = model.decode(embeds, modality, mask.numpy(), model.empty_cache(2))[0]
    np.testing.assert_array_equal(logits["genai"], logits["flat"])
    real = mask.bool().numpy()
    got, expected = (logits[layout][real].astype(np.float64) for layout in ("onnx-community", "flat"))
    limit = exports.model("flat").manifest["parts"]["decoder"]["parity_limit_db"]
    assert 10 * np.log10((expected**2).sum() / ((got - expected) ** 2).sum()) >= limit  # attention of another form
