"""`splitq-edge eval`: accuracy and NLL of a checkpoint or an exported folder on a task's held-out questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from splitq_edge.artifacts import EXPORT_FILE, check_writable, write_json
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.commands.export import weights_digest
from splitq_edge.commands.python_ops import use_python_ops
from splitq_edge.config import QuantConfig
from splitq_edge.convert import QuantizedModel, assemble, effective_bits
from splitq_edge.errors import SplitQError
from splitq_edge.evaluate.answers import answers_to, rows_of, same_share, write_answers
from splitq_edge.evaluate.backends import Backend, OrtBackend, TorchBackend, answer_all
from splitq_edge.evaluate.likelihood import load_reference, save_reference
from splitq_edge.evaluate.tasks import Question, load_task, score, task_names
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.targets import TARGET_NAMES, Target

RESULT_SCHEMA = 1


@dataclass(frozen=True)
class EvalOptions:
    """Options of the command, as typed."""

    model: str
    task: str
    backend: str
    limit: int | None
    seed: int
    threads: int
    json: Path | None
    reference: Path | None = None
    save_reference: Path | None = None
    state: Path | None = None
    answers: Path | None = None
    save_answers: Path | None = None
    adapter: Path | None = None
    trust_remote_code: bool = False


def run_eval(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Evaluate on one task or several, print the table, write the JSON if asked; returns the JSON content.

    Raises:
        SplitQError: model, task, backend or limit is not usable.
    """
    for path in (options.json, options.save_reference, options.save_answers):
        if path is not None:
            check_writable(path)
    asked = {name: pick(load_task(name, "test"), options.limit, options.seed) for name in task_names(options.task)}
    questions = [question for part in asked.values() for question in part]
    key = f"{options.task}, {len(questions)} questions, seed {options.seed}"
    references = None if options.reference is None else load_reference(options.reference, key)
    known = None if options.answers is None else answers_to(options.answers, asked)
    backend, scheme, bits = _open(options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{options.task}, {options.backend}", total=len(questions))
        answers = answer_all(
            backend, questions, references=references, progress=lambda done: progress.advance(task, done)
        )
    result: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "model": Path(options.model).name,
        "backend": options.backend,
        "scheme": scheme,
        "effective_bits": bits,
        "tasks": {},
    }
    begin = 0
    for name, part in asked.items():
        result["tasks"][name] = score(part, answers[begin : begin + len(part)])
        begin += len(part)
    if len(asked) > 1:
        result["average"] = average(list(result["tasks"].values()))
    rows = rows_of(asked, answers)
    if known is not None:
        result["same_answers"] = same_share(known, rows)
    console.print(result_table(result))
    if known is not None:
        share = result["same_answers"]
        console.print(f"{100 * share:.2f} % of the answers are those of {options.answers}", soft_wrap=True)
    if options.save_answers is not None:
        write_answers(options.save_answers, rows)
    if options.save_reference is not None:
        save_reference(options.save_reference, key, [answer.top for answer in answers if answer.top is not None])
    if options.json is not None:
        write_json(options.json, result)
    return result


def pick(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """All questions, or `limit` of them drawn at random by the seed, in the task's order.

    Raises:
        SplitQError: limit below 1.
    """
    if limit is None or limit >= len(questions):
        return questions
    if limit < 1:
        raise SplitQError(f"evaluation: expected --limit of 1 or more, got {limit}; raise it")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(questions), generator=generator)[:limit].sort().values.tolist()
    return [questions[index] for index in chosen]


def average(tasks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean accuracy of several tasks, each with the same weight, and its standard error."""
    count = len(tasks)
    accuracy = sum(values["accuracy"] for values in tasks) / count
    return {"accuracy": accuracy, "stderr": math.sqrt(sum(values["stderr"] ** 2 for values in tasks)) / count}


def _open(options: EvalOptions) -> tuple[Backend, str, float]:
    exported = (Path(options.model) / EXPORT_FILE).is_file()
    if options.backend == "torch":
        if exported:
            raise SplitQError(
                f"evaluation: backend torch: expected a checkpoint, {options.model} is an exported folder; "
                "use --backend ort or ort-functions"
            )
        adapter = None if options.adapter is None else str(options.adapter)
        loaded = load_model(options.model, adapter=adapter, trust_remote_code=options.trust_remote_code)
        if options.state is None:
            return TorchBackend(loaded), "none", 32.0
        quantized = simulation(loaded, options.state)
        return TorchBackend(loaded), quantized.config.scheme, effective_bits(quantized.sites)
    for name in ("state", "adapter"):
        if getattr(options, name) is not None:
            raise SplitQError(f"evaluation: --{name}: expected --backend torch, got {options.backend}; leave one out")
    target = Target.parse(options.backend) if options.backend in TARGET_NAMES else None
    native = options.backend == "ort"
    backend = OrtBackend(Path(options.model), native=native, threads=options.threads, target=target)
    if options.backend == "pyops":
        use_python_ops(backend.model)
    manifest = backend.model.manifest
    return backend, manifest["scheme"], manifest["effective_bits"]


def simulation(loaded: LoadedModel, folder: Path) -> QuantizedModel:
    """Put the sites of a finished calibration into a model: what torch says that an export computes.

    Args:
        loaded: the float model, changed in place.
        folder: state folder that `export --keep-state` left.

    Raises:
        SplitQError: no calibration there, one that is not finished, or one of other weights.
    """
    state = CalibrationState.recorded(folder)
    if state.finished() != loaded.block_count:
        raise SplitQError(
            f"calibration state {folder}: expected {loaded.block_count} finished blocks, got {state.finished()}; "
            "finish it with export --resume"
        )
    if state.header["weights"] != weights_digest(loaded):
        name = loaded.source if loaded.lora is None else f"{loaded.base} with the adapter {loaded.lora}"
        raise SplitQError(f"calibration state {folder}: expected that of {name}, got one of other weights")
    return assemble(loaded, QuantConfig.from_dict(state.header["recipe"]), state)


def result_table(result: dict[str, Any]) -> Table:
    """Accuracy, NLL and divergence with their standard errors, accuracy also by question type."""
    title = f"{result['model']}, {result['backend']}, {result['scheme']}, {result['effective_bits']:.2f} effective bits"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    fidelity = any("kl" in values for values in result["tasks"].values())
    for name in ("task", "type", "n", "accuracy", "NLL a token", *(["KL a token"] if fidelity else [])):
        table.add_column(name, justify="left" if name in ("task", "type") else "right", min_width=8)
    for task, values in result["tasks"].items():
        accuracy = f"{100 * values['accuracy']:.2f} % +- {100 * values['stderr']:.2f}"
        nll = f"{values['nll']:.5f} +- {values['nll_stderr']:.5f}"
        kl = [f"{values['kl']:.3g} +- {values['kl_stderr']:.1g}"] if "kl" in values else []
        table.add_row(task, "all", str(values["n"]), accuracy, nll, *kl)
        for kind, part in values["types"].items():
            table.add_row("", kind, str(part["n"]), f"{100 * part['accuracy']:.2f} %", "")
    if "average" in result:
        mean = result["average"]
        table.add_row("average", "", "", f"{100 * mean['accuracy']:.2f} % +- {100 * mean['stderr']:.2f}", "")
    return table
