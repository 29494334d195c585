"""A results file: one row for every method, scheme, backend and task that was measured, and how the rows are shown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from splitq_edge.artifacts import check_writable, write_json
from splitq_edge.errors import ArtifactError, SplitQError

RESULTS_SCHEMA = 1
Key = tuple[str, str, str, str]
COLUMNS = ("scheme", "method", "n", "accuracy %", "NLL", "KL", "bits", "calib. s")
AVERAGE_COLUMNS = ("scheme", "method", "accuracy %", "of float %", "bits")
LEFT = ("scheme", "method")


@dataclass(frozen=True)
class Row:
    """One measurement, rounded as it is stored.

    Attributes:
        method: quantization method, "fp32" for the float model.
        scheme: label such as "W4A8", "none" for the float model.
        backend: what ran the model, for example "ort-native".
        task: name of the task.
        n: questions asked.
        accuracy: share of exact matches.
        stderr: its standard error.
        nll: mean negative log-likelihood of a token of the right answers, in nats.
        effective_bits: stored bits a weight of the quantized linears.
        calibration_s: wall time of calibration in seconds.
        nll_stderr: standard error of `nll`.
        kl: mean Kullback-Leibler divergence of the float model's distribution from this model's at the tokens of the
            right answers, in nats.
        kl_stderr: its standard error.
        calib_samples: calibration samples.
        seed: of the calibration.
        calibrated_on: kind of device that `calibration_s` is of, "cpu" or "cuda".
    """

    method: str
    scheme: str
    backend: str
    task: str
    n: int
    accuracy: float
    stderr: float
    nll: float
    effective_bits: float
    calibration_s: float
    nll_stderr: float = 0.0
    kl: float = 0.0
    kl_stderr: float = 0.0
    calib_samples: int = 128
    seed: int = 0
    calibrated_on: str = "cpu"

    def __post_init__(self) -> None:
        for name, rounded in (
            ("accuracy", round(float(self.accuracy), 6)),
            ("stderr", round(float(self.stderr), 6)),
            *((name, float(f"{getattr(self, name):.6g}")) for name in ("nll", "nll_stderr", "kl", "kl_stderr")),
            ("effective_bits", round(float(self.effective_bits), 4)),
            ("calibration_s", round(float(self.calibration_s), 1)),
        ):
            object.__setattr__(self, name, rounded)

    @property
    def key(self) -> Key:
        """What a results file holds once."""
        return self.method, self.scheme, self.backend, self.task


class Results:
    """The rows of one model, in a file that is whole after every row.

    Args:
        path: the JSON file; it is made with the first row.
        model: name of the model.

    Raises:
        SplitQError: the place cannot be written, or the file holds another model's rows.
        ArtifactError: the file is no results file, or one of a newer schema.
    """

    def __init__(self, path: Path, model: str) -> None:
        check_writable(path)
        self.path = path
        self.model = model
        self._rows = {row.key: row for row in _read(path, model)} if path.exists() else {}

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they came."""
        return list(self._rows.values())

    def get(self, key: Key) -> Row | None:
        """The row of this key, if it was measured."""
        return self._rows.get(key)

    def put(self, row: Row) -> None:
        """Add a row, or replace the one of the same key, and write the file; rows that others added to it stay.

        Raises:
            SplitQError: the place cannot be written, or the file now holds another model's rows.
            ArtifactError: the file is no results file any more.
        """
        if self.path.exists():
            self._rows |= {other.key: other for other in _read(self.path, self.model)}
        self._rows[row.key] = row
        rows = [dataclasses.asdict(row) for row in self._rows.values()]
        write_json(self.path, {"schema": RESULTS_SCHEMA, "model": self.model, "rows": rows})


def _read(path: Path, model: str) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, found = content["schema"], content["model"]
        if not isinstance(schema, int) or schema > RESULTS_SCHEMA:
            raise ArtifactError(
                f"results {path}: expected schema {RESULTS_SCHEMA} or older, got {schema!r}; upgrade splitq-edge"
            )
        rows = [Row(**values) for values in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"results {path}: expected a results file ({error!r}); choose another file") from error
    if found != model:
        raise SplitQError(f"results {path}: expected rows of model {model}, got {found!r}; choose another file")
    return rows


@dataclass(frozen=True)
class Average:
    """What a method keeps of the float model over several tasks, each with the same weight.

    Attributes:
        scheme, method: of the rows.
        accuracy: mean of the tasks' accuracies.
        stderr: its standard error.
        retained: `accuracy` over the float model's, None without it.
        effective_bits: of the rows.
    """

    scheme: str
    method: str
    accuracy: float
    stderr: float
    retained: float | None
    effective_bits: float


def averages(rows: Sequence[Row]) -> list[Average]:
    """Means over the tasks, of the methods that were measured on all of them; none where there is one task only."""
    tasks = {row.task for row in rows}
    if len(tasks) < 2:
        return []
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.scheme, row.method), []).append(row)
    whole = {key: part for key, part in found.items() if {row.task for row in part} == tasks}
    means = {key: sum(row.accuracy for row in part) / len(part) for key, part in whole.items()}
    base = means.get(("none", "fp32"))
    return [
        Average(
            *key,
            means[key],
            math.sqrt(sum(row.stderr**2 for row in part)) / len(part),
            means[key] / base if base else None,
            part[0].effective_bits,
        )
        for key, part in whole.items()
    ]


def render(results: Results) -> Group:
    """Tables for a terminal, one for each task and backend, and one of the averages where there are several tasks."""
    tables = [_table(title, COLUMNS, map(_cells, rows)) for title, rows in _groups(results)]
    tables += [_table(title, AVERAGE_COLUMNS, map(_average_cells, rows)) for title, rows in _averages(results)]
    return Group(*tables)


def _table(title: str, columns: Sequence[str], rows: Iterable[list[Any]]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


def render_markdown(results: Results) -> str:
    """The same in Markdown."""
    lines: list[str] = []
    tables: list[tuple[str, Sequence[str], list[list[Any]]]] = []
    tables += [(title, COLUMNS, list(map(_cells, rows))) for title, rows in _groups(results)]
    tables += [(title, AVERAGE_COLUMNS, list(map(_average_cells, rows))) for title, rows in _averages(results)]
    for title, columns, cells in tables:
        rule = ["---" if name in LEFT else "---:" for name in columns]
        lines += ["", title, ""] if lines else [title, ""]
        lines += [f"| {' | '.join(line)} |" for line in (columns, rule, *cells)]
    return "\n".join(lines) + "\n"


def _groups(results: Results) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each task and backend; rows of one scheme stand together."""
    schemes = list(dict.fromkeys(row.scheme for row in results.rows))
    for task, backend in dict.fromkeys((row.task, row.backend) for row in results.rows):
        rows = [row for row in results.rows if (row.task, row.backend) == (task, backend)]
        yield f"{results.model}, {task}, {backend}", sorted(rows, key=lambda row: schemes.index(row.scheme))


def _averages(results: Results) -> Iterator[tuple[str, list[Average]]]:
    """Means over the tasks for each backend; rows of one scheme stand together."""
    schemes = list(dict.fromkeys(row.scheme for row in results.rows))
    for backend in dict.fromkeys(row.backend for row in results.rows):
        rows = [row for row in results.rows if row.backend == backend]
        means = sorted(averages(rows), key=lambda mean: schemes.index(mean.scheme))
        if means:
            yield f"{results.model}, average of {len({row.task for row in rows})} tasks, {backend}", means


def _average_cells(mean: Average) -> list[Any]:
    return [
        mean.scheme,
        mean.method,
        f"{100 * mean.accuracy:.2f} ± {100 * mean.stderr:.2f}",
        "" if mean.retained is None else f"{100 * mean.retained:.1f}",
        f"{mean.effective_bits:.2f}",
    ]


def _cells(row: Row) -> list[Any]:
    return [
        row.scheme,
        row.method,
        str(row.n),
        f"{100 * row.accuracy:.2f} ± {100 * row.stderr:.2f}",
        f"{row.nll:.4g}",
        f"{row.kl:.2g}",
        f"{row.effective_bits:.2f}",
        f"{row.calibration_s:.0f}" + ("" if row.calibrated_on == "cpu" else f" ({row.calibrated_on})"),
    ]
