"""`splitq-edge table`: export a model with several methods and schemes, measure each on held-out questions of tasks."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from splitq_edge.artifacts import check_target
from splitq_edge.calibration.data import check_count
from splitq_edge.commands.evaluate import EvalOptions, pick, run_eval
from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.config import QuantConfig, preset
from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.results import Key, Results, Row, render, render_markdown
from splitq_edge.evaluate.tasks import load_task, task_names
from splitq_edge.loading import check_model
from splitq_edge.methods.ablation import ablation_recipes
from splitq_edge.methods.registry import method_config
from splitq_edge.runtime_ops.session import require_native

logger = logging.getLogger(__name__)

FLOAT = ("fp32", "none")  # method and scheme of the first row
BACKEND = "ort-native"


@dataclass(frozen=True)
class TableOptions:
    """What is common to the rows of a table.

    Attributes:
        model: folder or hub id.
        results: JSON file of the rows.
        task: built-in tasks as `task_names` reads them, also the calibration data.
        work: folder for the exports.
        states: folder that keeps the calibrations, each in a folder of its own; one begun there is gone on with. None
            keeps none.
        limit: questions to ask, None for all.
        calib_samples: samples to calibrate with.
        seed: of samples and draw.
        redo: measure the rows of the file again.
        keep: keep the exports.
        markdown: print the table in Markdown.
    """

    model: str
    results: Path
    task: str
    work: Path
    states: Path | None = None
    limit: int | None = None
    calib_samples: int = 128
    seed: int = 0
    redo: bool = False
    keep: bool = False
    markdown: bool = False


@dataclass(frozen=True)
class Measurement:
    """A row to measure.

    Attributes:
        method: its label.
        scheme: its scheme.
        config: its recipe, None for the float model.
    """

    method: str
    scheme: str
    config: QuantConfig | None

    @property
    def is_float(self) -> bool:
        """Whether this is the float model, the reference of the others."""
        return self.config is None


def method_rows(
    methods: tuple[str, ...],
    schemes: tuple[str, ...],
    *,
    epochs: int | None = None,
    transform_lr: float | None = None,
) -> list[Measurement]:
    """The float model, then every method at every scheme.

    Args:
        methods: names of the registry.
        schemes: presets.
        epochs: of the methods that learn, instead of the preset's; their labels say so.
        transform_lr: likewise the peak learning rate of their transforms.
    """
    rows = [Measurement(*FLOAT, None)]
    for scheme in schemes:
        for method in methods:
            config, suffix = method_config(method, preset(scheme)), ""
            if config.learning.epochs:
                config, suffix = _learning(config, epochs, transform_lr)
            rows.append(Measurement(method + suffix, scheme, config))
    return rows


def _learning(config: QuantConfig, epochs: int | None, transform_lr: float | None) -> tuple[QuantConfig, str]:
    """A recipe that learns otherwise than its preset, and what its label says of that."""
    learning, suffix = config.learning, ""
    if epochs is not None:
        learning, suffix = replace(learning, epochs=epochs), f", {epochs} epochs"
    if transform_lr is not None and learning.epochs:
        learning = replace(learning, transform_lr=transform_lr)
        suffix += f"{' at' if suffix else ', learning rate'} {transform_lr:g}"
    return replace(config, learning=learning), suffix


def ablation_rows(
    table: str,
    scheme: str,
    *,
    epochs: int | None,
    transform_lr: float | None,
    transform: str | None,
    rounding: str | None,
) -> list[Measurement]:
    """The float model, then the rows of one of the paper's ablations, see `methods.ablation`.

    Args:
        table: "components", "rules", "mac" or "options".
        scheme: a preset.
        epochs: instead of the preset's; 0 learns nothing.
        transform_lr: instead of the preset's.
        transform: instead of the preset's.
        rounding: instead of the preset's.
    """
    config, label = _learning(preset(scheme), epochs, transform_lr)
    if transform is not None:
        config = replace(config, transform=transform)
        label += f", {transform}"
    if rounding is not None:
        config = replace(config, rounding=rounding)
    labelled = []
    for name, recipe in ablation_recipes(config, table).items():
        suffix = label if rounding != recipe.rounding else f"{label}, {rounding}"  # some rows have their own
        labelled.append(Measurement(f"{table}: {name}{suffix}", scheme, recipe))
    return [Measurement(*FLOAT, None), *labelled]


def run_table(options: TableOptions, rows: list[Measurement], console: Console) -> int:
    """Measure the rows that the results file lacks and print them all; returns how many could not be measured.

    A row of the file is measured again with `redo`; the float model's also if other rows wait and its answers, which
    they are compared with, are not in the work folder.

    Raises:
        SplitQError: nothing can be measured: no native library, an unusable model, results file, task, limit, number of
            samples, or a row of the file was measured with other questions, samples or another seed.
    """
    require_native()
    check_count(options.calib_samples)
    check_model(options.model)
    results = Results(options.results, Path(options.model).resolve().name)
    tasks = task_names(options.task)
    wanted = {task: len(pick(load_task(task, "test"), options.limit, options.seed)) for task in tasks}
    _make_folder(options.work)
    # By what is asked, too: tables of other questions share the folder.
    references = {
        task: options.work / f"{results.model}-{task}-{count}-seed{options.seed}.reference.npz"
        for task, count in wanted.items()
    }
    failed = 0
    if not options.redo:
        for task in tasks:
            _check_rows(options, results, {_key(row, task) for row in rows}, wanted[task])
    kept = set() if options.redo else {row.key for row in results.rows}
    waiting = [row for row in rows if any(_key(row, task) not in kept for task in tasks)]
    known = all(reference.exists() for reference in references.values())
    again = [] if not waiting or known else [row for row in rows if row.is_float and row not in waiting]
    for wanted_row in rows:
        method, scheme = wanted_row.method, wanted_row.scheme
        label = f"{method} {scheme}"
        if wanted_row not in waiting and wanted_row not in again:
            console.print(f"{label}: kept", highlight=False)
            continue
        start = time.monotonic()
        try:
            measured = _measure(options, wanted_row, references)
        except Exception as error:  # one method's failure, of whatever kind, must not cost the other rows
            failed += 1
            logger.debug("%s", label, exc_info=True)
            line = f"error: {label}: {_reason(error)}"
            console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
            continue
        for row in measured:
            results.put(row)
            name = f"{label}, {row.task}" if len(tasks) > 1 else label
            console.print(
                f"{name}: accuracy {100 * row.accuracy:.2f} %, NLL {row.nll:.4g}, KL {row.kl:.3g}, "
                f"{time.monotonic() - start:.0f} s",
                highlight=False,
            )
    if options.markdown:
        console.out(render_markdown(results), end="", highlight=False)
    else:
        console.print(render(results))
    return failed


def _check_rows(options: TableOptions, results: Results, keys: set[Key], questions: int) -> None:
    """Refuse to mix rows of this run with rows measured otherwise, or to replace those."""
    for row in (row for row in results.rows if row.key in keys):
        settings: list[tuple[str, int, int]] = [("questions", row.n, questions)]
        if (row.method, row.scheme) != FLOAT:
            settings.append(("calibration samples", row.calib_samples, options.calib_samples))
            settings.append(("seed", row.seed, options.seed))
        for name, stored, asked in settings:
            if stored != asked:
                raise SplitQError(
                    f"results {options.results}: expected rows with {name} {asked}, got {row.method} {row.scheme} with "
                    f"{stored}; choose another file, or --redo to replace the rows"
                )


def _key(row: Measurement, task: str) -> tuple[str, str, str, str]:
    return row.method, row.scheme, BACKEND, task


def _measure(options: TableOptions, wanted: Measurement, references: dict[str, Path]) -> list[Row]:
    """Export in a folder of its own, evaluate, and delete the folder whatever happens."""
    label = re.sub(r"[^\w+-]+", "-", wanted.method)
    name = f"{Path(options.model).resolve().name}-{label}-{wanted.scheme}"
    if options.keep:
        check_target(options.work / name, force=True)
    folder = options.work / f".{name}"
    shutil.rmtree(folder, ignore_errors=True)  # of a table that was killed
    try:
        folder.mkdir()
        rows = _export_and_evaluate(options, wanted, folder / name, references)
        if options.keep:
            shutil.rmtree(options.work / name, ignore_errors=True)
            (folder / name).rename(options.work / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _export_and_evaluate(
    options: TableOptions, wanted: Measurement, out: Path, references: dict[str, Path]
) -> list[Row]:
    quiet = Console(quiet=True)
    export = ExportOptions(
        model=options.model,
        out=out,
        scheme=wanted.scheme,
        calib=options.task,
        calib_samples=options.calib_samples,
        seed=options.seed,
    )
    if options.states is not None and wanted.config is not None:
        folder = options.states / _state_name(options, wanted.config)
        export = replace(export, state=folder, resume=True, keep_state=True)
    exported = run_export(export, quiet, wanted.config)
    rows = []
    for task, reference in references.items():
        asked = EvalOptions(str(out), task, "ort", limit=options.limit, seed=options.seed, threads=0, json=None)
        asked = replace(asked, save_reference=reference) if wanted.is_float else replace(asked, reference=reference)
        rows.append(_row(options, wanted, task, run_eval(asked, quiet), exported))
    return rows


def _state_name(options: TableOptions, config: QuantConfig) -> str:
    """Folder of a calibration: by all that its integers depend on, so that rows of one recipe share it."""
    depends = [Path(options.model).resolve().name, options.task, options.calib_samples, options.seed, config.to_dict()]
    digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
    return f"{config.method}-{config.scheme}-{digest[:12]}"


def _row(
    options: TableOptions, wanted: Measurement, task: str, result: dict[str, Any], exported: dict[str, Any]
) -> Row:
    values = result["tasks"][task]
    return Row(
        method=wanted.method,
        scheme=wanted.scheme,
        backend=BACKEND,
        task=task,
        n=values["n"],
        accuracy=values["accuracy"],
        stderr=values["stderr"],
        nll=values["nll"],
        effective_bits=result["effective_bits"],
        calibration_s=exported["calibration_s"],
        nll_stderr=values["nll_stderr"],
        kl=values.get("kl", 0.0),
        kl_stderr=values.get("kl_stderr", 0.0),
        calib_samples=options.calib_samples,
        seed=options.seed,
        calibrated_on=exported["calibrated_on"],
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SplitQError(
            f"work folder {folder}: expected a writable place ({error.strerror}); choose another"
        ) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, SplitQError) else f"{type(error).__name__}: {text}"
