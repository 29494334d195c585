"""Questions of easyvqa-tiny through static graphs on the CPU and through compiled context files, beside native W4A8.

    python tests/qnn_accuracy.py --work build/qnn-accuracy

exports easyvqa-tiny once in the portable flavour and, from the same calibration, as static graphs: with 16-bit
activations, compiled for each target, and with 8-bit ones, once for every rule of ranges. Then each engine is asked the
same held-out questions as a user asks them: the picture through the vision encoder, the prompt in chunks, the answer
token by token, no node of a compiled graph on the CPU. Prints a table; exits with 1 if an engine is more than `POINTS`
behind the native kernels. On x86-64 the NPU is an emulator that takes about a second a call: every answer goes to a
file at once, `--resume` goes on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from builders import CLOSED_FORM
from rich import box
from rich.console import Console
from rich.table import Table

from splitq_edge.commands.compile import run_compile
from splitq_edge.commands.console import make_console
from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.config import RANGE_METHODS, preset
from splitq_edge.evaluate.likelihood import force
from splitq_edge.evaluate.prompts import Prompts
from splitq_edge.evaluate.tasks import Answer, Question, load_task, score
from splitq_edge.runtime_ops.generate import load_processor, open_image
from splitq_edge.runtime_ops.open_model import open_model
from splitq_edge.runtime_ops.session import ExportedModel, require_native
from splitq_edge.targets import TARGET_NAMES, Target

MODEL = Path(__file__).resolve().parents[1] / "models" / "easyvqa-tiny"
SAMPLES, CONTEXT, CHUNK = 32, 128, 96
POINTS = 3.0
NATIVE = "native kernels"
STATIC = "qdq16-minmax"  # the export that is compiled


@dataclass(frozen=True)
class Engine:
    """Something that is asked.

    Attributes:
        name: in the table.
        folder: the export's name in the work folder.
        target: the NPU, None for the CPU.
    """

    name: str
    folder: str
    target: Target | None = None

    def open(self, work: Path) -> ExportedModel:
        """The model; compiled first where that is needed."""
        out = work / self.folder
        if self.target is not None and not (out / self.target.folder / "compiled.json").is_file():
            list(run_compile(out, self.target))
        return open_model(out, native=self.name == NATIVE, threads=1, target=self.target)

    def answers(self, work: Path) -> Path:
        """File of the answers so far, one JSON line each."""
        return work / "answers" / f"{re.sub('[^a-z0-9]+', '-', self.name)}.jsonl"


def engines(targets: list[str]) -> list[Engine]:
    """All rows of the table, the one to compare with first."""
    by_range = [Engine(f"qdq, 8 bits, {ranges}", f"qdq8-{ranges}") for ranges in RANGE_METHODS]
    npus = [Engine(f"qdq, 16 bits, {name}", STATIC, Target.parse(name)) for name in targets]
    return [Engine(NATIVE, "portable"), Engine("qdq, 16 bits", STATIC), *by_range, *npus]


def export_all(work: Path, console: Console) -> None:
    """Every export, all from one calibration."""
    config = replace(preset("W4A8"), learning=CLOSED_FORM)
    static = {"context": CONTEXT, "chunk": CHUNK}
    flavours: list[tuple[str, dict[str, Any]]] = [("portable", {}), (STATIC, static)]
    flavours += [(f"qdq8-{ranges}", {**static, "ranges": ranges, "activation_bits": 8}) for ranges in RANGE_METHODS]
    for name, settings in flavours:
        if (work / name).is_dir():
            continue
        console.print(f"export {name}")
        options = ExportOptions(
            str(MODEL),
            work / name,
            calib_samples=SAMPLES,
            flavour="qdq" if settings else "portable",
            layout="flat",
            state=work / "calibration",
            keep_state=True,
            resume=(work / "calibration").is_dir(),
            static=settings,
        )
        run_export(options, Console(quiet=True), config)


class Asker:
    """Asks a model as generation does: one call a chunk of the prompt, then one a token."""

    def __init__(self, model: ExportedModel) -> None:
        self.model = model
        self._prompts = Prompts(load_processor(model.folder), model.manifest["eos_token_ids"])
        self._picture: tuple[Path, np.ndarray] | None = None

    def ask(self, question: Question) -> Answer:
        """The greedy answer, as far as it is the right one, and the likelihood of the right one."""
        answer = self._prompts.answer(question.text, question.answer)
        ids = self._prompts.prompt(question.text, open_image(question.image))
        logits, cache, seen = [], self.model.empty_cache(1), 0
        features = self._features(question.image)
        for piece in [ids, *([token] for token in answer[:-1])]:
            seen += len(piece)
            embeds, modality = self.model.embed(np.array([piece], np.int64), features if piece is ids else features[:0])
            mask = np.ones((1, seen), np.int64)
            last, cache = self.model.decode(embeds, modality, mask, cache, logits_to_keep=1)
            logits.append(last)
        forced = force(np.concatenate(logits, 1), [answer], self.model.manifest["image_token_id"])[0]
        said = forced.greedy[: forced.same + 1]
        text = str(self._prompts.processor.decode(said, skip_special_tokens=True)).strip()
        return Answer(text, forced.nll, len(answer))

    def _features(self, image: Path) -> np.ndarray:
        """Of the questions' picture; those of one picture follow each other."""
        if self._picture is None or self._picture[0] != image:
            pixels = self.model.image_layout.pictures(self._prompts.encode("", open_image(image)))
            self._picture = image, self.model.encode_images(pixels)
        return self._picture[1]


def ask_all(engine: Engine, questions: list[Question], work: Path) -> list[Answer]:
    """The answers of an engine; those that its file holds are kept."""
    path = engine.answers(work)
    known = [Answer(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
    if len(known) >= len(questions):
        return known[: len(questions)]
    asker = Asker(engine.open(work))
    with path.open("a") as file:
        for question in questions[len(known) :]:
            answer = asker.ask(question)
            file.write(json.dumps({"text": answer.text, "nll": answer.nll, "tokens": answer.tokens}) + "\n")
            file.flush()
            known.append(answer)
    return known


def report(rows: dict[str, list[Answer]], questions: list[Question]) -> tuple[Table, bool]:
    """The table, and whether every engine is near enough to the native kernels."""
    table = Table(title=f"easyvqa-tiny W4A8, {len(questions)} held-out questions", box=box.SIMPLE, title_justify="left")
    for column in ("engine", "n", "right", "accuracy", "NLL a token", "as native"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    base: Any = score(questions, rows[NATIVE])
    near = True
    for name, answers in rows.items():
        values: Any = score(questions, answers)
        same = sum(mine.text == other.text for mine, other in zip(answers, rows[NATIVE], strict=True))
        right, count = round(values["accuracy"] * values["n"]), values["n"]
        share = f"{100 * values['accuracy']:.1f} %"
        table.add_row(name, str(count), str(right), share, f"{values['nll']:.2e}", str(same))
        near = near and 100 * (base["accuracy"] - values["accuracy"]) <= POINTS
    return table, near


def _targets(_context: click.Context, _option: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in TARGET_NAMES:
            raise click.BadParameter(f"expected names out of {', '.join(TARGET_NAMES)}, got '{name}'.")
    return names


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/qnn-accuracy"), show_default=True)
@click.option("--targets", default=",".join(TARGET_NAMES), show_default=True, callback=_targets, help="Empty: none.")
@click.option("--limit", default=200, show_default=True, type=click.IntRange(min=1), help="Held-out questions.")
@click.option("--resume", is_flag=True, help="Keep exports, compiled files and answers of an earlier run.")
def main(work: Path, targets: list[str], limit: int, resume: bool) -> None:
    """Export, compile, ask, compare."""
    require_native()
    console = make_console()
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    (work / "answers").mkdir(parents=True, exist_ok=True)
    export_all(work, console)
    questions = load_task("easyvqa", "test")[:limit]
    rows = {}
    for engine in engines(targets):
        console.print(f"ask {engine.name}")
        rows[engine.name] = ask_all(engine, questions, work)
    table, near = report(rows, questions)
    console.print(table)
    if not near:
        console.print(f"an engine is more than {POINTS:.0f} points behind the native kernels", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
