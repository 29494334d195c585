"""Does a part answer as torch did? Runs the parity samples that an export carries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitq_edge.artifacts import sha256_of
from splitq_edge.errors import ArtifactError
from splitq_edge.runtime_ops.session import ExportedModel

PARITY_FILE = "parity.npz"
TARGET_LIMIT_DB = 15.0  # a random block has been seen at 20 dB on the emulator, wrong weights below 0


@dataclass(frozen=True)
class ParityRow:
    """One compared output.

    Attributes:
        part: graph.
        output: output name.
        values: how many numbers were compared.
        max_error: largest absolute difference.
        sqnr_db: power of the reference over power of the difference, in dB; infinite when equal.
        same_top: share of rows (last axis) whose largest entry is at the same place.
        limit_db: SQNR that was asked for, None for a sample that rounding errors alone would change.
    """

    part: str
    output: str
    values: int
    max_error: float
    sqnr_db: float
    same_top: float
    limit_db: float | None

    @property
    def ok(self) -> bool:
        """Whether the output is close enough."""
        # Another shape or a number that is not finite is wrong whatever is asked.
        return self.sqnr_db > -math.inf and (self.limit_db is None or self.sqnr_db >= self.limit_db)

    @property
    def asked(self) -> str:
        """The limit as a table shows it."""
        return "-" if self.limit_db is None else f">= {self.limit_db:.0f}"


def disagreements(rows: Iterable[ParityRow]) -> str:
    """What is not close enough and how close it is, "decoder step logits 9.1 dB (>= 15)"; empty if all is."""
    return ", ".join(f"{row.part} {row.output} {row.sqnr_db:.1f} dB ({row.asked})" for row in rows if not row.ok)


def verify_parity(model: ExportedModel) -> list[ParityRow]:
    """Run every part on the stored inputs and compare with the stored outputs of torch.

    Raises:
        ArtifactError: the parity file is missing or damaged.
    """
    rows = []
    before = None
    for part, case, feeds, expected in _samples(model):
        if before not in (None, part):
            model.close(before)  # one part in memory at a time
        before = part
        outputs = model.run(part, feeds)
        limit = _limit_db(model.manifest["parts"][part], case)
        rows += [_compare(f"{part} {case}", name, outputs[name], value, limit) for name, value in expected.items()]
    return rows


def verify_target(model: ExportedModel, compiled: ExportedModel) -> list[ParityRow]:
    """Run every static part on the stored inputs, on an NPU and on the CPU, and compare the two.

    Args:
        model: a static export on the CPU.
        compiled: the same on the NPU.

    Raises:
        ArtifactError: the parity file is missing or damaged.
    """
    rows = []
    for part, case, feeds, expected in _samples(model):
        if part == "embed_tokens":  # a look-up that stays on the CPU
            continue
        cpu, npu = model.run(part, feeds), compiled.run(part, feeds)
        rows += [_compare(f"{part} {case}", name, npu[name], cpu[name], TARGET_LIMIT_DB) for name in expected]
    return rows


def _samples(model: ExportedModel) -> Iterator[tuple[str, str, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Part, case, inputs and torch's outputs of every stored sample.

    Raises:
        ArtifactError: the parity file is missing or damaged.
    """
    path = model.folder / PARITY_FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            samples = {name: stored[name] for name in stored.files}
    except Exception as error:
        raise ArtifactError(f"{path}: expected the parity samples ({error}); export the model again") from error
    for part in model.parts:
        for case in sorted({name.split("/")[1] for name in samples if name.startswith(f"{part}/")}):
            prefix = f"{part}/{case}"
            yield part, case, _under(samples, f"{prefix}/in/"), _under(samples, f"{prefix}/out/")


def verify_files(model: ExportedModel) -> None:
    """Check the hash of every file of the export.

    Raises:
        ArtifactError: a file changed.
    """
    for name, entry in model.manifest["files"].items():
        found = sha256_of(model.folder / name)
        if found != entry["sha256"]:
            raise ArtifactError(
                f"{model.folder / name}: expected sha256 {entry['sha256'][:12]}..., got {found[:12]}...; "
                "the file was changed after the export"
            )


def _limit_db(part: dict[str, Any], case: str) -> float | None:
    """A sample's own limit, else its part's."""
    limit = part.get("parity_case_limits_db", {}).get(case, part["parity_limit_db"])
    return None if limit is None else float(limit)


def _under(samples: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in samples.items() if name.startswith(prefix)}


def _compare(part: str, name: str, got: np.ndarray, expected: np.ndarray, limit: float | None) -> ParityRow:
    # Logits are stored for the last positions only.
    if got.ndim == expected.ndim >= 2 and got.shape[-2] > expected.shape[-2]:
        got = got[..., -expected.shape[-2] :, :]
    if got.shape != expected.shape:
        return ParityRow(part, name, expected.size, math.inf, -math.inf, 0.0, limit)
    difference = got.astype(np.float64) - expected.astype(np.float64)
    noise, signal = float((difference**2).sum()), float((expected.astype(np.float64) ** 2).sum())
    if not math.isfinite(noise):
        sqnr = -math.inf
    elif noise == 0:
        sqnr = math.inf
    else:
        sqnr = 10 * math.log10(max(signal, 1e-30) / noise)
    top = float((got.argmax(-1) == expected.argmax(-1)).mean())
    return ParityRow(part, name, expected.size, float(np.abs(difference).max(initial=0)), sqnr, top, limit)
