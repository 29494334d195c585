"""What a second thread gives layers of one row, beside what it gives MatMulNBits and a plain loop over memory.

    python tests/bench/two_threads.py --native build/peers/cmake/libbench_peers.so --json build/bench/two-threads.json

`kernels.py` times one thread in other minutes than two, and a virtual machine's two processors are other cores from
second to second. Here every round runs all cases with one and with two threads, one after the other, each thread kept
on a processor and all in elapsed time, so that a round's speed-up is of one moment. The loop reads as many bytes as a
layer's copies have.

Before and after every round a cache line goes back and forth between the two processors. Cores behind one last-level
cache, which share its path to memory, too, hand it over several times as fast as others; rounds are told apart by that.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from ggml import NativeLibrary
from kernels import (
    CASES,
    COLD_BYTES,
    OrtTimed,
    Sessions,
    Setting,
    kept_on,
    native_library,
    processors,
    shapes_of,
)

from splitq_edge import runtime_ops
from splitq_edge.commands.doctor import native_isa

PEER = "MatMulNBits 4 bits b128"
LAYERS = ("W4A8", "W3A8", PEER)
LOOP = "loop over memory"
SHAPES = "2048x2048,2048x8192,8192x2048,4096x4096,4096x14336"
PLACES = (("behind one cache", False), ("with a cache each", True))  # whether apart
APART_NS = 150.0  # 53 to 107 ns behind one cache and 302 to 343 with a cache each, on Zen 4
PASSES = 4  # over all copies of a layer, or over the loop's memory
LATER = 10  # times the seconds that a shape takes at most, while rounds in one of the places are missing


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


@dataclass
class Shape:
    """Rounds over all cases of a shape.

    Attributes:
        rates: by case.
        round_trip_ns: of a cache line between the two processors, before the first round and after each.
        apart_ns: round trip from which each processor is taken to have a last-level cache of its own.
    """

    rates: dict[str, Rates]
    round_trip_ns: list[float]
    apart_ns: float

    def apart(self) -> list[bool | None]:
        """Of each round, whether the processors had a cache each; None where that changed meanwhile."""
        found = [trip >= self.apart_ns for trip in self.round_trip_ns]
        return [before if before == after else None for before, after in itertools.pairwise(found)]

    def of(self, name: str, apart: bool | None) -> Rates:
        """A case's rounds in such a place; None: all of them."""
        rates, found = self.rates[name], Rates()
        for one, two, place in zip(rates.one, rates.two, self.apart(), strict=True):
            if apart is None or place is apart:
                found.add(one, two)
        return found


@dataclass(frozen=True)
class Machine:
    """What is measured with.

    Attributes:
        library: peers/build.sh's.
        processors: the two that threads are kept on.
        values: what the loop reads.
    """

    library: NativeLibrary
    processors: list[int]
    values: np.ndarray

    def loop(self, threads: int) -> float:
        """10^9 bytes a second that a loop over memory reads."""
        return self.library.read_on_gbps(self.values, PASSES, self.processors[:threads])

    def round_trip_ns(self) -> float:
        """See `Shape`.

        Raises:
            click.ClickException: threads cannot be kept on these processors.
        """
        found = self.library.round_trip_ns(*self.processors)
        if not found:
            raise click.ClickException(
                f"expected to keep threads on the processors {self.processors}; the system refused"
            )
        return round(found)


def rate(layer: OrtTimed) -> float:
    """10^9 bytes of weights a second, in elapsed time."""
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        layer.run()
        seconds.append(time.perf_counter() - start)
    size = layer.case.weight_bytes(layer.setting.k, layer.setting.n) * layer.copies
    return size / statistics.median(seconds) / 1e9


def measure(k: int, n: int, seconds: float, wanted: int, apart_ns: float, machine: Machine, folder: Path) -> Shape:
    """Rounds for so many seconds, and for up to `LATER` times as many until there are enough in either place."""
    cases = [case for case in CASES if case.name in LAYERS]
    layers: dict[str, list[OrtTimed]] = {case.name: [] for case in cases}
    for threads in (1, 2):
        setting = Setting(k, n, 1, threads, COLD_BYTES)
        sessions = Sessions(folder)
        for case in cases:
            layers[case.name].append(OrtTimed(case, setting, sessions))
            layers[case.name][-1].warm_up()
    found = Shape({name: Rates() for name in (*layers, LOOP)}, [machine.round_trip_ns()], apart_ns)
    begin = time.perf_counter()
    with kept_on(machine.processors[:1]):
        while (spent := time.perf_counter() - begin) < seconds * LATER:
            places = found.apart()
            if spent >= seconds and min(places.count(apart) for _, apart in PLACES) >= wanted:
                break
            for name, (one, two) in layers.items():
                found.rates[name].add(rate(one), rate(two))
            found.rates[LOOP].add(machine.loop(1), machine.loop(2))
            found.round_trip_ns.append(machine.round_trip_ns())
    return found


def rates_table(shapes: dict[str, Shape]) -> Iterator[str]:
    """Medians and the range of eight in ten rounds, of all shapes together."""
    yield "| processors | | GB/s, one thread | GB/s, two | speed-up |"
    yield "|---|---|---:|---:|---:|"
    for label, wanted in (*PLACES, ("all rounds", None)):
        for number, name in enumerate((*LAYERS, LOOP)):
            parts = [shape.of(name, wanted) for shape in shapes.values()]
            found = Rates([x for part in parts for x in part.one], [x for part in parts for x in part.two])
            if not found.one:
                continue
            cells = []
            for values, digits in ((found.one, 1), (found.two, 1), (found.gains(), 2)):
                low, high = np.quantile(values, (0.1, 0.9))
                cells.append(f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            first = "" if number else f"{label}, {len(found.one)}"
            yield f"| {first} | {name} | {' | '.join(cells)} |"


def shapes_table(shapes: dict[str, Shape]) -> Iterator[str]:
    """Median speed-up of every shape, and the geometric mean of these."""
    yield f"| processors | | {' | '.join(shapes)} | mean |"
    yield f"|---|---|{'---:|' * (len(shapes) + 1)}"
    for label, wanted in PLACES:
        counts = [str(len(shape.of(LOOP, wanted).one)) for shape in shapes.values()]
        yield f"| {label} | rounds | {' | '.join(counts)} | |"
        for name in (*LAYERS, LOOP):
            cells = []
            for shape in shapes.values():
                gains = shape.of(name, wanted).gains()
                cells.append(f"{statistics.median(gains):.2f}" if gains else "")
            mean = speed_up(shapes, name, apart=wanted)
            yield f"| | {name} | {' | '.join(cells)} | {'' if mean is None else f'{mean:.2f}'} |"


def speed_up(shapes: dict[str, Shape], name: str, *, apart: bool) -> float | None:
    """Geometric mean over the shapes of a case's median speed-up in such rounds; None where a shape has none."""
    gains = [shape.of(name, apart).gains() for shape in shapes.values()]
    return statistics.geometric_mean(map(statistics.median, gains)) if gains and all(gains) else None


def load(path: Path) -> dict[str, Shape]:
    """The shapes of a file.

    Raises:
        click.ClickException: it is not of this program.
    """
    names = (*LAYERS, LOOP)
    try:
        found = {
            shape: Shape({name: Rates(**of["rates"][name]) for name in names}, of["round_trip_ns"], of["apart_ns"])
            for shape, of in json.loads(path.read_text(encoding="utf-8"))["shapes"].items()
        }
        for shape in found.values():
            for rates in shape.rates.values():
                pairs = zip(rates.one, rates.two, shape.apart(), strict=True)
                if min(min(one, two) for one, two, _ in pairs) <= 0:
                    raise ValueError("a rate of nothing")
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise click.ClickException(f"{path}: expected a file of two_threads.py; measure again") from error
    if not found:
        raise click.ClickException(f"{path}: expected shapes, got none")
    return found


def machine_with(native: Path) -> Machine:
    """The first two processors.

    Raises:
        click.ClickException: there are not two, or the library is not there or an old one.
    """
    first_two = processors(2)
    if len(first_two) < 2:
        raise click.ClickException("expected two processors that threads can be kept on, as on Linux")
    return Machine(native_library(native), first_two, np.ones(int(COLD_BYTES) // 256 * 32, np.int64))


@click.command(help=__doc__)
@click.option("--shapes", default=SHAPES, show_default=True, callback=shapes_of, help="KxN, with commas between.")
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(min=1), help="A shape.")
@click.option(
    "--rounds",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help=f"Go on, up to {LATER} times as long, until a shape has so many rounds behind one cache and as many with two.",
)
@click.option(
    "--apart-ns",
    default=APART_NS,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Round trip from which on processors count as having a cache each.",
)
@click.option(
    "--native",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("build/peers/cmake/libbench_peers.so"),
    show_default=True,
    help="Of peers/build.sh.",
)
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("build/bench/two-threads.json"),
    show_default=True,
    help="Written when all shapes are measured.",
)
@click.option("--show", is_flag=True, help="The tables of a file that is there.")
def main(
    shapes: list[tuple[int, int]], seconds: float, rounds: int, apart_ns: float, native: Path, path: Path, show: bool
) -> None:
    if not show:
        machine = machine_with(native)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise click.ClickException(f"--json {path}: {error.strerror}") from error
        found = {}
        for k, n in shapes:
            with TemporaryDirectory(dir=path.parent) as folder:
                found[f"{k}x{n}"] = asdict(measure(k, n, seconds, rounds, apart_ns, machine, Path(folder)))
        about: dict[str, Any] = {"onnxruntime": ort.__version__, "kernels": native_isa(runtime_ops.library_path())}
        text = json.dumps({"schema": 2, "machine": about, "shapes": found})
        path.write_text(text + "\n", encoding="utf-8")
    stored = load(path)
    for line in (*rates_table(stored), "", *shapes_table(stored)):
        click.echo(line)


if __name__ == "__main__":
    main()
