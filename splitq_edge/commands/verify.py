"""`splitq-edge verify`: is this exported folder whole, and does it answer as torch did? Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import verify_files, verify_parity


def run_verify(out: Path, *, native: bool | None) -> Iterator[str]:
    """Lines of the report.

    Raises:
        SplitQError: a file changed or an output differs by more than its limit.
    """
    model = ExportedModel(out, native=native)
    verify_files(model)
    yield f"{out}: {len(model.manifest['files'])} files unchanged"
    rows = verify_parity(model)
    for row in rows:
        yield (
            f"{row.part:<24} {row.output:<16} max error {row.max_error:.2e}  SQNR {row.sqnr_db:6.1f} dB "
            f"({row.asked})  same top-1 {100 * row.same_top:5.1f} %  {'ok' if row.ok else 'DIFFERS'}"
        )
    if not all(row.ok for row in rows):
        raise SplitQError(f"{out}: an output differs from torch by more than its limit; export the model again")
