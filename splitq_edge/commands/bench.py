"""`splitq-edge bench`: how fast an exported folder answers here and how much memory that takes. Needs no torch."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitq_edge.artifacts import write_bytes
from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.generate import Generator
from splitq_edge.runtime_ops.session import PARTS, ExportedModel

PICTURE = 512  # pixels a side of the picture that is encoded
SEED = 0


@dataclass(frozen=True)
class BenchOptions:
    """Options of the command, as typed."""

    out: Path
    prompt_tokens: int = 256
    new_tokens: int = 64
    images: int = 1
    threads: int = 0
    native: bool | None = None
    rounds: int = 3
    json: Path | None = None


def run_bench(options: BenchOptions) -> dict[str, Any]:
    """Measure; medians over the rounds, elapsed time.

    Returns:
        `load_s` (all parts needed), `image_s` (from the pictures of a prompt to their features), `prompt_tokens` (the
        pictures' included), `first_token_s` (from the features to the first token), `prefill_tps` and `decode_tps` in
        tokens a second, `peak_rss_mb` of the process, `file_mb` of the graphs used with their data, `cache_mb` of keys
        and values.

    Raises:
        SplitQError: the folder is not usable.
    """
    begin = time.perf_counter()
    model = ExportedModel(options.out, native=options.native, threads=options.threads)
    parts = PARTS if options.images else PARTS[1:]
    for part in parts:
        model.session(part)
    load = time.perf_counter() - begin
    rounds = [_round(model, options) for _ in range(options.rounds + 1)][1:]  # the first one warms up
    image, first, step = (statistics.median(values) for values in zip(*(r.seconds for r in rounds), strict=True))
    result = {
        "model": model.manifest.get("source", options.out.name),
        "scheme": model.manifest["scheme"],
        "flavour": model.manifest["flavour"],
        "attention": model.manifest.get("attention", "standard"),
        "native": model.native,
        "threads": options.threads,
        "images": options.images,
        "load_s": round(load, 4),
        "image_s": round(image, 4),
        "prompt_tokens": rounds[0].tokens,
        "first_token_s": round(first, 4),
        "prefill_tps": round(rounds[0].tokens / first, 1),
        "decode_tps": round(1 / step, 2),
        "peak_rss_mb": round(_peak_bytes() / 2**20),
        "file_mb": round(_file_bytes(model, parts) / 2**20, 1),
        "cache_mb": round(_cache_bytes(model, rounds[0].tokens + options.new_tokens) / 2**20, 1),
    }
    if options.json is not None:
        write_bytes(options.json, (json.dumps(result) + "\n").encode())
    return result


@dataclass(frozen=True)
class _Round:
    tokens: int
    seconds: tuple[float, float, float]  # pictures, first token, one more token


def _round(model: ExportedModel, options: BenchOptions) -> _Round:
    """One answer to a prompt of the pictures' tokens and text tokens drawn at random, up to `prompt_tokens`."""
    marks = [time.perf_counter()]
    ids, inputs = _prompt(model, options)
    features = model.encode_images(inputs if options.images else None)
    marks.append(time.perf_counter())
    mask = np.ones_like(ids)
    positions = model.positions(ids, mask, inputs)
    cache = model.empty_cache(1, room=ids.shape[1] + options.new_tokens)
    embeds, modality = model.embed(ids, features)
    for _ in range(options.new_tokens):
        logits, cache = model.decode(embeds, modality, mask, cache, positions, logits_to_keep=1)
        token = logits[:, -1].argmax(-1)
        token[token == model.manifest["image_token_id"]] = 0
        marks.append(time.perf_counter())
        embeds, modality = model.embed(token[:, None], features[:0])
        mask, positions = np.ones((1, mask.shape[1] + 1), np.int64), None
    steps = max(1, options.new_tokens - 1)
    return _Round(ids.shape[1], (marks[1] - marks[0], marks[2] - marks[1], (marks[-1] - marks[2]) / steps))


def _prompt(model: ExportedModel, options: BenchOptions) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """input_ids [1, sequence] and the pictures."""
    generator = np.random.default_rng(SEED)
    ids, inputs = np.zeros((1, 0), np.int64), {}
    if options.images:
        from PIL import Image

        noise = generator.integers(0, 256, (PICTURE, PICTURE, 3), np.uint8)
        content = [{"type": "image", "image": Image.fromarray(noise)}] * options.images
        inputs = Generator(model).prepare([{"role": "user", "content": content}])
        ids = inputs["input_ids"]
    text = generator.integers(0, _ordinary_tokens(model), (1, max(0, options.prompt_tokens - ids.shape[1])))
    return np.concatenate([ids, text], 1), inputs


def _ordinary_tokens(model: ExportedModel) -> int:
    """Ids below this are not the image token, nor beyond a small vocabulary."""
    first = int(model.manifest["image_token_id"])
    if first < 1:
        raise SplitQError(f"bench: expected token ids below the image token's, got {first}")
    return min(first, 200)


def _file_bytes(model: ExportedModel, parts: Sequence[str]) -> int:
    """Graphs and the files of their large tensors, each once."""
    graphs = [model.manifest["parts"][part]["file"] for part in parts]
    sizes = {name: entry["bytes"] for name, entry in model.manifest["files"].items()}
    return sum(size for name, size in sizes.items() if any(name.startswith(graph) for graph in graphs))


def _cache_bytes(model: ExportedModel, tokens: int) -> int:
    shape = model.manifest["cache"]
    scale = 4 if shape["bits"] < 16 else 0  # a token and head
    return 2 * shape["layers"] * shape["heads"] * tokens * (shape["head_dim"] * shape["bits"] // 8 + scale)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report_lines(result: dict[str, Any]) -> list[str]:
    """The result as a person reads it."""
    engine = "native kernels" if result["native"] else "function bodies"
    lines = [
        f"{result['model']} {result['scheme']} {result['flavour']}, {engine}, attention {result['attention']}",
        f"load            {result['load_s']:8.3f} s",
    ]
    if result["images"]:
        lines.append(f"{result['images']} images        {result['image_s']:8.3f} s")
    return [
        *lines,
        f"first token     {result['first_token_s']:8.3f} s behind {result['prompt_tokens']} tokens "
        f"({result['prefill_tps']:.0f} tokens/s)",
        f"decoding        {result['decode_tps']:8.1f} tokens/s",
        f"peak memory     {result['peak_rss_mb']:8d} MB",
        f"files, cache    {result['file_mb']:8.0f} MB, {result['cache_mb']:.0f} MB",
    ]
