"""An interrupted calibration, resumed, ends with the bytes of one that was never interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import write_chats

pytestmark = pytest.mark.slow
TIMEOUT = 1800  # of one run; the suite's machine may be busy
RECIPE = """
scheme: W3A3
bits: 3
activation_bits: 3
split: {{activation_bits: 4}}
correction: {{residual_bits: 4}}
rounding: {rounding}
learning: {{epochs: 12, batch: 2, propagate: {propagate}}}
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _hear_ctrl_c() -> None:
    """What a shell or a test runner starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Run:
    """An export in a folder of its own; OUT and the state have the same names in all of them."""

    folder: Path
    model: Path
    chats: Path
    propagate: str = "float"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def state(self) -> Path:
        return self.folder / "out.calibration"

    def blocks(self) -> int:
        return len(list(self.state.glob("block_*.safetensors")))

    def scratch(self) -> list[Path]:
        """Hidden states on disk: there while a run with a memory limit calibrates."""
        return list(self.state.glob("activations-*"))

    def start(self, *options: str) -> subprocess.Popen[str]:
        recipe = self.folder / "recipe.yaml"
        # What needs the quantized blocks before it once: the rounding where learning does not.
        rounding = "gptaq" if self.propagate == "float" else "nearest"
        recipe.write_text(RECIPE.format(propagate=self.propagate, rounding=rounding))
        command = [sys.executable, "-m", "splitq_edge.cli", "export", self.model, self.out, "--recipe", recipe]
        command += ["--calib", self.chats, "--calib-samples", "4", "--seed", "3", *options]
        return subprocess.Popen(
            list(map(str, command)),
            text=True,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=_hear_ctrl_c,  # noqa: PLW1509 - it touches nothing that a thread might hold
        )

    def refused(self, *options: str) -> str:
        """The one line of a run that ends with an error of the user's."""
        with self.start(*options) as process:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2, stdout + stderr
        return stderr

    def finish(self, *options: str) -> None:
        with self.start(*options) as process:
            try:
                stdout, stderr = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        assert process.returncode == 0, stdout + stderr

    def interrupt(self, number: signal.Signals, ready: Callable[[], bool], *options: str) -> tuple[int, str]:
        """Send a signal as soon as `ready` holds; exit code and stderr."""
        with self.start(*options) as process:
            try:
                deadline = time.monotonic() + TIMEOUT
                while not ready():
                    assert process.poll() is None, "the run ended by itself: " + "".join(process.communicate())
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                process.send_signal(number)
                stderr = process.communicate(timeout=TIMEOUT)[1]
            finally:
                process.kill()
        return process.returncode, stderr

    def files(self) -> dict[str, bytes]:
        return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in self.out.rglob("*")}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[..., Run]:
    chats = write_chats(tmp_path_factory.mktemp("four") / "chats", 4)

    def make(propagate: str = "float") -> Run:
        return Run(tmp_path_factory.mktemp("run"), checkpoint, chats, propagate)

    return make


@pytest.fixture(scope="module")
def uninterrupted(make_run: Callable[..., Run]) -> Callable[[str], dict[str, bytes]]:
    """The files of a run that nobody disturbed, by what its blocks learn on."""
    known: dict[str, dict[str, bytes]] = {}

    def files(propagate: str) -> dict[str, bytes]:
        if propagate not in known:
            run = make_run(propagate)
            run.finish()
            assert not run.state.exists()
            known[propagate] = run.files()
        return known[propagate]

    return files


def assert_same(got: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []


def begun(run: Run) -> Callable[[], bool]:
    """The header is written: the calibration begins."""
    return (run.state / "calibration.json").is_file


def one_finished(run: Run) -> Callable[[], bool]:
    return lambda: run.blocks() == 1


def in_second_block(run: Run, after: float = 0.3) -> Callable[[], bool]:
    """Some time after the first block's file came or, in a resumed run with a memory limit, its hidden states."""
    since: list[float] = []
    resumed = run.blocks() > 0

    def ready() -> bool:
        if run.blocks() and (run.scratch() or not resumed) and not since:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > after

    return ready


def killed(run: Run, ready: Callable[[], bool], *options: str) -> None:
    code, _ = run.interrupt(signal.SIGKILL, ready, *options)
    assert code == -signal.SIGKILL
    assert not run.out.exists()


@pytest.mark.parametrize("point", [begun, one_finished, in_second_block])
def test_run_killed_once_and_resumed_gives_the_same_bytes(
    make_run: Callable[..., Run],
    uninterrupted: Callable[[str], dict[str, bytes]],
    point: Callable[[Run], Callable[[], bool]],
) -> None:
    run = make_run()
    killed(run, point(run))
    assert run.blocks() == (0 if point is begun else 1)
    run.finish("--resume")
    assert_same(run.files(), uninterrupted("float"))
    assert not run.state.exists()


def test_run_killed_three_times_and_resumed_gives_the_same_bytes_when_blocks_learn_on_quantized_ones(
    make_run: Callable[..., Run], uninterrupted: Callable[[str], dict[str, bytes]]
) -> None:
    # All activations go to disk, and every run finds those of the one that was killed before it.
    run = make_run("quantized")
    limit = ["--memory-limit", "1MB"]
    for point, options, blocks in ((begun, [], 0), (one_finished, ["--resume"], 1), (in_second_block, ["--resume"], 1)):
        for leftover in run.scratch():  # `in_second_block` looks for those of its own run
            if point is in_second_block:
                shutil.rmtree(leftover)
        killed(run, point(run), *options, *limit)
        assert run.blocks() == blocks
    assert run.scratch()
    run.finish("--resume", *limit)
    assert not run.state.exists()
    assert_same(run.files(), uninterrupted("quantized"))


def test_ctrl_c_says_one_line_and_the_run_can_be_resumed(
    make_run: Callable[..., Run], uninterrupted: Callable[[str], dict[str, bytes]]
) -> None:
    run = make_run()
    code, stderr = run.interrupt(signal.SIGINT, one_finished(run))
    assert code == 130
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert "--resume" in lines[0]
    assert run.blocks() == 1
    assert run.scratch() == []
    assert not run.out.exists()
    image = next(run.chats.glob("*.png"))
    pixels = image.read_bytes()
    image.write_bytes(pixels + b" ")
    assert "samples_sha256 changed" in run.refused("--resume")
    image.write_bytes(pixels)
    weights = run.model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "weights changed" in run.refused("--resume")
    weights.write_bytes(content)  # another time of change, as in a copy on another machine
    run.finish("--resume")
    assert_same(run.files(), uninterrupted("float"))
