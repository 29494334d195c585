"""Do two exports of one calibration say the same? Greedy answers to held-out questions with pictures, both ways.

    python models/smolvqa-135m/same_tokens.py build/models/smolvqa-135m --work build/same-tokens
    python models/smolvqa-135m/same_tokens.py build/models/smolvqa-135m --compare cache
    python models/smolvqa-135m/same_tokens.py build/models/smolvqa-135m --compare layout --questions 20 \
        --new-tokens 64 --past-the-end

Calibrates once (the scheme's recipe, nothing learned). `--compare attention`: the fused and the unfused decoder hold
the same integers but add floats in another order, which may tip an activation's code and with it a token whose logits
nearly tie. `--compare cache`: keys and values kept in float32 and in float16. `--compare layout`: the flat folder in
our own loop and the genai folder in onnxruntime-genai. `--past-the-end` forbids end tokens, so that every answer has
as many tokens as asked for. Exits with 1 if one differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.config import KV_CACHES, LearningConfig, preset
from splitq_edge.evaluate.tasks import load_task
from splitq_edge.runtime_ops.genai import GenaiGenerator
from splitq_edge.runtime_ops.generate import Generator, greedy_tokens, open_image
from splitq_edge.runtime_ops.session import ExportedModel

SAMPLES = 16
FORMS = {"attention": ("fused", "standard"), "cache": ("float32", "float16"), "layout": ("flat", "genai")}

Answer = Callable[[dict[str, np.ndarray], int], list[int]]


def export(model: str, scheme: str, work: Path, compare: str) -> dict[str, Path]:
    """Folders by form."""
    config = None if scheme == "none" else replace(preset(scheme), learning=LearningConfig(epochs=0))
    folders = {}
    for form in FORMS[compare]:
        if config is not None and compare == "cache":
            config = replace(config, kv_cache_bits=KV_CACHES[form])
        folders[form] = work / form
        options = ExportOptions(
            model,
            folders[form],
            scheme=scheme,
            calib_samples=SAMPLES,
            flavour="packed" if scheme != "none" else "portable",
            attention=form if compare == "attention" else None,
            layout=form if compare == "layout" else "flat",
            state=work / "state",
            keep_state=True,
            resume=True,
            force=True,
        )
        run_export(options, Console(), config)
    return folders


def our_loop(model: ExportedModel, *, past_the_end: bool) -> Answer:
    """Greedy tokens by `greedy_tokens`."""
    if past_the_end:
        _forbid_ends(model)

    def answer(inputs: dict[str, np.ndarray], new_tokens: int) -> list[int]:
        steps = greedy_tokens(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            model.encode_images(inputs),
            max_new_tokens=new_tokens,
            positions=model.positions(inputs["input_ids"], inputs["attention_mask"], inputs),
        )
        return [int(step[0]) for step in steps]

    return answer


def _forbid_ends(model: ExportedModel) -> None:
    ends, decode = model.manifest["eos_token_ids"], model.decode
    model.manifest["eos_token_ids"] = []

    def without_ends(*args: Any, **options: Any) -> Any:
        logits, cache = decode(*args, **options)
        logits = logits.copy()
        logits[..., ends] = -np.inf
        return logits, cache

    model.decode = without_ends  # type: ignore[method-assign]


def genai(model: ExportedModel, *, past_the_end: bool) -> Answer:
    """Greedy tokens by onnxruntime-genai, which itself forbids the end before the shortest length."""
    import onnxruntime_genai as og

    named, opened = GenaiGenerator(model)._named, og.Model(str(model.folder))

    def answer(inputs: dict[str, np.ndarray], new_tokens: int) -> list[int]:
        ids = inputs["input_ids"].astype(np.int32)
        params = og.GeneratorParams(opened)
        length = ids.shape[1] + new_tokens
        params.set_search_options(max_length=length, min_length=length if past_the_end else 0, do_sample=False)
        generator = og.Generator(opened, params)
        generator.set_inputs(named(ids, inputs))
        found = []
        for _ in range(new_tokens):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
            if not past_the_end and found[-1] in model.manifest["eos_token_ids"]:
                break
        return found

    return answer


def answers(folder: Path, form: str, questions: int, new_tokens: int, *, past_the_end: bool) -> list[list[int]]:
    """Tokens of every answer."""
    model = ExportedModel(folder)
    generator = Generator(model)
    answer = (genai if form == "genai" else our_loop)(model, past_the_end=past_the_end)
    return [
        answer(generator.chat(question.text, [open_image(question.image)]), new_tokens)
        for question in load_task("easyvqa", "test")[:questions]
    ]


@click.command(help=__doc__)
@click.argument("model")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/same-tokens"), show_default=True)
@click.option("--compare", type=click.Choice(tuple(FORMS)), default="attention", show_default=True)
@click.option("--scheme", default="W4A8", show_default=True)
@click.option("--questions", default=50, show_default=True)
@click.option("--new-tokens", default=8, show_default=True)
@click.option("--past-the-end", is_flag=True, help="Forbid end tokens.")
def main(
    model: str, work: Path, compare: str, scheme: str, questions: int, new_tokens: int, past_the_end: bool
) -> None:
    """Export both ways, ask, compare."""
    if (compare, scheme) == ("cache", "none"):
        raise click.UsageError("--compare cache: a float export has no choice of cache; take another --scheme")
    folders = export(model, scheme, work, compare)
    first, second = (
        answers(folder, form, questions, new_tokens, past_the_end=past_the_end) for form, folder in folders.items()
    )
    different = [number for number, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    tokens = sum(map(len, first))
    same = f"{questions - len(different)} of {questions} answers are the same ({tokens} tokens)"
    print(f"{scheme}, {' and '.join(folders)}: {same}")
    for number in different:
        print(f"  question {number}: {first[number]}, {second[number]}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
