"""`splitq-edge inspect`: what quantization did to every site of an exported folder. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from splitq_edge.report.quality_report import STAGES, read_report


def print_report(out: Path, console: Console) -> None:
    """Print the report as two tables: signal-to-noise by stage, and the channels split off.

    Raises:
        SplitQError: no report there, or a damaged one.
    """
    report = read_report(out)
    recipe = report["recipe"]
    console.print(
        f"{out}: method {recipe['method']}, scheme {recipe['scheme']}, "
        f"{report['effective_bits']:.2f} effective bits a weight",
        soft_wrap=True,
    )
    console.print(_sqnr_table(report["blocks"]))
    if report.get("extras"):
        console.print(_extra_table(report["extras"]))
    console.print(_channel_table(report["blocks"]))
    console.print(_block_table(report["blocks"]))


def _sites(blocks: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, site) for block in blocks for name, site in block["sites"].items()]


def _sqnr_table(blocks: list[dict[str, Any]]) -> Table:
    title = "SQNR of the site's output in dB, text / vision rows, by what is switched on"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("site", no_wrap=True)
    for stage in STAGES:
        table.add_column(stage if stage in ("rtn", "final") else f"+{stage}", justify="right", no_wrap=True)
    for name, site in _sites(blocks):
        table.add_row(name, *(_pair(site["sqnr_db"][stage]) for stage in STAGES))
    return table


def _pair(values: list[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


def _extra_table(extras: dict[str, Any]) -> Table:
    title = "Sites beside the language blocks: SQNR in dB, text / vision rows"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("site", "rtn", "final"):
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    for extra in extras.values():
        for name, site in extra["sites"].items():
            table.add_row(name, *(_pair(site["sqnr_db"][stage]) for stage in ("rtn", "final")))
    return table


def _channel_table(blocks: list[dict[str, Any]]) -> Table:
    table = Table(title="Channels split off", box=box.SIMPLE, title_justify="left")
    table.add_column("site", no_wrap=True)
    for name in ("text", "vision", "absmax share", "max / median", "Jaccard"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in _sites(blocks):
        channels = site["channels"]
        jaccard = channels["jaccard"]
        table.add_row(
            name,
            str(len(channels["text"])),
            str(len(channels["vision"])),
            " / ".join(f"{100 * share:.1f} %" for share in channels["absmax_share"]),
            " / ".join(f"{peak:.1f}" for peak in channels["absmax_over_median"]),
            "-" if jaccard is None else f"{jaccard:.2f}",
        )
    return table


def _block_table(blocks: list[dict[str, Any]]) -> Table:
    table = Table(title="Relative error of the blocks' updates", box=box.SIMPLE, title_justify="left")
    for name in ("block", "start", "learned", "integers"):
        table.add_column(name, justify="right")
    for block in blocks:
        errors = block["relative_error"]
        values = (errors.get(key) for key in ("before", "learned", "final"))
        table.add_row(str(block["block"]), *("-" if value is None else f"{value:.5f}" for value in values))
    return table
