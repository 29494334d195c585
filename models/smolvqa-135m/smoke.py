"""A fixed slice of smolvqa-135m's accuracy table, held against what it was.

    python models/smolvqa-135m/smoke.py build/models/smolvqa-135m --work build/smoke

measures the float model and two recipes (nothing is learned, so that machines agree) on the tasks that need no
download, and compares accuracy and NLL with smoke.json beside this script. Exits with 1 if a number is further off than
`ACCURACY` or `NLL` allow. `--record` writes smoke.json instead.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from splitq_edge.artifacts import write_bytes
from splitq_edge.commands.table import Measurement, TableOptions, method_rows, run_table
from splitq_edge.config import preset
from splitq_edge.evaluate.results import Results, Row

HERE = Path(__file__).resolve().parent
RECORD = HERE / "smoke.json"
TASKS = "easyvqa,ocr,counting,spatial"
QUESTIONS = 50  # a task
SAMPLES = 16
# Processors round differently, which tips a few answers; a broken step moves far more.
ACCURACY = 0.06  # three answers of a task
NLL = 0.05  # relative, and as much of a nat as below
NLL_FLOOR = 0.01


def rows() -> list[Measurement]:
    """Float, the simplest method, and SplitQ without learning."""
    config = preset("W4A4")
    config = replace(config, learning=replace(config.learning, epochs=0))
    return [*method_rows(("rtn",), ("W4A8",)), Measurement("splitq, 0 epochs", "W4A4", config)]


def off(expected: Row, measured: Row) -> bool:
    """Whether a row moved further than rounding explains."""
    allowed = NLL_FLOOR + NLL * expected.nll
    return abs(measured.accuracy - expected.accuracy) > ACCURACY or abs(measured.nll - expected.nll) > allowed


@click.command(help=__doc__)
@click.argument("model")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/smoke"), show_default=True)
@click.option("--record", is_flag=True, help="Write smoke.json.")
def main(model: str, work: Path, record: bool) -> None:
    """Measure and compare."""
    if not record and not RECORD.is_file():
        raise click.ClickException(f"{RECORD}: expected what to compare with, found none; make it with --record")
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    measured_path = work / "results.json"
    measured_path.unlink(missing_ok=True)
    options = TableOptions(model, measured_path, TASKS, work, limit=QUESTIONS, calib_samples=SAMPLES)
    if run_table(options, rows(), Console(quiet=True)):
        raise click.ClickException("rows could not be measured; `splitq-edge table` tells why")
    if record:
        write_bytes(RECORD, measured_path.read_bytes())
    name = Path(model).resolve().name
    measured = Results(measured_path, name)
    expected = Results(RECORD, name)
    table = Table(title=f"{name}, {QUESTIONS} questions a task", box=box.SIMPLE, title_justify="left")
    for column in ("scheme", "method", "task", "accuracy %", "was", "NLL", "was", ""):
        table.add_column(column)
    failed = len(measured.rows) != len(expected.rows)
    for row in measured.rows:
        was = expected.get(row.key)
        moved = was is None or off(was, row)
        failed = failed or moved
        before = ("-", "-") if was is None else (f"{100 * was.accuracy:.0f}", f"{was.nll:.4f}")
        table.add_row(
            row.scheme,
            row.method,
            row.task,
            f"{100 * row.accuracy:.0f}",
            before[0],
            f"{row.nll:.4f}",
            before[1],
            "moved" if moved else "",
        )
    console.print(table)
    if failed:
        console.print("accuracy moved; mend it, or record anew with --record and say why", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
