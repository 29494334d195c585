"""Memory of an export whose decoder is larger than 2 GB, the limit of a protobuf file: random weights, packed flavour.

    python tests/bench/large_export.py --work build/large

Writes a bfloat16 checkpoint of the shape of easyvqa-tiny with a large language model, exports it at W4A8 by rounding to
nearest, and answers a question with one token. Prints sizes and the peak resident memory of both processes; exits with
an error when the export took more than the checkpoint's size and 4 GB. Needs 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BASE = Path(__file__).resolve().parents[2] / "models" / "easyvqa-tiny"
GIGABYTE = 1e9
SLACK = 4 * GIGABYTE  # beside the checkpoint's bytes
CHUNK = 1 << 24  # weights drawn at a time, in float32


def enlarged(layers: int, hidden: int, intermediate: int, vocabulary: int) -> Any:
    """easyvqa-tiny's configuration with a larger language model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(BASE)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.vocab_size = hidden, intermediate, vocabulary
    text.num_hidden_layers, text.head_dim = layers, 128
    text.num_attention_heads = text.num_key_value_heads = hidden // 128
    config.tie_word_embeddings = text.tie_word_embeddings = True
    config.dtype = text.dtype = "bfloat16"
    return config


def shards(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Random bfloat16 weights, a language block at a time."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        head, _, tail = name.partition("language_model.layers.")
        groups.setdefault(tail.partition(".")[0] if tail else head.partition(".")[0], {})[name] = weight
    for group in groups.values():
        yield {name: random_weight(weight.shape, generator) for name, weight in group.items()}


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Matrices by their fan-in, vectors near one."""
    center, spread = (1.0, 0.02) if len(shape) == 1 else (0.0, shape[1:].numel() ** -0.5)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for part in weight.view(-1).split(CHUNK):
        part.copy_(torch.empty(part.shape).normal_(center, spread, generator=generator))
    return weight


def write_checkpoint(folder: Path, config: Any) -> int:
    """A checkpoint folder in shards; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    for path in BASE.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    config.save_pretrained(folder)
    size, places = 0, {}
    for index, tensors in enumerate(shards(config)):
        file = f"model-{index:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    return size


def measured(*arguments: str) -> float:
    """Run a command of splitq-edge; its peak resident memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "splitq_edge.cli", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"splitq-edge {arguments[0]}: failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/large"), help="new folder")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=112000)
    chosen = parser.parse_args()
    from splitq_edge.evaluate.tasks import load_task

    checkpoint, out = chosen.work / "checkpoint", chosen.work / "export"
    size = write_checkpoint(checkpoint, enlarged(chosen.layers, chosen.hidden, chosen.intermediate, chosen.vocabulary))
    print(f"checkpoint: {size / GIGABYTE:.2f} GB in bfloat16", flush=True)
    options = ("--method", "rtn", "--flavour", "packed", "--calib-samples", "2", "--force")
    peak = measured("export", str(checkpoint), str(out), *options)
    decoder = sum(path.stat().st_size for path in out.glob("decoder.onnx*"))
    question = load_task("easyvqa", "test")[0]
    asked = ("--image", str(question.image), "--prompt", question.text, "--max-new-tokens", "1", "--engine", "loop")
    run = measured("run", str(out), *asked)
    print(f"decoder: {decoder / GIGABYTE:.2f} GB")
    print(f"peak memory: export {peak / GIGABYTE:.2f} GB, run {run / GIGABYTE:.2f} GB")
    if peak > size + SLACK:
        raise SystemExit(f"export: expected at most {(size + SLACK) / GIGABYTE:.2f} GB")


if __name__ == "__main__":
    main()
