"""One block of SmolVLM's text model at its real width, random weights, through Qualcomm's compiler and emulator."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CLOSED_FORM, calibrated, prompt_ids, rng
from families import LLAMA_TEXT, TILE_SIZE, TILE_TOKENS, save_processor, tiny_smolvlm_config

from splitq_edge.commands.compile import run_compile
from splitq_edge.commands.export_static import StaticOptions, write_static
from splitq_edge.commands.verify import run_verify
from splitq_edge.config import preset
from splitq_edge.exporters.export_folder import ExportRequest
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.targets import QNN_HTP, Target

HIDDEN, INTERMEDIATE = 576, 1536
V73 = Target(QNN_HTP, 73)
WIDE_TEXT = LLAMA_TEXT | {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
}


def wide_smolvlm(folder: Path) -> LoadedModel:
    import transformers

    config = tiny_smolvlm_config()
    config.text_config = type(config.text_config)(**WIDE_TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    save_processor("smolvlm", folder)
    model.save_pretrained(folder)
    return load_model(str(folder))


def chats(count: int) -> list[dict[str, torch.Tensor]]:
    rows = [
        prompt_ids("user:")[:-1] + [3] * TILE_TOKENS + prompt_ids(f"what is it, {index}? red") for index in range(count)
    ]
    pixels = torch.randn(count, 1, 1, 3, TILE_SIZE, TILE_SIZE, generator=rng(0))
    return [
        {
            "input_ids": torch.tensor([row]),
            "attention_mask": torch.ones(1, len(row), dtype=torch.long),
            "pixel_values": pixels[index],
            "pixel_attention_mask": torch.ones(1, 1, TILE_SIZE, TILE_SIZE, dtype=torch.long),
        }
        for index, row in enumerate(rows)
    ]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn (make test-qnn)")
@pytest.mark.parametrize("transform_width", [1536, 384])
def test_a_block_of_real_width_runs_in_the_emulator(transform_width: int, tmp_path: Path) -> None:
    loaded, batches = wide_smolvlm(tmp_path / "model"), chats(3)
    config = replace(preset("W4A8"), learning=CLOSED_FORM, transform_width=transform_width)
    quantized = calibrated(loaded, config, batches, tmp_path / "calibration")
    folder = tmp_path / "export"
    folder.mkdir()
    options = StaticOptions(context=32, chunk=16, target=V73.name)
    write_static(loaded, quantized, ExportRequest("qdq", batches[0], {"source": "test"}, 0), batches, options, folder)
    assert sum("MB" in line for line in run_compile(folder, V73)) == 3
    report = list(run_verify(folder, native=None, target=V73.name))
    assert sum(line.endswith("ok") for line in report[report.index(f"{V73.name} against the CPU") :]) == 3
