"""Ratios out of the rows of model.py: ours over the others', what SplitQ's extras cost, loading, memory.

python tests/bench/model_goals.py build/bench/model.json [another run's file ...]

Of several runs: the median and, where they differ by more than 0.02, the range.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

FOUR_BITS = ("Q4_0", "Q4_K_M")  # of llama.cpp
LIKE_OTHERS = ("W4A8", "W4A8 float32 cache", "W4A8 8-bit head", "W4A8 4-bit head")  # what others have
SPARE_MB = 150  # that a process may take beside 1.15 times its file and the cache

Row = dict[str, Any]


def goals(rows: list[Row]) -> Iterator[tuple[str, str, float]]:
    """What was measured (model, threads, tokens), which ratio, and the ratio; only those whose two sides are there."""
    places = sorted({(row["model"], row["threads"], row["prompt_tokens"]) for row in rows})
    for model, threads, tokens in places:
        here = {
            (row["engine"], row["scheme"]): row
            for row in rows
            if (row["model"], row["threads"], row["prompt_tokens"]) == (model, threads, tokens)
        }
        label = f"{model}, {threads} threads, {tokens} tokens"
        for name, value in _ratios(here):
            yield label, name, value


def _ratios(here: dict[tuple[str, str], Row]) -> Iterator[tuple[str, float]]:
    own = {scheme: row for (engine, scheme), row in here.items() if engine == "splitq-edge"}
    llama = [row for (engine, scheme), row in here.items() if engine == "llama.cpp" and scheme in FOUR_BITS]
    others = {
        "genai int4": here.get(("onnxruntime-genai", "int4")),
        "MatMulNBits": here.get(("onnxruntime", "MatMulNBits")),
    }
    full = own.get("W4A8")
    if full is None:
        return
    for kind, key in (("steps", "decode_tps"), ("prompt", "prefill_tps")):
        for scheme in LIKE_OTHERS:
            if scheme not in own:
                continue
            if llama:
                yield f"{kind}: {scheme} / llama.cpp's best 4 bits", own[scheme][key] / max(row[key] for row in llama)
            for name, row in others.items():
                if row is not None:
                    yield f"{kind}: {scheme} / {name}", own[scheme][key] / row[key]
    if "W3A3" in own:
        yield "steps: W3A3 / W4A8", own["W3A3"]["decode_tps"] / full["decode_tps"]
    for scheme, row in own.items():
        if scheme.startswith("W4A8 ") and scheme not in LIKE_OTHERS:
            yield f"step's time: W4A8 / {scheme}", row["decode_tps"] / full["decode_tps"]
    same_bits = next((row for row in llama if row["scheme"] == "Q4_0"), None)
    if same_bits is not None:
        yield "loading: W4A8 / Q4_0", full["load_s"] / same_bits["load_s"]
    if "file_mb" in full:
        allowed = 1.15 * full["file_mb"] + full["cache_mb"] + SPARE_MB
        yield f"memory: W4A8 / (1.15 file + cache + {SPARE_MB} MB)", full["peak_rss_mb"] / allowed


def over_runs(runs: Sequence[list[Row]]) -> Iterator[tuple[str, str, list[float]]]:
    """As `goals`, with a ratio a run, in the order of the first."""
    found: dict[tuple[str, str], list[float]] = {}
    for rows in runs:
        for label, name, value in goals(rows):
            found.setdefault((label, name), []).append(value)
    for (label, name), values in found.items():
        yield label, name, values


def as_text(values: list[float]) -> str:
    """The median, and the range if it is more than rounding."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})" if high - low > 0.02 else f"{middle:.2f}"


def goal_table(runs: Sequence[list[Row]]) -> Table:
    """The ratios as a table."""
    table = Table(box=None)
    for name in ("", "ratio", "value"):
        table.add_column(name, justify="right" if name == "value" else "left", no_wrap=True)
    for label, name, values in over_runs(runs):
        table.add_row(label, name, as_text(values))
    return table


@click.command(help=__doc__)
@click.argument("paths", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
def main(paths: tuple[Path, ...]) -> None:
    """Print the ratios of files of rows, a run of the same engines each."""
    Console(width=140).print(goal_table([json.loads(path.read_text(encoding="utf-8")) for path in paths]))


if __name__ == "__main__":
    main()
