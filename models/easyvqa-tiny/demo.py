"""The quick start: export easyvqa-tiny at W4A8, ask it three questions in every engine, measure its accuracy.

Run by `make demo`. Writes only to the folder given by --work.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from splitq_edge.evaluate.tasks import Question

# The processor's advice about packages that this model does not need would stand between the demo's lines.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HERE = Path(__file__).resolve().parent
SCHEME = "W4A8"
QUESTIONS = 3


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
@click.option("--limit", default=1000, show_default=True, help="Held-out questions in the accuracy table.")
def main(work: Path, limit: int) -> None:
    """Export, answer, measure."""
    from splitq_edge import runtime_ops
    from splitq_edge.commands.console import make_console

    console = make_console()
    model = os.path.relpath(HERE)
    float_folder, folder = work / "easyvqa-tiny-float", work / f"easyvqa-tiny-{SCHEME}"
    _export(console, model, float_folder, "none")
    _export(console, model, folder, SCHEME)
    native = runtime_ops.library_path() is not None
    if not native:
        console.print("no native library here: the rows of the native kernels are left out")
    same = _answers(console, model, folder, native=native)
    _table(console, model, float_folder, folder, native=native, limit=limit)
    if not same:
        console.print("the two ONNX Runtime paths gave different text: this is a bug")
        sys.exit(1)


def _export(console: Console, model: str, out: Path, scheme: str) -> None:
    from splitq_edge.commands.export import ExportOptions, run_export

    command = f"splitq-edge export {model} {out} --scheme {scheme} --force"
    console.print(f"\n$ {command}", style="bold", highlight=False, soft_wrap=True)
    options = ExportOptions(
        model=model,
        out=out,
        scheme=scheme,
        recipe=None,
        calib="easyvqa",
        calib_samples=128,
        flavour="portable",
        seed=0,
        force=True,
        revision=None,
    )
    shutil.rmtree(options.state_folder, ignore_errors=True)  # of a demo that was stopped
    run_export(options, console)


def _answers(console: Console, model: str, folder: Path, *, native: bool) -> bool:
    """Print the answers of every engine; returns whether the two ONNX Runtime paths agree."""
    from splitq_edge.evaluate.backends import OrtBackend, TorchBackend, answer_all
    from splitq_edge.evaluate.tasks import load_task

    questions = load_task("easyvqa", "test")
    chosen: list[Question] = []
    for kind in sorted({question.type for question in questions})[:QUESTIONS]:
        seen = {question.image for question in chosen}
        chosen.append(next(q for q in questions if q.type == kind and q.image not in seen))
    engines = {
        "torch FP32": TorchBackend(model),
        f"ORT {SCHEME} bodies": OrtBackend(folder, native=False),
    }
    if native:
        engines[f"ORT {SCHEME} native"] = OrtBackend(folder, native=True)
    answers = {name: [a.text for a in answer_all(backend, chosen)] for name, backend in engines.items()}
    table = Table(title="Three held-out questions", box=box.SIMPLE, title_justify="left")
    for name in ("image", "question", "right answer", *answers):
        table.add_column(name)
    for index, question in enumerate(chosen):
        given = [texts[index] for texts in answers.values()]
        table.add_row(question.image.name, question.text, question.answer, *given)
    console.print(table)
    ort = [texts for name, texts in answers.items() if name.startswith("ORT")]
    return all(texts == ort[0] for texts in ort)


def _table(console: Console, model: str, float_folder: Path, folder: Path, *, native: bool, limit: int) -> None:
    from splitq_edge.commands.evaluate import EvalOptions, run_eval

    rows = [("torch FP32", model, "torch"), ("ORT FP32", str(float_folder), "ort-functions")]
    rows.append(
        (f"ORT {SCHEME} native", str(folder), "ort") if native else (f"ORT {SCHEME}", str(folder), "ort-functions")
    )
    table = Table(title=f"easyvqa-tiny, {limit} held-out questions", box=box.SIMPLE, title_justify="left")
    for name in ("engine", "accuracy", "shape", "color", "yes/no", "all graphs", "decoder", "eff. bits"):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    quiet = Console(quiet=True)
    for label, source, backend in rows:
        options = EvalOptions(source, "easyvqa", backend, limit=limit, seed=0, threads=0, json=None)
        result = run_eval(options, quiet)
        task = result["tasks"]["easyvqa"]
        kinds = [f"{100 * task['types'][kind]['accuracy']:.1f} %" for kind in ("shape", "color", "yesno")]
        accuracy = f"{100 * task['accuracy']:.2f} % +- {100 * task['stderr']:.2f}"
        sizes = _sizes(Path(source)) if backend != "torch" else ("-", "-")
        table.add_row(label, accuracy, *kinds, *sizes, f"{result['effective_bits']:.2f}")
    console.print(table)


def _sizes(folder: Path) -> tuple[str, str]:
    return _megabytes(folder.glob("*.onnx*")), _megabytes(folder.glob("decoder.onnx*"))


def _megabytes(files: object) -> str:
    return f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB"  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
