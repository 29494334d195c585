"""A tied model whose output projection has 8, 6 or 4 bits: the folder holds the weight once, both graphs read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import CLOSED_FORM, VOCABULARY, calibrated, calibration_state, chat_batches, tiny_loaded, write_chats
from families import save_processor, tiny_model

from splitq_edge.calibration.data import encode_sample, load_samples
from splitq_edge.config import preset
from splitq_edge.convert import assemble
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.loading import load_model, tied
from splitq_edge.modules.quantized_embedding import QuantizedEmbedding
from splitq_edge.runtime_ops import session
from splitq_edge.runtime_ops.generate import greedy_tokens
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import verify_files, verify_parity

pytestmark = pytest.mark.slow

HIDDEN = 96
CASES = [
    ("portable", "flat", "W8A8"),
    ("packed", "genai", "W8A8"),
    ("portable", "onnx-community", "W8A8"),
    ("portable", "flat", "W6A8"),
    ("packed", "genai", "W6A8"),
    ("packed", "flat", "W4A8"),
    ("portable", "flat", "W4A8"),
    ("portable", "onnx-community", "W4A8"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flavour, layout, lm_head = request.param
    loaded, batches = tiny_loaded(), chat_batches(2)
    loaded.model.lm_head.weight = loaded.model.get_input_embeddings().weight
    embedding = "W4" if lm_head == "W4A8" else "W8"
    config = replace(preset("W4A8"), learning=CLOSED_FORM, lm_head=lm_head, embedding=embedding)
    quantized = calibrated(loaded, config, batches, tmp_path_factory.mktemp("calibration"))
    out = tmp_path_factory.mktemp("export")
    attention = "standard" if layout == "onnx-community" else "fused"
    write_export(loaded, quantized, ExportRequest(flavour, batches[0], None, 0, attention, layout), out)
    return out


def test_the_weight_lies_in_the_folder_once_where_the_layout_allows_it(folder: Path) -> None:
    manifest = json.loads((folder / "export.json").read_text())
    embed, decoder = (folder / manifest["parts"][part]["file"] for part in ("embed_tokens", "decoder"))
    nibbles = manifest["embedding"]["scheme"] == "W4"
    alone = manifest["layout"] == "onnx-community" or (nibbles and manifest["flavour"] == "portable")
    data = sum(path.stat().st_size for path in embed.parent.glob(f"{embed.name}?data"))
    assert data < HIDDEN * VOCABULARY * (0.8 if alone and nibbles else 2 if alone else 0.3)
    assert manifest["parts"]["embed_tokens"].get("shared_data") == (None if alone else [f"{decoder.name}.data"])
    assert manifest["embedding"]["scheme"] == manifest["lm_head"]["scheme"][:2]
    codes = [
        tensor
        for tensor in onnx.load(str(embed), load_external_data=False).graph.initializer
        if np.prod(tensor.dims) >= HIDDEN * VOCABULARY / 2
    ]
    assert [tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) for tensor in codes] == [True]


def test_both_graphs_say_what_torch_says(folder: Path) -> None:
    said = []
    for native in (None, False):
        model = ExportedModel(folder, native=native, threads=1)
        verify_files(model)
        assert [row for row in verify_parity(model) if not row.ok] == []
        ids = np.array([[1, 70, 80, 90]])
        said.append(list(greedy_tokens(model, ids, np.ones_like(ids), model.encode_images(None), max_new_tokens=3)))
    np.testing.assert_array_equal(*said)


def test_the_files_of_a_part_are_read_before_its_session_maps_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(session, "read_through", read.append)
    model = ExportedModel(folder, threads=1)
    model.session("embed_tokens")
    embed, decoder = (folder / model.manifest["parts"][part]["file"] for part in ("embed_tokens", "decoder"))
    data = {path for path in embed.parent.iterdir() if path.name.startswith(embed.name) and path != embed}
    data |= {decoder.with_name(name) for name in model.manifest["parts"]["embed_tokens"].get("shared_data", [])}
    assert data <= set(read)
    read.clear()
    model.session("decoder")
    assert [path for path in read if path.exists()] == [next(decoder.parent.glob(f"{decoder.name}?data"))]


def test_rows_are_near_the_float_ones(folder: Path) -> None:
    model = ExportedModel(folder, threads=1)
    ids = np.arange(4, VOCABULARY)[None]
    rows = model.embed(ids, model.encode_images(None))[0][0, :, :HIDDEN]
    table = tiny_loaded().model.get_input_embeddings().weight.detach()
    error = torch.linalg.norm(torch.from_numpy(rows) - table[4:]) / torch.linalg.norm(table[4:])
    bits = int(json.loads((folder / "export.json").read_text())["lm_head"]["scheme"][1])
    assert float(error) < {8: 0.02, 6: 0.04, 4: 0.2}[bits]


def test_a_tied_head_that_stays_in_float_keeps_its_weight(tmp_path: Path) -> None:
    # The checkpoint knows the weight only by the embedding's name, and that has been replaced.
    checkpoint = str(tmp_path / "checkpoint")
    tiny_model("smolvlm").save_pretrained(checkpoint)
    save_processor("smolvlm", tmp_path / "checkpoint")
    config = replace(preset("W4A8"), learning=CLOSED_FORM, lm_head="none", embedding="W8")
    chats = load_samples(str(write_chats(tmp_path / "chats")), 2, seed=0)
    loaded = load_model(checkpoint, lazy=True)
    samples = [encode_sample(loaded.processor, sample, loaded.image_layout) for sample in chats]
    state = calibration_state(loaded, config, samples, tmp_path / "state")
    loaded, whole = load_model(checkpoint, lazy=True), load_model(checkpoint)
    assert tied(loaded)
    assemble(loaded, config, state)
    loaded.read_rest()
    assert torch.equal(loaded.model.lm_head.weight, whole.model.lm_head.weight)
    assert isinstance(loaded.model.get_input_embeddings(), QuantizedEmbedding)
