"""Markdown tables of `make bench-kernels` runs.

    python tests/bench/kernel_tables.py RUN.json [RUN.json ...]

prints, for every number of rows and threads, the peers' times divided by ours as geometric means over the shapes; with
several runs the median run's value, and behind it the range over the runs where they differ by more than 0.02.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

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

Key = tuple[str, int, int, str]  # case, rows, threads, peer


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
    click.echo()
    for content in contents:
        click.echo(f"limits: {content['machine']}")


if __name__ == "__main__":
    main()
