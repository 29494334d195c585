"""`splitq-edge verify`: is this exported folder whole, and does it answer as torch did? Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.open_model import open_model
from splitq_edge.runtime_ops.verify import ParityRow, disagreements, verify_files, verify_parity, verify_target
from splitq_edge.targets import Target


def run_verify(out: Path, *, native: bool | None, target: str | None = None) -> Iterator[str]:
    """Lines of the report.

    Args:
        out: exported folder.
        native: see `ExportedModel`.
        target: an NPU that the folder was compiled for: its answers are compared with the CPU's too.

    Raises:
        SplitQError: a file changed or an output differs by more than its limit.
    """
    model = open_model(out, native=native)
    compiled = None if target is None else open_model(out, target=Target.parse(target))
    verify_files(model)
    yield f"{out}: {len(model.manifest['files'])} files unchanged"
    rows = verify_parity(model)
    yield from map(_line, rows)
    if wrong := disagreements(rows):
        raise SplitQError(f"{out}: expected what torch says, got {wrong}; export the model again")
    if compiled is None:
        return
    yield f"{target} against the CPU"
    rows = verify_target(model, compiled)
    yield from map(_line, rows)
    if wrong := disagreements(rows):
        raise SplitQError(f"{out}: expected of {target} what the CPU says, got {wrong}; please report it")


def _line(row: ParityRow) -> str:
    return (
        f"{row.part:<24} {row.output:<16} max error {row.max_error:.2e}  SQNR {row.sqnr_db:6.1f} dB "
        f"({row.asked})  same top-1 {100 * row.same_top:5.1f} %  {'ok' if row.ok else 'DIFFERS'}"
    )
