"""What the layers were to reach, and whether they did, out of `make bench-kernels` runs.

    python tests/bench/kernel_goals.py RUN.json [RUN.json ...]

The numbers are geometric means over the shapes of the files, of several runs the median with its range. Runs of one
processor are named alike up to a number: kernels-zen4-1.json, kernels-zen4-2.json; each has a column. Files of
two_threads.py, as two-threads-zen4-1.json, add what a second thread gives on cores behind one last-level cache and on
cores with one each.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from kernel_tables import Key, Times, cell, ratios, times
from two_threads import LOOP, PLACES, Shape, load, speed_up

NBITS = "MatMulNBits 4 bits b128"
# Layer, rows, peer (or "roofline"), and how many times longer it is to take at least; one thread.
FASTER: tuple[tuple[str, int, str, float], ...] = (
    ("W4A8", 1, NBITS, 1.20),
    ("W4A8", 1, "ggml Q4_0 repacked", 1.25),
    ("W4A8", 1, "roofline", 0.85),
    ("W3A8", 1, NBITS, 1.50),
    ("W3A8", 1, "W4A8", 1.25),
    ("W3A3", 1, NBITS, 1.50),
    ("W3A3", 1, "W4A8", 1.25),
    ("W2A8", 1, "MatMulNBits 2 bits b64", 1.70),
    ("W4A8", 16, NBITS, 1.25),
    *(
        (layer, 128, peer, goal)
        for layer in ("W4A8", "W3A8")
        for peer, goal in (
            (NBITS, 1.60),
            ("ggml Q4_0 repacked", 2.20),
            ("ggml Q4_K", 1.40),
            ("MatMulInteger", 0.90),
            ("roofline", 0.70),
        )
    ),
    ("W4A4", 1, "W4A8", 0.97),
    ("W4A4", 128, "W4A8", 0.97),
    ("W3A3", 1, "W3A8", 0.97),
    ("W3A3", 128, "W3A8", 0.97),
)
# Whole layer, the plain one, rows, and how many times the plain one's time it may take; one thread.
EXTRAS = (
    ("SplitQ W4A8", "W4A8", 1, 1.25),
    ("SplitQ W3A3", "W3A3", 1, 1.25),
    ("SplitQ W4A8", "W4A8", 128, 1.20),
    ("SplitQ W3A3", "W3A3", 128, 1.20),
)
# Layer, rows, and how many times faster two threads are to be.
THREADS = (("W4A8", 1, 1.40), ("W3A8", 1, 1.40), ("W4A8", 128, 1.80), ("W3A8", 128, 1.80))


def goals(compared: Sequence[dict[Key, float]], timed: Sequence[Times]) -> Iterator[tuple[str, str, list[float], bool]]:
    """What, its goal, the value of every run, whether their median reaches it; what is in no run is left out."""
    for layer, rows, peer, least in FASTER:
        key = (layer, rows, 1, peer)
        if all(key in run for run in compared):
            values = [run[key] for run in compared]
            what = f"{layer}, {_rows(rows)}, {'of the roofline' if peer == 'roofline' else f'times as fast as {peer}'}"
            yield what, f">= {least:.2f}", values, statistics.median(values) >= least
    for what, one, other, goal, least in (
        *(
            (f"{whole}, {_rows(m)}, times as long as the plain layer", (whole, m, 1), (plain, m, 1), most, False)
            for whole, plain, m, most in EXTRAS
        ),
        *(
            (f"{layer}, {_rows(m)}, times as fast with two threads", (layer, m, 1), (layer, m, 2), least, True)
            for layer, m, least in THREADS
        ),
    ):
        values = [mean for run in timed if (mean := _mean(run, one, other)) is not None]
        if len(values) == len(timed):
            middle = statistics.median(values)
            yield what, f"{'>=' if least else '<='} {goal:.2f}", values, middle >= goal if least else middle <= goal


def memory(machines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[float], bool]]:
    """The same of a loop that only reads memory, in one second of a run; no goal."""
    if all("limits_1" in machine and "limits_2" in machine for machine in machines):
        values = [machine["limits_2"]["gbps"] / machine["limits_1"]["gbps"] for machine in machines]
        yield "*reading memory in a loop, in a second of each run*, times as fast with two threads", "", values, True


def placed(runs: Sequence[dict[str, Shape]]) -> Iterator[tuple[str, str, list[float], bool]]:
    """The goals of two threads and one row by where the threads' cores are, and a loop over memory beside them."""
    for label, apart in PLACES:
        for name, goal in (*((layer, goal) for layer, rows, goal in THREADS if rows == 1), (LOOP, 0.0)):
            values = [value for run in runs if (value := speed_up(run, name, apart=apart)) is not None]
            if values and len(values) == len(runs):
                what = f"{name}, 1 row" if goal else f"*{name}*"
                text = f">= {goal:.2f}" if goal else ""
                reached = statistics.median(values) >= goal
                yield f"{what}, times as fast with two threads on cores {label}", text, values, reached


def _rows(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


def _mean(run: Times, one: tuple[str, int, int], other: tuple[str, int, int]) -> float | None:
    """Geometric mean over the shapes of one layer's time divided by another's; None if the run has not both."""
    shapes = [key[3] for key in run if key[:3] == one and (*other, key[3]) in run]
    return statistics.geometric_mean(run[(*one, s)] / run[(*other, s)] for s in shapes) if shapes else None


def processor(path: Path, kind: str) -> str:
    """What a file is named after: zen4 of kernels-zen4.json and of kernels-zen4-1.json."""
    return re.sub(r"-\d+$", "", path.stem).removeprefix(kind).strip("-") or path.stem


def read(path: Path) -> dict[str, Any]:
    """A file of kernels.py.

    Raises:
        click.ClickException: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["rows"] and content["machine"]:
            return dict(content)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise click.ClickException(
        f"{path}: expected a file of kernels.py, or of two_threads.py named two-threads-NAME-1.json"
    )


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(runs: tuple[Path, ...]) -> None:
    """Print them as a Markdown table."""
    processors: dict[str, list[dict[str, Any]]] = {}
    apart: dict[str, list[dict[str, Shape]]] = {}
    for run in runs:
        if run.stem.startswith("two-threads"):
            apart.setdefault(processor(run, "two-threads"), []).append(load(run))
        else:
            processors.setdefault(processor(run, "kernels"), []).append(read(run))
    for name, loaded in apart.items():
        if any(run.keys() != loaded[0].keys() for run in loaded):
            raise click.ClickException(f"{name}: expected files of two_threads.py of the same shapes")
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for name in {**processors, **apart}:
        found = [*placed(apart.get(name, []))]
        if contents := processors.get(name):
            found = [
                *goals([ratios(content) for content in contents], [times(content) for content in contents]),
                *memory([content["machine"] for content in contents]),
                *found,
            ]
        for what, goal, values, reached in found:
            columns.setdefault((what, goal), {})[name] = cell(values) if reached else f"**{cell(values)}**"
    names = [*{**processors, **apart}]
    click.echo(f"| | goal | {' | '.join(names)} |\n|---|---:|{'---:|' * len(names)}")
    for (what, goal), row in columns.items():
        click.echo(f"| {what} | {goal} | {' | '.join(row.get(name, '') for name in names)} |")


if __name__ == "__main__":
    main()
