"""What a second thread gives layers of one row, beside what it gives MatMulNBits and a plain loop over memory.

    python tests/bench/two_threads.py --native build/peers/cmake/libbench_peers.so --json build/bench/two-threads.json

`kernels.py` times one thread in other minutes than two, and a virtual machine's two processors are other cores from
second to second. Here every round runs all cases with one and with two threads, one after the other, so that a round's
speed-up is of one moment. Before and after it a cache line goes back and forth between the two processors: cores behind
one last-level cache, which also share its path to memory, hand it over several times as fast as others. Rounds are told
apart by that; those in which it changed are left out.
"""

from __future__ import annotations

import itertools
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
from ggml import NativeLibrary
from kernels import CASES, COLD_BYTES, OrtTimed, Sessions, Setting, processors

from splitq_edge import runtime_ops
from splitq_edge.commands.doctor import native_isa

PEER = "MatMulNBits 4 bits b128"
LAYERS = ("W4A8", "W3A8", PEER)
LOOP = "loop over memory"
SHAPES = "2048x2048,2048x8192,8192x2048,4096x4096,4096x14336"
APART_NS = 150.0  # 54 to 117 ns behind one cache and 302 to 342 with a cache each, on Zen 4
PLACES = (("behind one cache", False), ("with a cache each", True))  # whether apart
LOOP_FLOATS = 1 << 24  # of each thread, 64 MB
PASSES = 4  # over all copies of a layer, or over the loop's memory
LATER = 10  # times the seconds that a shape takes at most, while rounds on cores with a cache each are missing


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


@dataclass
class Shape:
    """Rounds over all cases of a shape.

    Attributes:
        rates: by case.
        round_trip_ns: of a cache line between the two processors, before the first round and after each.
    """

    rates: dict[str, Rates]
    round_trip_ns: list[float]

    def apart(self, ns: float) -> list[bool | None]:
        """Of each round, whether the processors had a cache each; None where that changed meanwhile."""
        found = [trip >= ns for trip in self.round_trip_ns]
        return [before if before == after else None for before, after in itertools.pairwise(found)]


def measure(
    k: int, n: int, seconds: float, wanted: int, ns: float, library: NativeLibrary, parts: np.ndarray, folder: Path
) -> Shape:
    """Rounds for so many seconds, and for up to `LATER` times as many until enough found the processors apart."""
    cases = [case for case in CASES if case.name in LAYERS]
    layers: dict[str, list[OrtTimed]] = {case.name: [] for case in cases}
    for threads in (1, 2):
        setting = Setting(k, n, 1, threads, COLD_BYTES)
        sessions = Sessions(folder)
        for case in cases:
            layers[case.name].append(OrtTimed(case, setting, sessions))
            layers[case.name][-1].warm_up()
    first, second = processors(2)
    found = Shape({name: Rates() for name in (*layers, LOOP)}, [round(library.round_trip_ns(first, second))])
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds * LATER:
        if spent >= seconds and found.apart(ns).count(True) >= wanted:
            break
        for name, (one, two) in layers.items():
            found.rates[name].add(rate(one), rate(two))
        found.rates[LOOP].add(read(parts[:1]), read(parts))
        found.round_trip_ns.append(round(library.round_trip_ns(first, second)))
    return found


def table(shapes: dict[str, Shape], ns: float) -> Iterator[str]:
    """Medians and the range of eight in ten rounds: on cores behind one cache, on cores with a cache each."""
    yield "| processors | | GB/s, one thread | GB/s, two | speed-up |"
    yield "|---|---|---:|---:|---:|"
    for label, wanted in PLACES:
        found: dict[str, Rates] = {}
        for shape in shapes.values():
            for name, rates in shape.rates.items():
                total = found.setdefault(name, Rates())
                for one, two, apart in zip(rates.one, rates.two, shape.apart(ns), strict=True):
                    if apart is wanted:
                        total.add(one, two)
        rounds = max(len(rates.one) for rates in found.values())
        first = f"{label}, {rounds} rounds"
        for name, rates in found.items() if rounds else ():
            cells = []
            for values, digits in ((rates.one, 1), (rates.two, 1), (rates.gains(), 2)):
                low, high = np.quantile(values, (0.1, 0.9))
                cells.append(f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            yield f"| {first} | {name} | {' | '.join(cells)} |"
            first = ""


def speed_up(shapes: dict[str, Shape], name: str, ns: float, *, apart: bool) -> float | None:
    """Geometric mean over the shapes of a case's median speed-up in such rounds; None where there is nothing to say."""
    medians = []
    for shape in shapes.values():
        rounds = zip(shape.rates[name].gains(), shape.apart(ns), strict=True)
        gains = [gain for gain, known in rounds if known is apart]
        if not gains:
            return None
        medians.append(statistics.median(gains))
    return statistics.geometric_mean(medians) if medians else None


def load(path: Path) -> dict[str, Shape]:
    """The shapes of a file."""
    if not path.is_file():
        raise click.ClickException(f"--json {path}: not there")
    stored = json.loads(path.read_text(encoding="utf-8")).get("shapes")
    if stored is None:
        raise click.ClickException(f"{path}: expected a file of this program with 'shapes'; measure again")
    return {
        shape: Shape({name: Rates(**rates) for name, rates in of["rates"].items()}, of["round_trip_ns"])
        for shape, of in stored.items()
    }


@click.command(help=__doc__)
@click.option("--shapes", default=SHAPES, show_default=True, help="KxN, with commas between.")
@click.option("--seconds", default=20.0, show_default=True, help="A shape.")
@click.option(
    "--apart",
    default=0,
    show_default=True,
    help=f"Go on, up to {LATER} times as long, until so many rounds of a shape found the processors with a cache each.",
)
@click.option("--ns", default=APART_NS, show_default=True, help="Round trip of a cache line from which they have.")
@click.option(
    "--native",
    type=click.Path(path_type=Path),
    default=Path("build/peers/cmake/libbench_peers.so"),
    show_default=True,
    help="Of peers/build.sh.",
)
@click.option(
    "--json", "path", type=click.Path(path_type=Path), default=Path("build/bench/two-threads.json"), show_default=True
)
@click.option("--show", is_flag=True, help="The tables of a file that is there.")
def main(shapes: str, seconds: float, apart: int, ns: float, native: Path, path: Path, show: bool) -> None:
    if not show:
        if len(processors(2)) < 2:
            raise click.ClickException("expected two processors that threads can be kept on, as on Linux")
        if not native.exists():
            raise click.ClickException(f"--native {native}: not there; run tests/bench/peers/build.sh first")
        library = NativeLibrary(native)
        parts = np.ones((2, LOOP_FLOATS), np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        machine = {"onnxruntime": ort.__version__, "kernels": native_isa(runtime_ops.library_path())}
        found = {}
        for shape in shapes.split(","):
            k, n = map(int, shape.split("x"))
            with TemporaryDirectory(dir=path.parent) as folder:
                found[shape] = asdict(measure(k, n, seconds, apart, ns, library, parts, Path(folder)))
            text = json.dumps({"schema": 2, "machine": machine, "shapes": found})
            path.write_text(text + "\n", encoding="utf-8")
    stored = load(path)
    for line in table(stored, ns):
        click.echo(line)
    click.echo("\nGeometric means over the shapes of the medians:\n")
    click.echo("| two threads on cores | " + " | ".join((*LAYERS, LOOP)) + " |\n|---|" + "---:|" * (len(LAYERS) + 1))
    for label, wanted in PLACES:
        values = [speed_up(stored, name, ns, apart=wanted) for name in (*LAYERS, LOOP)]
        click.echo(f"| {label} | " + " | ".join("" if value is None else f"{value:.2f}" for value in values) + " |")


if __name__ == "__main__":
    main()
