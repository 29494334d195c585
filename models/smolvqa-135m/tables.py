"""The tables of the model card and its plot, from results.json and, of a second seed, results-seed1.json.

    python models/smolvqa-135m/tables.py [--plot docs/accuracy-smolvqa-135m.png] [--check]

prints Markdown: the average of the six tasks by method and scheme, every scheme by task, and the ablations. With
`--check` it prints nothing and fails if the card lacks a line of them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from splitq_edge.config import PRESETS
from splitq_edge.evaluate.results import Average, Results, Row, averages
from splitq_edge.evaluate.tasks import TASKS
from splitq_edge.methods.registry import METHODS

FOLDER = Path(__file__).parent
MODEL = "smolvqa-135m"
SCHEMES = tuple(PRESETS)
FLOAT = ("none", "fp32")  # scheme and method
ABLATIONS = {
    "components": "components, one after the other",
    "rules": "rules of channel choice, without correction",
    "mac": "rows that MAC works on",
    "bits": "peers whose group scales give them no fewer bits",
}
SECOND_SEED = "results-seed1.json"  # a file holds rows of one seed


class Table:
    """Rows by scheme and method.

    Args:
        rows: of the results file.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.means = {(mean.scheme, mean.method): mean for mean in averages(rows)}
        self.rows = {(row.scheme, row.method, row.task): row for row in rows}

    def method(self, scheme: str, name: str) -> Average | None:
        """The row of a method; what stands behind its name says how it learned."""
        found = [m for (s, method), m in self.means.items() if s == scheme and method.partition(",")[0] == name]
        return found[0] if found else None

    def overview(self) -> Iterator[str]:
        """Average accuracy and what it is of float's, by method and scheme."""
        base = self.means[FLOAT]
        yield f"Average of the six tasks in %, and what that is of float32's {_percent(base.accuracy, base.stderr)}:"
        yield ""
        yield f"| method | {' | '.join(f'{scheme} | of float' for scheme in SCHEMES)} |"
        yield f"|---|{'---:|' * 2 * len(SCHEMES)}"
        for name in METHODS:
            cells = []
            for scheme in SCHEMES:
                mean = self.method(scheme, name)
                known = mean is not None and mean.retained is not None
                cells += [_percent(mean.accuracy, mean.stderr), f"{100 * mean.retained:.1f}"] if known else ["", ""]
            yield f"| {'**splitq**' if name == 'splitq' else name} | {' | '.join(cells)} |"

    def by_task(self, title: str, means: Sequence[Average]) -> Iterator[str]:
        """Rows with every task."""
        yield f"{title}:"
        yield ""
        yield f"| | {' | '.join(TASKS)} | average | of float | bits | calibration, s |"
        yield f"|---|{'---:|' * (len(TASKS) + 4)}"
        for mean in means:
            rows = [self.rows[mean.scheme, mean.method, task] for task in TASKS]
            cells = [f"{100 * row.accuracy:.1f}" for row in rows]
            cells += [_percent(mean.accuracy, mean.stderr), f"{100 * (mean.retained or 0):.1f}"]
            time = f"{rows[0].calibration_s:.0f}" + ("" if rows[0].calibrated_on == "cpu" else ", GPU")
            name = mean.method.partition(": ")[2] or mean.method
            yield f"| {name} | {' | '.join(cells)} | {mean.effective_bits:.2f} | {time} |"

    def all_tables(self) -> Iterator[str]:
        """Everything, line by line."""
        yield from self.overview()
        for scheme in SCHEMES:
            means = [mean for name in METHODS if (mean := self.method(scheme, name))]
            yield ""
            yield from self.by_task(f"{scheme}, by task", [self.means[FLOAT], *means])
        for name, title in ABLATIONS.items():
            for scheme in SCHEMES:
                means = [mean for (s, method), mean in self.means.items() if s == scheme and method.startswith(name)]
                if means:
                    yield ""
                    yield from self.by_task(f"{scheme}, {title}", means)

    def again(self, other: Table) -> Iterator[str]:
        """Components that another seed has, too: other calibration samples in another order, other questions."""
        yield "Components with another seed (`--seed 1`: other samples, other questions), average and mean KL:"
        yield ""
        yield "| | seed 0 | KL | seed 1 | KL |"
        yield "|---|---:|---:|---:|---:|"
        for (scheme, method), mean in other.means.items():
            if not method.startswith("components"):
                continue
            first = self.means[scheme, method]
            cells = [
                cell
                for table, row in ((self, first), (other, mean))
                for cell in (_percent(row.accuracy, row.stderr), f"{table.kl(scheme, method):.3f}")
            ]
            yield f"| {scheme}, {method.partition(': ')[2]} | {' | '.join(cells)} |"

    def kl(self, scheme: str, method: str) -> float:
        """Mean KL of the six tasks."""
        return statistics.fmean(self.rows[scheme, method, task].kl for task in TASKS)


def _percent(share: float, stderr: float) -> str:
    return f"{100 * share:.2f} ± {100 * stderr:.2f}"


def plot(table: Table, path: Path) -> None:
    """Bars of the average accuracy by scheme and method with standard errors; float32 as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.8 / len(METHODS)
    for number, name in enumerate(METHODS):
        means = [(place, mean) for place, scheme in enumerate(SCHEMES) if (mean := table.method(scheme, name))]
        if not means:
            continue
        axis.bar(
            [place + (number - (len(METHODS) - 1) / 2) * width for place, _ in means],
            [100 * mean.accuracy for _, mean in means],
            width,
            yerr=[100 * mean.stderr for _, mean in means],
            color="tab:red" if name == "splitq" else f"{0.9 - 0.08 * number:.2f}",
            label=name,
        )
    axis.axhline(100 * table.means[FLOAT].accuracy, color="black", linewidth=0.8, label="float32")
    axis.set_xticks(range(len(SCHEMES)), SCHEMES)
    axis.set_ylabel("average accuracy of six tasks, %")
    axis.set_title(f"{MODEL} in ONNX Runtime, native kernels")
    axis.set_ylim(0, 100)
    figure.legend(ncol=9, fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw the averages into this file.")
@click.option("--check", is_flag=True, help="Fail if the card lacks a line of the tables.")
def main(picture: Path | None, check: bool) -> None:
    """Print the tables."""
    table = Table(Results(FOLDER / "results.json", MODEL).rows)
    lines = [*table.all_tables(), "", *table.again(Table(Results(FOLDER / SECOND_SEED, MODEL).rows))]
    if picture is not None:
        plot(table, picture)
    if not check:
        click.echo("\n".join(lines))
        return
    card = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    if missing := [line for line in lines if line not in card]:
        click.echo("the card lacks:\n" + "\n".join(missing), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
