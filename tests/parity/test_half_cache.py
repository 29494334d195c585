"""A key-value cache in float16, in fused attention and in standard ops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import CLOSED_FORM, VOCABULARY, calibrated, chat_batches, tiny_loaded

from splitq_edge.config import preset
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.runtime_ops.cache import BufferCache, ReturnedCache
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import verify_parity

pytestmark = pytest.mark.slow

HALF_DB = 35.0  # 11 bits of every key and value; measured 51, and 42 of one token behind pieces


@pytest.fixture(scope="module", params=["fused", "standard"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    loaded, batches = tiny_loaded(), chat_batches(2)
    # 8 bits for weights and activations: little else is left than the cache's rounding
    config = replace(preset("W4A8"), bits=8, learning=CLOSED_FORM, kv_cache_bits=16)
    quantized = calibrated(loaded, config, batches, tmp_path_factory.mktemp("calibration"))
    folder = tmp_path_factory.mktemp(request.param)
    write_export(loaded, quantized, ExportRequest("portable", batches[0], None, 0, request.param), folder)
    return ExportedModel(folder, threads=1)


def test_the_graph_keeps_float16_and_says_so(model: ExportedModel) -> None:
    graph = onnx.load(str(model.folder / "decoder.onnx"), load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    cache = {kind for name, kind in kinds.items() if name.startswith(("past_key_values.", "present."))}
    assert cache == {onnx.TensorProto.FLOAT16}
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    assert (model.manifest["cache"]["dtype"], model.manifest["cache"]["bits"]) == ("float16", 16)
    assert [row for row in verify_parity(model) if not row.ok] == []


def test_steps_behind_a_cache_are_those_of_the_whole_prompt(
    model: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(4, VOCABULARY, (2, 24))
    mask = np.ones_like(ids)
    embeds, modality = model.embed(ids, model.encode_images(None))
    whole, _ = model.decode(embeds, modality, mask, model.empty_cache(2))
    cache = model.empty_cache(2, room=24)
    fused = model.manifest["attention"] == "fused"
    assert isinstance(cache, BufferCache if fused else ReturnedCache)
    pieces = []
    for start, end in ((0, 20), (20, 21), (21, 24)):
        logits, cache = model.decode(embeds[:, start:end], modality[:, start:end], mask[:, :end], cache)
        pieces.append(logits)
    monkeypatch.setattr("splitq_edge.runtime_ops.session.PIECE", 8)
    last, _ = model.decode(embeds, modality, mask, model.empty_cache(2), logits_to_keep=1)
    values = cache.buffers.values if fused else cache.values  # type: ignore[union-attr]
    assert {value.dtype for value in values.values()} == {np.dtype(np.float16)}
    for got, wanted in ((np.concatenate(pieces, 1), whole), (last, whole[:, -1:])):
        noise = ((got - wanted) ** 2).sum() / (wanted**2).sum()
        print(f"{model.manifest['attention']}: {-10 * np.log10(max(noise, 1e-12)):.1f} dB")
        assert noise < 10 ** (-HALF_DB / 10)
    assert np.array_equal(last, whole[:, -1:]) != fused  # a graph in standard ops reads its prompt at once
