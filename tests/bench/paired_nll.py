"""Methods compared question by question: are two of them apart, or is it one answer that tipped?

    python tests/bench/paired_nll.py models/easyvqa-tiny --scheme W4A4 --methods quarot,flatquant,splitq

exports the model in float and with every method, asks all test questions in the native kernels, and prints as Markdown:
the mean negative log-likelihood (NLL) a token, the KL divergence from the float model (mean, median and 99th percentile
of the questions), the NLL of the last method less this one's with its standard error over the same questions, and the
largest change that one question brings to the row's mean NLL against float. Exports and answers are kept in --work and
not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from splitq_edge.commands.evaluate import EvalOptions, run_eval
from splitq_edge.commands.export import ExportOptions, run_export
from splitq_edge.config import preset
from splitq_edge.methods.registry import method_config

FLOAT = "fp32"


def answers(chosen: argparse.Namespace, method: str) -> tuple[np.ndarray, np.ndarray, int]:
    """NLL and KL divergence of every question, summed over its answer's tokens, and the tokens of all answers."""
    console = Console(stderr=True)
    stem = f"{Path(chosen.model).resolve().name}-{chosen.scheme}-{method}-seed{chosen.seed}"
    folder, path = chosen.work / stem, chosen.work / f"{stem}.jsonl"
    reference = chosen.work / f"{Path(chosen.model).resolve().name}.npz"
    known = path.is_file() and (method != FLOAT or reference.is_file())
    if not known:
        config = None if method == FLOAT else method_config(method, preset(chosen.scheme))
        options = ExportOptions(
            model=chosen.model,
            out=folder,
            scheme="none" if config is None else chosen.scheme,
            calib=chosen.task,
            calib_samples=128,
            seed=chosen.seed,
            force=True,
        )
        run_export(options, console, config)
        asked = EvalOptions(
            model=str(folder),
            task=chosen.task,
            backend="ort",
            limit=None,
            seed=0,
            threads=0,
            json=None,
            save_answers=path,
            save_reference=reference if method == FLOAT else None,
            reference=None if method == FLOAT else reference,
        )
        run_eval(asked, console)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return (
        np.array([row["nll"] for row in rows]),
        np.array([row.get("kl", 0.0) for row in rows]),
        sum(row["tokens"] for row in rows),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--methods", default="quarot,flatquant,splitq", help="with commas; the last is compared")
    parser.add_argument("--task", default="easyvqa")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration samples")
    parser.add_argument("--work", type=Path, default=Path("build/paired"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    found = {method: answers(chosen, method) for method in (FLOAT, *chosen.methods.split(","))}
    float_nll, _, count = found[FLOAT]
    last = found[chosen.methods.split(",")[-1]][0]
    tokens = count / len(float_nll)
    print(f"{Path(chosen.model).resolve().name}, {chosen.scheme}, n = {len(float_nll)}, seed {chosen.seed}\n")
    print("| method | NLL | KL mean | KL median | KL 99 % | last less this | one question's largest part |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method, (nll, kl, _) in found.items():
        difference, change = (last - nll) / tokens, np.abs(nll - float_nll).max() / tokens / len(nll)
        error = difference.std(ddof=1) / len(nll) ** 0.5
        divergences = f"{kl.mean() / tokens:.2g} | {np.median(kl):.2g} | {np.quantile(kl, 0.99):.2g}"
        apart = "" if last is nll else f"{difference.mean():+.1e} ± {error:.1e}"
        print(f"| {method} | {nll.mean() / tokens:.6f} | {divergences} | {apart} | {change:.1e} |")


if __name__ == "__main__":
    main()
