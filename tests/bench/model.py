"""Time whole decoders, ours beside ONNX Runtime's, onnxruntime-genai's and llama.cpp's, in one interleaved run.

    make bench-model BENCH="--shapes 135M,1.5B --schemes 'W4A8; W4A8 plain; W3A3'"

Every engine holds its model in a process of its own (model_engines.py), loaded from the disk. Every round asks each of
them in turn for a prompt and the steps behind it; a value is the median over the rounds. All models have random
weights: time does not depend on them. Embedding the tokens is left out of our times; it is a row to copy. "MatMulNBits"
is our graph with ONNX Runtime's 4-bit layers in blocks of 128 at accuracy level 4 and an 8-bit head; "genai int4" what
the model builder makes by itself, 4-bit blocks of 32 with the head among them. llama.cpp stores a tied head in 6 or 8
bits, ours has 6 (8 at W8A8). Behind the rows it prints their ratios (model_goals.py).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from model_goals import goal_table
from model_graphs import folder_of, write_decoders
from model_peers import GGUF_TYPES, write_genai, write_gguf
from rich.console import Console
from rich.table import Table

SCHEMES = ("fp32", "W8A8", "W4A8", "W4A4", "W3A3", "W3A2", "W4A8 plain", "W3A3 plain", "W4A8 float32 cache")
EXTRAS = ("W4A8 no transform", "W4A8 no split", "W4A8 no CWS, MAC")
LOADS = 3
ENGINE_SCRIPT = Path(__file__).with_name("model_engines.py")


@dataclass
class Contender:
    """An engine with a model.

    Attributes:
        engine: "splitq-edge", "onnxruntime", "onnxruntime-genai" or "llama.cpp".
        scheme: what the table calls its quantization.
        kind: engine of model_engines.py.
        path: its model.
        seconds: by prompt tokens, of the prompt and of one step, a round.
        process: while it runs.
        load_s: seconds to load, the median of `LOADS` starts.
        peak_rss_mb: of its process.
        longest: tokens of the longest prompt with its steps.
    """

    engine: str
    scheme: str
    kind: str
    path: Path
    seconds: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    process: Any = None
    load_s: float = 0.0
    peak_rss_mb: float = 0.0
    longest: int = 0

    def start(self, threads: int) -> None:
        """Load the model, several times, first from the disk."""
        forget(self.path)
        seconds = [self._load(threads)]
        while len(seconds) < LOADS:
            self.stop()
            seconds.append(self._load(threads))
        self.load_s = statistics.median(seconds)

    def _load(self, threads: int) -> float:
        command = [sys.executable, str(ENGINE_SCRIPT), self.kind, str(self.path), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._answer()["load_s"]

    def time(self, tokens: int, steps: int, *, keep: bool) -> None:
        """One prompt and the steps behind it."""
        self.longest = max(self.longest, tokens + steps)
        print(tokens, steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        if keep:
            self.seconds[tokens].append((answer["prompt_s"], answer["steps_s"] / steps))

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.peak_rss_mb = self._answer()["peak_rss_mb"]
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise click.ClickException(f"{self.engine} {self.scheme}: the process ended with {self.process.wait()}")
        return json.loads(line)

    def _sizes(self) -> dict[str, float]:
        """Of our own models: megabytes of graph and data, and of the cache that the engine holds."""
        if self.kind != "ours":
            return {}
        cache = json.loads((self.path / "export.json").read_text(encoding="utf-8"))["cache"]
        tokens = 2 * cache["layers"] * cache["heads"] * cache["head_dim"] * cache["bits"] // 8
        files = sum(path.stat().st_size for path in self.path.glob("decoder.onnx*"))
        return {"file_mb": round(files / 2**20, 1), "cache_mb": round(tokens * self.longest / 2**20, 1)}

    def rows(self, shape: str, threads: int) -> list[dict[str, object]]:
        """One row a prompt length."""
        found = []
        for tokens, times in self.seconds.items():
            prompt, step = (statistics.median(values) for values in zip(*times, strict=True))
            found.append(
                {
                    "model": shape,
                    "engine": self.engine,
                    "scheme": self.scheme,
                    "threads": threads,
                    "prompt_tokens": tokens,
                    "prefill_tps": round(tokens / prompt, 1),
                    "decode_tps": round(1 / step, 2),
                    "peak_rss_mb": round(self.peak_rss_mb),
                    "load_s": round(self.load_s, 3),
                    **self._sizes(),
                }
            )
        return found


def forget(path: Path) -> None:
    """Drop a model's files from the page cache, where the system can.

    How fast it is read depends on the pages in which it came there; so all are loaded from the disk, as after the
    machine has started.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contenders(shape: str, work: Path, schemes: list[str], peers: list[str]) -> list[Contender]:
    """Models of a shape, written where they are missing."""
    decoders = work / shape / "decoders"
    own = [*schemes, *(["MatMulNBits"] if "MatMulNBits" in peers else [])]
    write_decoders(shape, own, decoders)
    found = [
        Contender("onnxruntime" if name == "MatMulNBits" else "splitq-edge", name, "ours", folder_of(decoders, name))
        for name in own
    ]
    checkpoint = work / shape / "checkpoint"
    if "genai" in peers:
        write_genai(checkpoint, shape, work / shape / "genai")
        found.append(Contender("onnxruntime-genai", "int4", "genai", work / shape / "genai"))
    if "llama.cpp" in peers:
        write_gguf(checkpoint, shape, work / shape / "gguf")
        found += [Contender("llama.cpp", kind, "llama", work / shape / "gguf" / f"{kind}.gguf") for kind in GGUF_TYPES]
    shutil.rmtree(checkpoint, ignore_errors=True)  # the largest of all files; what was made of it stays
    return found


def interleave(entries: list[Contender], threads: int, prompts: list[int], steps: int, rounds: int) -> None:
    """Load all, let them take turns, end all."""
    try:
        for entry in entries:
            entry.seconds.clear()
            entry.start(threads)
            entry.time(16, 4, keep=False)
        for _ in range(rounds):
            for tokens in prompts:
                for entry in entries:
                    entry.time(tokens, steps, keep=True)
        for entry in entries:
            entry.stop()
    finally:
        for entry in entries:
            if entry.process is not None and entry.process.poll() is None:
                entry.process.kill()


def shown(rows: list[dict[str, object]]) -> Table:
    """The rows as a table."""
    table = Table(box=None)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("model", "engine", "scheme") else "right")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in rows[0]))
    return table


def _list(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


@click.command(help=__doc__)
@click.option("--shapes", default="135M", show_default=True, callback=_list, help="135M, 1.5B.")
@click.option("--schemes", default="; ".join(SCHEMES), show_default=True, help="Ours, with semicolons between.")
@click.option("--peers", default="MatMulNBits,genai,llama.cpp", show_default=True, callback=_list)
@click.option("--threads", default="1,2", show_default=True, callback=_list)
@click.option("--prompt-tokens", default="256,1024", show_default=True, callback=_list)
@click.option("--steps", default=32, show_default=True, help="Tokens behind a prompt.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench/model"), show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), default=Path("build/bench/model.json"))
@click.option("--prepare", is_flag=True, help="Write the models and time nothing.")
def main(
    shapes: list[str], schemes: str, peers: list[str], threads: list[str], prompt_tokens: list[str], **options: Any
) -> None:
    """Prepare, time, write the rows."""
    rows: list[dict[str, object]] = []
    names = [name.strip() for name in schemes.split(";") if name.strip()]
    for shape in shapes:
        entries = contenders(shape, options["work"], names, peers)
        for count in [] if options["prepare"] else map(int, threads):
            interleave(entries, count, [int(tokens) for tokens in prompt_tokens], options["steps"], options["rounds"])
            rows += [row for entry in entries for row in entry.rows(shape, count)]
    if rows:
        options["target"].parent.mkdir(parents=True, exist_ok=True)
        options["target"].write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
        Console(width=160).print(shown(rows))
        Console(width=140).print(goal_table([rows]))


if __name__ == "__main__":
    main()
