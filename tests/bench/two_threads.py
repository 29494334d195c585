"""What a second thread gives layers of one row, beside what it gives MatMulNBits and a plain loop over memory.

    python tests/bench/two_threads.py --json build/bench/two-threads.json

`kernels.py` times one thread in other minutes than two, and what memory gives two cores of a virtual machine changes
within seconds. Here every round runs all cases with one and with two threads, one after the other, so that a round's
speed-up is of one moment. Rounds in which MatMulNBits gains at least `--wide` are told from the others: it asks for
two thirds of the memory's rate that W4A8 does, and gains from a second thread as long as memory has that.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnxruntime as ort
from kernels import CASES, COLD_BYTES, OrtTimed, Sessions, Setting

from splitq_edge import runtime_ops
from splitq_edge.commands.doctor import native_isa

PEER = "MatMulNBits 4 bits b128"
LAYERS = ("W4A8", "W3A8", PEER)
LOOP = "loop over memory"
SHAPES = "2048x2048,2048x8192,8192x2048,4096x4096,4096x14336"
LOOP_FLOATS = 1 << 24  # of each thread, 64 MB
PASSES = 4  # over all copies of a layer, or over the loop's memory


@dataclass
class Rates:
    """10^9 bytes a second in each round, with one thread and with two."""

    one: list[float] = field(default_factory=list)
    two: list[float] = field(default_factory=list)

    def add(self, one: float, two: float) -> None:
        """Rates of a round."""
        self.one.append(round(one, 1))
        self.two.append(round(two, 1))

    def gains(self) -> list[float]:
        """Speed-up in each round."""
        return [two / one for one, two in zip(self.one, self.two, strict=True)]


def read(parts: np.ndarray) -> float:
    """10^9 bytes a second that a thread for each of the parts reads."""
    threads = [threading.Thread(target=lambda part=part: [part.max() for _ in range(PASSES)]) for part in parts]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return PASSES * parts.nbytes / (time.perf_counter() - start) / 1e9


def rate(layer: OrtTimed) -> float:
    """10^9 bytes of weights a second."""
    layer.seconds.clear()
    for _ in range(PASSES):
        layer.run()
    return layer.case.weight_bytes(layer.setting.k, layer.setting.n) / layer.microseconds() / 1e3


def measure(k: int, n: int, seconds: float, parts: np.ndarray, folder: Path) -> dict[str, Rates]:
    """Rounds over all cases of a shape."""
    cases = [case for case in CASES if case.name in LAYERS]
    layers: dict[str, list[OrtTimed]] = {case.name: [] for case in cases}
    for threads in (1, 2):
        setting = Setting(k, n, 1, threads, COLD_BYTES)
        sessions = Sessions(folder)
        for case in cases:
            layers[case.name].append(OrtTimed(case, setting, sessions))
            layers[case.name][-1].warm_up()
    found = {name: Rates() for name in (*layers, LOOP)}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, (one, two) in layers.items():
            found[name].add(rate(one), rate(two))
        found[LOOP].add(read(parts[:1]), read(parts))
    return found


def table(shapes: dict[str, dict[str, Rates]], wide: float) -> Iterator[str]:
    """Medians and the range of eight in ten rounds: all, those in which memory has more to give, and the rest."""
    found: dict[str, Rates] = {}
    for rates_of in shapes.values():
        for name, rates in rates_of.items():
            total = found.setdefault(name, Rates())
            total.one += rates.one
            total.two += rates.two
    plenty = [gain >= wide for gain in found[PEER].gains()]
    yield "| rounds | | GB/s, one thread | GB/s, two | speed-up |"
    yield "|---|---|---:|---:|---:|"
    for label, chosen in (
        ("all", [True] * len(plenty)),
        (f"{PEER} gains {wide:g} or more", plenty),
        ("the others", [not wanted for wanted in plenty]),
    ):
        first = f"{label}: {sum(chosen)}"
        for name, rates in found.items() if any(chosen) else ():
            cells = []
            for values, digits in ((rates.one, 1), (rates.two, 1), (rates.gains(), 2)):
                kept = [value for value, wanted in zip(values, chosen, strict=True) if wanted]
                low, high = np.quantile(kept, (0.1, 0.9))
                cells.append(f"{statistics.median(kept):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            yield f"| {first} | {name} | {' | '.join(cells)} |"
            first = ""


@click.command(help=__doc__)
@click.option("--shapes", default=SHAPES, show_default=True, help="KxN, with commas between.")
@click.option("--seconds", default=20.0, show_default=True, help="A shape.")
@click.option("--wide", default=1.65, show_default=True, help=f"Speed-up of {PEER} that tells the rounds apart.")
@click.option("--json", "path", type=click.Path(path_type=Path), default=Path("build/bench/two-threads.json"))
@click.option("--show", is_flag=True, help="The table of a file that is there.")
def main(shapes: str, seconds: float, wide: float, path: Path, show: bool) -> None:
    if not show:
        parts = np.ones((2, LOOP_FLOATS), np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        gbps = {}
        for shape in shapes.split(","):
            k, n = map(int, shape.split("x"))
            with TemporaryDirectory(dir=path.parent) as folder:
                found = measure(k, n, seconds, parts, Path(folder))
            gbps[shape] = {name: asdict(rates) for name, rates in found.items()}
        machine = {"onnxruntime": ort.__version__, "kernels": native_isa(runtime_ops.library_path())}
        path.write_text(json.dumps({"schema": 1, "machine": machine, "gbps": gbps}) + "\n", encoding="utf-8")
    stored = json.loads(path.read_text(encoding="utf-8"))["gbps"]
    print(
        "\n".join(
            table({shape: {name: Rates(**rates) for name, rates in of.items()} for shape, of in stored.items()}, wide)
        )
    )


if __name__ == "__main__":
    main()
