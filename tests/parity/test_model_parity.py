"""A tiny random LLaVA, exported in every scheme and flavour: its files, and its answers against torch.

Tracing knows nothing of the scheme (a quantized linear is a placeholder with a name), so each part is traced once here
and its graph is copied for the other exports; every later step of the export runs for each of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from builders import (
    CLOSED_FORM,
    IMAGE_TOKENS,
    calibrated,
    chat_batches,
    left_padded,
    prompt_ids,
    random_pixels,
    tiny_loaded,
    write_image,
)

from splitq_edge.config import PRESETS, preset
from splitq_edge.convert import QuantizedModel, effective_bits
from splitq_edge.exporters import decoder_graph, export_folder
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.loading import LoadedModel
from splitq_edge.runtime_ops import library_path
from splitq_edge.runtime_ops.cache import BufferCache
from splitq_edge.runtime_ops.generate import greedy_tokens
from splitq_edge.runtime_ops.session import PARTS, ExportedModel
from splitq_edge.runtime_ops.verify import verify_files, verify_parity

pytestmark = pytest.mark.slow

CASES = [("none", "portable")] + [(scheme, flavour) for scheme in PRESETS for flavour in ("portable", "packed")]
WITH_NATIVE = os.environ.get("SPLITQ_EXPECT_NATIVE") == "1" or library_path() is not None
NEW_TOKENS = 8
# A random model often has two tokens almost level. One activation code on a rounding boundary, which torch and ONNX
# Runtime may round differently (docs/ops.md fixes no order of a float product), moves the logits by 0.01 to 0.1 of
# their spread, so a lead below this is a tie.
TIE = 0.1


@dataclass
class Export:
    """One export and the torch model that it must equal."""

    scheme: str
    flavour: str
    loaded: LoadedModel
    quantized: QuantizedModel | None
    folder: Path
    engines: dict[str, ExportedModel]

    @property
    def limit_db(self) -> float:
        return float(next(iter(self.engines.values())).manifest["parts"]["decoder"]["parity_limit_db"])


@pytest.fixture(scope="module")
def graphs() -> dict[tuple[str, ...], ir.Model]:
    """Traced graphs by part and input names."""
    return {}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def export(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, graphs: dict[tuple[str, ...], ir.Model]
) -> Export:
    scheme, flavour = request.param
    loaded, batches = tiny_loaded(), chat_batches()
    quantized = None
    if scheme != "none":
        config = replace(preset(scheme), learning=CLOSED_FORM)
        if scheme == "W3A3":  # the mask is worth most where MAC is
            text_rows = replace(config.correction, mac_rows="text")
            config = replace(config, rounding="gptq", correction=text_rows)
        quantized = calibrated(loaded, config, batches, tmp_path_factory.mktemp(f"{scheme}-{flavour}-calibration"))
    trace = export_folder.trace

    def traced_once(module: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> ir.Model:
        key = (type(module).__name__, "float" if quantized is None else "quantized", *options["input_names"])
        if key not in graphs:
            graphs[key] = trace(module, inputs, **options)
        return graphs[key].clone()

    folder = tmp_path_factory.mktemp(f"{scheme}-{flavour}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_folder, "trace", traced_once)
        patch.setattr(decoder_graph, "trace", traced_once)
        write_export(loaded, quantized, ExportRequest(flavour, batches[0], {"source": "test"}, 0), folder)
    engines = {"functions": ExportedModel(folder, native=False, threads=1)}
    if WITH_NATIVE:
        engines["native"] = ExportedModel(folder, native=True, threads=1)
    return Export(scheme, flavour, loaded, quantized, folder, engines)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def torch_logits(export: Export, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor | None) -> np.ndarray:
    """[batch, sequence, vocabulary] from transformers' own forward."""
    with torch.inference_mode(), export.loaded.modality_from_inputs():
        output = export.loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), pixel_values=pixels, use_cache=False
        )
    return output.logits.numpy()


def torch_tokens(export: Export, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor | None) -> np.ndarray:
    """[batch, new tokens] from transformers' own greedy generation with its cache."""
    images = {} if pixels is None else {"pixel_values": pixels}
    with torch.inference_mode(), export.loaded.modality_from_inputs():
        tokens = export.loaded.model.generate(
            input_ids=ids, attention_mask=mask, **images, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return tokens[:, ids.shape[1] :].numpy()


def features_of(model: ExportedModel, pixels: torch.Tensor | None) -> np.ndarray:
    return model.encode_images(None if pixels is None else pixels.numpy())


def ort_logits(model: ExportedModel, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor | None) -> np.ndarray:
    embeds, modality = model.embed(ids.numpy(), features_of(model, pixels))
    return model.decode(embeds, modality, mask.numpy(), model.empty_cache(len(ids)))[0]


def ort_tokens(model: ExportedModel, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor | None) -> np.ndarray:
    steps = greedy_tokens(model, ids.numpy(), mask.numpy(), features_of(model, pixels), max_new_tokens=NEW_TOKENS)
    return np.stack(list(steps), axis=1)


def sqnr(got: np.ndarray, expected: np.ndarray) -> float:
    noise = float(((got.astype(np.float64) - expected) ** 2).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float((expected.astype(np.float64) ** 2).sum()) / noise)


PROMPTS: dict[str, tuple[list[list[int]], int]] = {
    # name: rows of token ids, images in all
    "one_prompt": ([prompt_ids("user:", 1, "what is it?\nassistant:")], 1),
    "batch_of_two_with_left_padding": (
        [
            prompt_ids("user:", 1, "what shape is in the picture?\nassistant:"),
            prompt_ids("user:", 1, "red?\nassistant:"),
        ],
        2,
    ),
    "batch_of_three": ([prompt_ids("user:", 1, "colour", "?" * count, "\nassistant:") for count in (1, 9, 4)], 3),
    "text_only": ([prompt_ids("user:hello, who are you?\nassistant:")], 0),
    "text_only_beside_an_image": (
        [prompt_ids("user:hello\nassistant:"), prompt_ids("user:", 1, "hello\nassistant:")],
        1,
    ),
    "two_images_in_one_prompt": (
        [
            prompt_ids("user:", 2, "which one is larger?\nassistant:"),
            prompt_ids("user:", 1, "and", 1, "?\nassistant:"),
        ],
        4,
    ),
    "one_token": ([[1]], 0),
}


def prompt(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows, images = PROMPTS[name]
    ids, mask = left_padded(rows)
    return ids, mask, random_pixels(images, seed=7) if images else None


def test_files_pass_the_checker_and_strict_shape_inference(export: Export) -> None:
    for part in PARTS:
        path = export.folder / f"{part}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)


def test_decoder_has_one_node_a_site_and_a_body_for_each(export: Export) -> None:
    model = onnx.load(str(export.folder / "decoder.onnx"), load_external_data=False)
    ours = [node for node in model.graph.node if node.domain == "ai.splitq"]
    names = [f"layers.{block}.{site}" for block in range(2) for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid")]
    assert [node.name for node in ours if node.op_type == "SplitQLinear"] == (names if export.quantized else [])
    rest = [node.op_type for node in ours if node.op_type != "SplitQLinear"]
    block = ["CachedAttention", "SkipRMSNorm", "SwiGLU", "SkipRMSNorm"]
    assert rest == (block * 2 if export.quantized else [])
    bodies = {(function.name, function.overload) for function in model.functions}
    assert {(node.op_type, node.overload) for node in ours} <= bodies
    inputs = {value.name: value for value in model.graph.input}
    masked = export.quantized is not None and export.quantized.config.correction.mac_rows == "text"
    assert ("modality" in inputs) == masked
    # no float weight of a quantized linear is left in the file
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if export.quantized is not None:
        kinds = {tensor.data_type for name, tensor in stored.items() if name.endswith(".weight_main")}
        wanted = onnx.TensorProto.UINT8 if export.flavour == "packed" else onnx.TensorProto.INT4
        assert kinds == {wanted}
        assert not [name for name in stored if "_proj" in name]


def test_manifest_says_what_was_exported(export: Export) -> None:
    manifest = json.loads((export.folder / "export.json").read_text())
    assert manifest["scheme"] == export.scheme
    assert manifest["flavour"] == ("float" if export.quantized is None else export.flavour)
    assert manifest["image_tokens"] == IMAGE_TOKENS
    assert manifest["cache"] == {"layers": 2, "heads": 3, "head_dim": 16, "dtype": "float32", "bits": 32}
    bits = 32.0 if export.quantized is None else effective_bits(export.quantized.sites)
    assert manifest["effective_bits"] == pytest.approx(bits, abs=1e-3)
    listed = set(manifest["files"]) | {"export.json"}
    assert listed == {path.name for path in export.folder.iterdir()}


def test_export_verifies_itself(export: Export) -> None:
    for engine, model in export.engines.items():
        verify_files(model)
        rows = verify_parity(model)
        assert {row.part.split()[0] for row in rows} == set(PARTS), engine
        assert [row for row in rows if not row.ok] == [], engine


def test_stock_onnxruntime_loads_every_part(export: Export) -> None:
    for part in PARTS:
        session = ort.InferenceSession(str(export.folder / f"{part}.onnx"), providers=["CPUExecutionProvider"])
        assert session.get_outputs()


@pytest.mark.parametrize("images", [1, 2, 3])
def test_image_features_equal_those_of_transformers(export: Export, images: int) -> None:
    pixels = random_pixels(images, seed=3)
    with torch.inference_mode():
        output = export.loaded.model.model.get_image_features(pixel_values=pixels)
    rows = getattr(output, "pooler_output", output)
    expected = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).numpy()
    for engine, model in export.engines.items():
        features = model.encode_images(pixels.numpy())
        assert features.shape == (images, IMAGE_TOKENS, 96), engine
        assert sqnr(features.reshape(expected.shape), expected) > 80, engine


@pytest.mark.parametrize("name", PROMPTS)
def test_prefill_logits_are_those_of_torch(export: Export, name: str) -> None:
    ids, mask, pixels = prompt(name)
    expected = torch_logits(export, ids, mask, pixels)
    real = mask.bool().numpy()
    for engine, model in export.engines.items():
        got = ort_logits(model, ids, mask, pixels)
        assert got.shape == expected.shape, engine
        assert np.isfinite(got).all(), engine
        quality = sqnr(got[real], expected[real])
        assert quality >= export.limit_db, f"{engine}: {quality:.1f} dB"


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_through_the_cache_are_those_of_torch(export: Export, name: str) -> None:
    ids, mask, pixels = prompt(name)
    expected = torch_tokens(export, ids, mask, pixels)
    assert expected.shape == (len(ids), NEW_TOKENS)
    tie = 0.0 if export.quantized is None else TIE
    leads = leads_over_others(export, ids, mask, pixels, expected)
    for engine, model in export.engines.items():
        tokens = ort_tokens(model, ids, mask, pixels)
        assert tokens.shape == expected.shape, engine
        same = 0
        for row, (got, wanted) in enumerate(zip(tokens, expected, strict=True)):
            differing = np.flatnonzero(got != wanted)
            first = int(differing[0]) if differing.size else NEW_TOKENS
            if differing.size:  # from here on the texts are different ones
                lead = leads[row, first, got[first]]
                assert lead <= tie, f"{engine}: row {row}, step {first}: torch prefers its token by {lead:.3f}"
            same += first
        assert same >= tokens.size / 2, engine


def leads_over_others(
    export: Export, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor | None, tokens: np.ndarray
) -> np.ndarray:
    """By how much torch prefers its token to every other, [batch, new tokens, vocabulary], in spreads of the logits."""
    answer = torch.from_numpy(tokens)
    whole = torch_logits(export, torch.cat([ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1), pixels)
    logits = whole[:, ids.shape[1] - 1 : -1]  # the logits that chose each token
    assert (logits.argmax(-1) == tokens).all()  # torch's cache agrees with torch's whole pass
    return (logits.max(-1, keepdims=True) - logits) / logits.std()


def test_a_prompt_fed_in_pieces_gives_the_logits_of_the_whole(export: Export) -> None:
    ids, mask, pixels = prompt("batch_of_two_with_left_padding")
    for engine, model in export.engines.items():
        whole = ort_logits(model, ids, mask, pixels)
        embeds, modality = model.embed(ids.numpy(), features_of(model, pixels))
        cache, pieces = model.empty_cache(len(ids)), []
        for start, end in ((0, 11), (11, 12), (12, ids.shape[1])):
            logits, cache = model.decode(embeds[:, start:end], modality[:, start:end], mask[:, :end].numpy(), cache)
            pieces.append(logits)
        assert cache.length == ids.shape[1]
        real = mask.bool().numpy()
        assert sqnr(np.concatenate(pieces, 1)[real], whole[real]) >= export.limit_db, engine


def test_padding_does_not_change_a_row(export: Export) -> None:
    rows, _ = PROMPTS["batch_of_two_with_left_padding"]
    ids, mask, pixels = prompt("batch_of_two_with_left_padding")
    assert pixels is not None
    for engine, model in export.engines.items():
        together = ort_logits(model, ids, mask, pixels)[1, -1]
        alone_ids, alone_mask = left_padded(rows[1:])
        alone = ort_logits(model, alone_ids, alone_mask, pixels[1:])[0, -1]
        assert sqnr(together, alone) >= export.limit_db, engine


@pytest.mark.parametrize("export", [("none", "portable")], indirect=True, ids="-".join)
def test_positions_count_real_tokens_only(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rotary positions are relative, so logits do not show it; transformers and other models rely on it.
    model = export.engines["functions"]
    step, seen = BufferCache.step, []

    def watched(cache: BufferCache, session: Any, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, BufferCache]:
        seen.append(feeds["position_ids"].tolist())
        return step(cache, session, feeds)

    monkeypatch.setattr(BufferCache, "step", watched)
    ids, mask = left_padded([[1, 70, 71, 72], [1, 70]])
    steps = greedy_tokens(model, ids.numpy(), mask.numpy(), model.encode_images(None), max_new_tokens=3)
    assert len(list(steps)) == 3
    assert seen == [[[0, 1, 2, 3], [0, 0, 0, 1]], [[4], [2]], [[5], [3]]]


def test_image_placeholders_and_images_must_match(export: Export) -> None:
    from splitq_edge.errors import SplitQError

    ids, mask, pixels = prompt("one_prompt")
    model = export.engines["functions"]
    with pytest.raises(SplitQError, match=f"expected 0 image tokens for the images, got {IMAGE_TOKENS}"):
        ort_logits(model, ids, mask, None)
    with pytest.raises(
        SplitQError, match=f"expected {2 * IMAGE_TOKENS} image tokens for the images, got {IMAGE_TOKENS}"
    ):
        ort_logits(model, ids, mask, random_pixels(2))
    assert pixels is not None


@pytest.mark.parametrize("export", [("W3A3", "portable")], indirect=True, ids="-".join)
def test_the_limit_notices_a_wrong_modality(export: Export) -> None:
    # What the comparisons above are worth: MAC on the wrong rows falls below the limit where MAC matters most.
    ids, mask, pixels = prompt("two_images_in_one_prompt")
    expected, real = torch_logits(export, ids, mask, pixels), mask.bool().numpy()
    for engine, model in export.engines.items():
        embeds, modality = model.embed(ids.numpy(), features_of(model, pixels))
        got = model.decode(embeds, 1 - modality, mask.numpy(), model.empty_cache(len(ids)))[0]
        assert sqnr(got[real], expected[real]) < export.limit_db, engine


RUN_WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "safetensors.torch"):
    sys.modules[name] = None
from splitq_edge.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("export", [("none", "portable"), ("W4A8", "packed")], indirect=True, ids="-".join)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_device_without_torch_runs_the_export(export: Export, command: str, tmp_path: Path) -> None:
    options = ["--functions"]
    if command == "run":
        image = write_image(tmp_path / "a.png")
        options += ["--image", str(image), "--prompt", "what is it?", "--max-new-tokens", "3", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_TORCH, command, str(export.folder), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
