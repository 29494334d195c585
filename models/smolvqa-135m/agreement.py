"""How many answers do torch's simulation and the exported model share, and how many can two runs share at all?

    splitq-edge export build/models/smolvqa-135m OUT --calib all --scheme W3A2 --keep-state
    python models/smolvqa-135m/agreement.py build/models/smolvqa-135m OUT OUT.calibration --limit 200

Both hold the same integers but add floats in another order. At few bits such a difference of the last digit may tip an
activation's code, which moves everything behind it. So the exported model also answers with its embeddings *nudged*,
every number times 1 + NUDGE x (a normal random one): what it then still shares with itself is what two right
implementations can be expected to share. Answers are compared letter by letter, all six tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from rich.console import Console

from splitq_edge.commands.evaluate import EvalOptions, run_eval
from splitq_edge.runtime_ops.session import ExportedModel

LAST_DIGIT = 1e-7  # of a float32


@contextmanager
def nudged(size: float, seed: int) -> Iterator[None]:
    """Every embedding of an exported model is moved by so much of itself."""
    random, embed = np.random.default_rng(seed), ExportedModel.embed

    def moved(model: ExportedModel, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        embeds, modality = embed(model, *inputs)
        return (embeds * (1 + size * random.standard_normal(embeds.shape))).astype(np.float32), modality

    with patch.object(ExportedModel, "embed", moved):
        yield


@click.command(help=__doc__)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("state", type=click.Path(path_type=Path))
@click.option("--limit", default=200, show_default=True, help="Questions a task.")
@click.option("--seed", default=0, show_default=True)
@click.option("--nudge", default=LAST_DIGIT, show_default=True)
@click.option("--skip-torch", is_flag=True, help="Only compare the exported model with itself.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/agreement"), show_default=True)
def main(model: str, out: Path, state: Path, limit: int, seed: int, nudge: float, skip_torch: bool, work: Path) -> None:
    """Ask three times, compare."""
    work.mkdir(parents=True, exist_ok=True)
    known = work / f"{out.name}-{limit}-seed{seed}.jsonl"
    console = Console()

    def ask(of: str, backend: str, **options: Any) -> dict[str, Any]:
        return run_eval(EvalOptions(of, "all", backend, limit, seed, 0, None, **options), console)

    first = ask(str(out), "ort", save_answers=known)
    scheme, count = first["scheme"], sum(task["n"] for task in first["tasks"].values())
    with nudged(nudge, seed):
        itself = ask(str(out), "ort", answers=known)["same_answers"]
    print(f"{scheme}, ONNX Runtime and itself, nudged by {nudge:g}: {100 * itself:.2f} % of {count} answers")
    if not skip_torch:
        torch = ask(model, "torch", state=state, answers=known)["same_answers"]
        print(f"{scheme}, ONNX Runtime and torch: {100 * torch:.2f} % of {count} answers")


if __name__ == "__main__":
    main()
