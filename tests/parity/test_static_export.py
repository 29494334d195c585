"""The flavour qdq: static graphs against torch with float activations, on the CPU and in the HTP emulator."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import CLOSED_FORM, calibrated, chat_batches, prompt_ids, random_pixels, tiny_loaded

from splitq_edge.commands.compile import run_compile
from splitq_edge.commands.export_static import StaticOptions, write_static
from splitq_edge.commands.verify import run_verify
from splitq_edge.config import CorrectionConfig, preset
from splitq_edge.convert import QuantizedModel
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.exporters.export_folder import ExportRequest
from splitq_edge.exporters.qdq.static_parts import StaticSizes, float_sites, static_model
from splitq_edge.loading import LoadedModel
from splitq_edge.runtime_ops.compiled import compiled_parts
from splitq_edge.runtime_ops.generate import greedy_tokens
from splitq_edge.runtime_ops.open_model import open_model
from splitq_edge.runtime_ops.static_calls import StaticCache, StaticShape
from splitq_edge.runtime_ops.static_session import StaticModel
from splitq_edge.targets import ARCHITECTURES, QNN_HTP, Target

CONTEXT, CHUNK, NEW_TOKENS = 64, 16, 5
STATIC_PARTS = ("vision_encoder", "decoder_prefill", "decoder_step")
V73 = Target(QNN_HTP, 73)
PROMPT = prompt_ids("user:", 1, "what is it?\nassistant:")
needs_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn (make test-qnn)"
)


@dataclass
class Static:
    loaded: LoadedModel
    quantized: QuantizedModel | None
    folder: Path

    def model(self, **options: object) -> StaticModel:
        model = open_model(self.folder, threads=1, **options)  # type: ignore[arg-type]
        assert isinstance(model, StaticModel)
        return model


# Activation bits and transform_width; MAC and modality are at work with 8 only.
@pytest.fixture(scope="module", params=[(16, 0), (16, 16), (8, 0)])
def static(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Static:
    loaded, batches = tiny_loaded(), chat_batches()
    bits, transform_width = request.param
    config = replace(preset("W4A8"), learning=CLOSED_FORM, correction=CorrectionConfig(cws_ratio=0.05, mac_ratio=0.05))
    config = replace(config, transform_width=transform_width)
    quantized = calibrated(loaded, config, batches, tmp_path_factory.mktemp("calibration"))
    folder = tmp_path_factory.mktemp(f"static{bits}")
    options = StaticOptions(CONTEXT, CHUNK, "minmax", bits, "qnn-htp:v73")
    write_static(loaded, quantized, ExportRequest("qdq", batches[0], {"source": "test"}, 0), batches, options, folder)
    return Static(loaded, quantized, folder)


def logits(model: StaticModel, pieces: list[list[int]], pixels: torch.Tensor) -> np.ndarray:
    """[tokens, vocabulary] of a prompt fed in pieces."""
    cache, found, seen = model.empty_cache(1), [], 0
    features = model.encode_images(pixels.numpy())
    for piece in pieces:
        rows = features if 3 in piece else features[:0]
        embeds, modality = model.embed(np.array([piece]), rows)
        seen += len(piece)
        part, cache = model.decode(embeds, modality, np.ones((1, seen), np.int64), cache)
        found.append(part[0])
    return np.concatenate(found)


def float_logits(static: Static, pixels: torch.Tensor) -> np.ndarray:
    """transformers' own forward with the weights' values and float activations."""
    ids = torch.tensor([PROMPT])
    with torch.inference_mode(), float_sites(static.quantized), static.loaded.modality_from_inputs():
        return static.loaded.model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0].numpy()


def sqnr(got: np.ndarray, expected: np.ndarray) -> float:
    signal, noise = ((values.astype(np.float64) ** 2).sum() for values in (expected, got - expected.astype(np.float64)))
    return float(10 * np.log10(signal / noise)) if noise else np.inf


def test_graphs_answer_as_torch_with_float_activations(static: Static) -> None:
    pixels = random_pixels(1, seed=3)
    bits = static.model().manifest["activations"]["bits"]
    assert sqnr(logits(static.model(), [PROMPT], pixels), float_logits(static, pixels)) > {16: 35, 8: 14}[bits]


def test_verify_passes(static: Static) -> None:
    assert all("DIFFERS" not in line for line in run_verify(static.folder, native=None))


def test_a_prompt_in_pieces_gives_the_same_logits(static: Static) -> None:
    # Keys and values are rounded inside a call just as between calls, so not even the last bit depends on the cut.
    pixels = random_pixels(1, seed=4)
    whole = logits(static.model(), [PROMPT], pixels)
    pieces = logits(static.model(), [PROMPT[:24], PROMPT[24:30], PROMPT[30:31], PROMPT[31:]], pixels)
    assert sqnr(pieces, whole) > 60


def test_a_batch_with_padding_says_what_each_row_says(static: Static) -> None:
    model = static.model()
    rows = [PROMPT, prompt_ids("user:", 1, "red?\nassistant:")]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    features = model.encode_images(random_pixels(2, seed=5).numpy())
    together = np.stack(list(greedy_tokens(model, ids, mask, features, max_new_tokens=NEW_TOKENS)), 1)
    for index, row in enumerate(rows):
        alone = greedy_tokens(
            model, np.array([row]), np.ones((1, len(row)), int), features[index : index + 1], max_new_tokens=NEW_TOKENS
        )
        assert np.concatenate(list(alone)).tolist() == together[index].tolist()


def test_graphs_are_static_and_standard(static: Static) -> None:
    for part in STATIC_PARTS:
        model = onnx.load(static.folder / f"{part}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} <= {""}
        for value in (*model.graph.input, *model.graph.output):
            assert all(axis.HasField("dim_value") for axis in value.type.tensor_type.shape.dim), value.name
        floats = [
            node.name
            for node in model.graph.node
            if node.op_type == "MatMul"
            and not all(name.endswith((".quantized", ".weight", ".values", ".u", ".v")) for name in node.input)
        ]
        assert floats == []


def test_weights_of_the_main_group_stay_int4(static: Static) -> None:
    model = onnx.load(static.folder / "decoder_step.onnx", load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    main = [name for name in kinds if name.endswith(".main.weight.codes")]
    assert len(main) == 4 * static.loaded.block_count
    assert {kinds[name] for name in main} == {onnx.TensorProto.INT4}


def test_no_float_weight_is_left(static: Static) -> None:
    for part in STATIC_PARTS:
        model = onnx.load(static.folder / f"{part}.onnx")
        kept = [tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        assert [name for name in kept if not name.endswith(".scale")] == []


def test_mac_is_there_on_8_bits_only(static: Static) -> None:
    model = onnx.load(static.folder / "decoder_step.onnx", load_external_data=False)
    has = any(".mac." in node.name for node in model.graph.node)
    assert has == (static.model().manifest["activations"]["bits"] == 8) == static.model().shape.text_rows


def test_a_prompt_beyond_the_cache_is_one_clear_error(static: Static) -> None:
    model = static.model()
    ids = np.array([prompt_ids("x" * CONTEXT)])
    embeds, modality = model.embed(ids, model.encode_images(None))
    with pytest.raises(SplitQError, match=rf"expected at most {CONTEXT} tokens.*got {CONTEXT + 1}; .*--context"):
        model.decode(embeds, modality, np.ones_like(ids), model.empty_cache(1))


def test_not_compiled_says_how(static: Static) -> None:
    shutil.rmtree(static.folder / "compiled", ignore_errors=True)
    with pytest.raises(SplitQError, match=r"expected files compiled for qnn-htp:v79.*splitq-edge compile .* --arch 79"):
        static.model(target=Target(QNN_HTP, 79))


@needs_qnn
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_emulator_answers_as_the_cpu(arch: int, static: Static) -> None:
    target = Target(QNN_HTP, arch)
    lines = list(run_compile(static.folder, target))
    assert sum("MB" in line for line in lines) == len(STATIC_PARTS)
    compiled = compiled_parts(static.folder, target)
    assert set(compiled) == set(STATIC_PARTS)
    for path in compiled.values():
        assert {node.op_type for node in onnx.load(path).graph.node} == {"EPContext"}
    report = list(run_verify(static.folder, native=None, target=target.name))
    assert sum(line.endswith("ok") for line in report[report.index(f"{target.name} against the CPU") :]) == 3


@needs_qnn
@pytest.mark.slow
def test_files_compiled_from_another_graph_are_refused(static: Static) -> None:
    list(run_compile(static.folder, V73))
    source = static.folder / "decoder_step.onnx"
    kept = source.read_bytes()
    source.write_bytes(kept + b"\x00")
    try:
        with pytest.raises(ArtifactError, match=r"compiled from another decoder_step.onnx; compile it again"):
            compiled_parts(static.folder, V73)
    finally:
        source.write_bytes(kept)


def test_bias_lets_tokens_see_what_came_before() -> None:
    shape = StaticShape(context=6, chunk=4, blocked=-100.0, text_rows=False)
    cache = StaticCache({"past_key_values.0.key": np.zeros((1, 1, 6, 2), np.float32)}, filled=2)
    embeds = np.arange(6, dtype=np.float32).reshape(3, 2)
    seen = np.array([0, 1, 1, 1, 1])  # the first cached token is padding
    (call,) = shape.calls(embeds, np.zeros(3, np.int8), seen, cache, 0)
    expected = np.full((4, 10), -100.0)
    expected[:, 1] = 0
    for row in range(4):
        expected[row, 6 : 7 + min(row, 2)] = 0
    assert call.feeds["attention_bias"][0, 0].tolist() == expected.tolist()
    assert call.feeds["position_ids"].tolist() == [[1, 2, 3, 3]]
    assert call.feeds["inputs_embeds"][0, 3].tolist() == embeds[2].tolist()
    assert call.used == 3


def test_sizes_are_checked() -> None:
    with pytest.raises(SplitQError, match="2 <= chunk <= context, got chunk 9 and context 8"):
        StaticSizes(8, 9)


def test_the_model_is_itself_again_behind_the_block(static: Static) -> None:
    before = dict(static.loaded.model.named_modules())
    with static_model(static.loaded, StaticSizes(CONTEXT, CHUNK)):
        assert dict(static.loaded.model.named_modules()) != before
    assert dict(static.loaded.model.named_modules()) == before
