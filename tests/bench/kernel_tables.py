"""Markdown tables of `make bench-kernels` runs.

    python tests/bench/kernel_tables.py RUN.json [RUN.json ...]

prints, for every number of rows and threads, the peers' times divided by ours as geometric means over the shapes, then
what the extras of SplitQ cost and what a second thread gives; with several runs the median run's value, and behind it
the range over the runs where they differ by more than 0.02.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from splitq_edge.quant.transforms import transform_shape
from splitq_edge.splitting.plan import outlier_width

PEERS = {
    "roofline": "roofline",
    "MatMulNBits 4 bits b128": "MatMulNBits b128",
    "MatMulNBits 2 bits b64": "MatMulNBits 2 bits",
    "MatMulInteger": "MatMulInteger",
    "ggml Q4_0 repacked": "Q4_0 repacked",
    "ggml Q4_K repacked": "Q4_K repacked",
    "ggml Q4_K": "Q4_K",
    "ggml Q3_K": "Q3_K",
    "ggml Q2_K": "Q2_K",
}
OWN = {"W8A8", "W4A8", "W3A8", "W3A3", "W2A8"}
WIDE = 0.02  # of a range worth printing
EXTRAS = {"SplitQ W4A8": "W4A8", "SplitQ W3A3": "W3A3"}  # whole layers and their plain ones
THREADED = ("W4A8", "W3A8", *EXTRAS)
MANY_ROWS = 128
INT8_A_FLOAT = 4  # int8 products in the time of one of float32: 64 and 16 an instruction of AVX-512

Key = tuple[str, int, int, str]  # case, rows, threads, peer
Shape = tuple[int, int]  # K, N
Times = dict[tuple[str, int, int, Shape], float]  # by case, rows, threads, shape


def ratios(run: dict[str, Any]) -> dict[Key, float]:
    """Geometric means over the shapes of one run."""
    found: dict[Key, list[float]] = {}
    for row in run["rows"]:
        key = row["case"], row["M"], row["threads"]
        if row["peer"] in PEERS or row["peer"] in OWN:
            found.setdefault((*key, row["peer"]), []).append(row["ratio"])
        roofline = found.setdefault((*key, "roofline"), [])
        if row["peer"] == "MatMulInteger":  # once a shape
            roofline.append(row["roofline"])
    return {key: statistics.geometric_mean(values) for key, values in found.items() if values}


def cell(values: Sequence[float]) -> str:
    """Median, and the range where it is wide."""
    text = f"{statistics.median(values):.2f}"
    wide = max(values) - min(values) > WIDE
    return f"{text} ({min(values):.2f}-{max(values):.2f})" if wide else text


def times(run: dict[str, Any]) -> Times:
    """Microseconds of our own cases."""
    return {(row["case"], row["M"], row["threads"], (row["K"], row["N"])): row["us"] for row in run["rows"]}


def least_extras(shape: Shape, transform_width: int) -> float:
    """A whole layer's time over the plain one's if both did nothing but multiply, at the processor's peak.

    The transform is float32 and in blocks of `transform_width` at most, everything else int8; the ranks are those of
    `kernels.whole_splitq`.
    """
    k, n = shape
    outliers = outlier_width(k, 0.02)
    main, full = k - outliers, min(k - outliers, n)
    cws, mac = (max(4, round(share * full / 4) * 4) for share in (0.02, 0.03))
    groups = (main, outliers // 2, outliers - outliers // 2)
    transform = INT8_A_FLOAT * sum(width * sum(transform_shape(width, transform_width)[1:]) for width in groups)
    return 1 + (transform + (cws + mac) * main + mac * n) / (k * n)


def extras_table(found: list[Times], transform_width: int) -> list[str]:
    """Time of the whole layers divided by that of the plain ones, one thread."""
    shapes = list(dict.fromkeys(shape for *_, shape in found[0]))
    rows = sorted({rows for _, rows, threads, _ in found[0] if threads == 1})
    lines = [
        f"| layer | rows | {' | '.join(f'{k} x {n}' for k, n in shapes)} | mean |",
        f"|---|---:|{'---:|' * len(shapes)}---:|",
    ]
    for case, plain in EXTRAS.items():
        for m in rows:
            values = [[run[case, m, 1, shape] / run[plain, m, 1, shape] for shape in shapes] for run in found]
            means = [statistics.geometric_mean(ratios) for ratios in values]
            cells = [cell(column) for column in (*zip(*values, strict=True), means)]
            lines.append(f"| {case} | {m} | {' | '.join(cells)} |")
    least = [least_extras(shape, transform_width) for shape in shapes]
    cells = [f"{value:.2f}" for value in (*least, statistics.geometric_mean(least))]
    return [*lines, f"| *least, if only multiplying took time* | {MANY_ROWS} | {' | '.join(cells)} |"]


def threads_table(found: list[Times]) -> list[str]:
    """Time with one thread divided by that with two, geometric means over the shapes."""
    lines = ["| layer | rows | speed-up |", "|---|---:|---:|"]
    shapes = list(dict.fromkeys(shape for *_, shape in found[0]))
    for case in THREADED:
        for m in sorted({rows for _, rows, threads, _ in found[0] if threads == 2}):
            gains = [[run[case, m, 1, shape] / run[case, m, 2, shape] for shape in shapes] for run in found]
            lines.append(f"| {case} | {m} | {cell([statistics.geometric_mean(run) for run in gains])} |")
    return lines


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(runs: tuple[Path, ...]) -> None:
    """Print them."""
    contents = [json.loads(run.read_text()) for run in runs]
    found = [ratios(content) for content in contents]
    places = dict.fromkeys((rows, threads) for _, rows, threads, _ in found[0])
    for rows, threads in sorted(places, key=lambda place: (place[1], place[0])):
        cases = dict.fromkeys(case for case, m, t, _ in found[0] if (m, t) == (rows, threads))
        click.echo(f"\n### {rows} row{'s' * (rows > 1)}, {threads} thread{'s' * (threads > 1)}\n")
        click.echo(f"| layer | {' | '.join(PEERS.values())} | W4A8 |")
        click.echo(f"|---|{'---:|' * (len(PEERS) + 1)}")
        for case in cases:
            cells = [[run.get((case, rows, threads, peer)) for run in found] for peer in (*PEERS, "W4A8")]
            click.echo(f"| {case} | {' | '.join('' if None in c else cell(c) for c in cells)} |")
    timed = [times(content) for content in contents]
    transform_width = contents[0]["machine"].get("transform_width", 0)  # runs of one block do not say it
    extras = extras_table(timed, transform_width)
    for title, lines in (("What the extras cost", extras), ("Two threads", threads_table(timed))):
        click.echo("\n".join(("", f"## {title}", "", *lines)))
    click.echo()
    for content in contents:
        click.echo(f"limits: {content['machine']}")


if __name__ == "__main__":
    main()
