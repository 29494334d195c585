"""Where the time of an exported decoder goes, by kind of node, from ONNX Runtime's own profile.

    python tests/bench/profile_decoder.py OUT --prompt-tokens 256 --steps 32

Runs a prompt of random tokens and then single steps with profiling on, and prints two tables: the prompt and the mean
step. What lies between the nodes (binding, dispatch, the runtime's bookkeeping) is the row "between nodes". Profiling
itself costs about a microsecond a node.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from splitq_edge.runtime_ops.session import ExportedModel


def profile(folder: Path, tokens: int, steps: int, threads: int, native: bool) -> list[dict[str, Any]]:
    """Events of a session that ran one prompt and then single steps."""
    model = ExportedModel(folder, native=native, threads=threads)
    options = model.session_options("decoder")
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as place:
        options.profile_file_prefix = str(Path(place) / "profile")
        model.read_weights("decoder")
        session = ort.InferenceSession(str(folder / model.manifest["parts"]["decoder"]["file"]), options)
        model.use_session("decoder", session)
        embeds = np.random.default_rng(0).standard_normal((1, tokens + steps, model.manifest["hidden_size"]))
        embeds = embeds.astype(np.float32)
        modality, mask = np.zeros(embeds.shape[:2], np.int8), np.ones(embeds.shape[:2], np.int64)
        cache = model.empty_cache(1, room=tokens + steps)
        for start, end in ((0, tokens), *((at, at + 1) for at in range(tokens, tokens + steps))):
            rows = slice(start, end)
            _, cache = model.decode(embeds[:, rows], modality[:, rows], mask[:, :end], cache, logits_to_keep=1)
        return json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))


def by_kind(events: list[dict[str, Any]], begin: float, end: float) -> dict[str, tuple[int, float]]:
    """Calls and microseconds of every kind of node that ran within [begin, end) microseconds."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and begin <= event["ts"] < end:
            found[event["args"]["op_name"]].append(event["dur"])
    return {kind: (len(times), sum(times)) for kind, times in found.items()}


def table(title: str, kinds: dict[str, tuple[int, float]], total: float, runs: int) -> Table:
    """Milliseconds and calls a run."""
    shown = Table(title=f"{title}: {total / runs / 1e3:.3f} ms", title_justify="left", box=None)
    for name in ("node", "calls", "ms", "share"):
        shown.add_column(name, justify="left" if name == "node" else "right")
    rows = sorted(kinds.items(), key=lambda item: -item[1][1])
    rows.append(("between nodes", (0, total - sum(time for _, time in kinds.values()))))
    for kind, (calls, time) in rows:
        shown.add_row(kind, str(calls // runs or ""), f"{time / runs / 1e3:.3f}", f"{100 * time / total:.1f} %")
    return shown


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--steps", default=32, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--native/--functions", default=True, show_default=True)
def main(out: Path, prompt_tokens: int, steps: int, threads: int, native: bool) -> None:
    """Print both tables."""
    events = profile(out, prompt_tokens, steps, threads, native)
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    console = Console(width=100)
    prompt, single = runs[:-steps], runs[-steps:]  # a long prompt is read in several runs
    for title, part, count in ((f"prompt of {prompt_tokens} tokens", prompt, 1), ("one step", single, steps)):
        begin, end = part[0]["ts"], part[-1]["ts"] + part[-1]["dur"]
        console.print(table(title, by_kind(events, begin, end), sum(run["dur"] for run in part), count))
        console.print()


if __name__ == "__main__":
    main()
