"""Do the fused and the unfused decoder say the same? Greedy answers to held-out questions with pictures, both ways.

    python models/smolvqa-135m/same_tokens.py build/models/smolvqa-135m --work build/same-tokens

Calibrates once (rounding to nearest, nothing learned), exports with `--attention fused` and with `standard`, and counts
questions whose tokens are all equal. Both graphs hold the same integers but add floats in another order, which may tip
an activation's code and with it a token whose logits nearly tie. Exits with 1 if an answer differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.evaluate.tasks import load_task
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens, open_image
from splitq_edge.runtime_ops.session import ExportedModel

SAMPLES = 16
NEW_TOKENS = 8


def export(model: str, scheme: str, work: Path) -> dict[str, Path]:
    """Folders by form of the attention."""
    folders = {}
    for attention in ("fused", "standard"):
        folders[attention] = work / attention
        options = ExportOptions(
            model,
            folders[attention],
            scheme=scheme,
            method="rtn",
            calib_samples=SAMPLES,
            flavour="packed" if scheme != "none" else "portable",
            attention=attention,
            layout="flat",
            state=work / "state",
            keep_state=True,
            resume=True,
            force=True,
        )
        run_export(options, Console())
    return folders


def answers(folder: Path, questions: int) -> np.ndarray:
    """[questions, NEW_TOKENS] int64, padded behind an end."""
    model = ExportedModel(folder)
    generator = Generator(model)
    found = np.full((questions, NEW_TOKENS), model.manifest["pad_token_id"])
    for row, question in zip(found, load_task("easyvqa", "test"), strict=False):
        inputs = generator.chat(question.text, [open_image(question.image)])
        steps = greedy_tokens(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            model.encode_images(inputs),
            max_new_tokens=NEW_TOKENS,
            positions=model.positions(inputs["input_ids"], inputs["attention_mask"], inputs),
        )
        tokens = [int(step[0]) for step in steps]
        row[: len(tokens)] = tokens
    return found


@click.command(help=__doc__)
@click.argument("model")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/same-tokens"), show_default=True)
@click.option("--scheme", default="W4A8", show_default=True)
@click.option("--questions", default=50, show_default=True)
def main(model: str, work: Path, scheme: str, questions: int) -> None:
    """Export both ways, ask, compare."""
    said = {attention: answers(folder, questions) for attention, folder in export(model, scheme, work).items()}
    equal = (said["fused"] == said["standard"]).all(-1)
    print(f"{scheme}: {equal.sum()} of {questions} answers are the same tokens")
    for number in np.flatnonzero(~equal):
        print(f"  question {number}: fused {said['fused'][number]}, standard {said['standard'][number]}")
    sys.exit(0 if equal.all() else 1)


if __name__ == "__main__":
    main()
