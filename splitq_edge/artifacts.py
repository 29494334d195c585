"""Files on disk: atomic writing of files and folders, hashes, schema numbers.

Running a folder reads its manifest and nothing else: what writing and hashing import, they import themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitq_edge.errors import ArtifactError, SplitQError

EXPORT_SCHEMA = 1
EXPORT_FILE = "export.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half of it (temporary file, then rename).

    Raises:
        SplitQError: the place cannot be written.
    """
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it, even after a power failure.

    Raises:
        SplitQError: the place cannot be written.
    """
    import tempfile

    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(path: Path) -> None:
    """Make the file's folder and check that the file can be written there; called before long work.

    Raises:
        SplitQError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = not path.is_dir() and os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise SplitQError(f"{path}: expected a file name in a writable folder; choose another")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_table(folder: Path) -> dict[str, dict[str, object]]:
    """Size in bytes and sha256 of every file of a folder, by relative path, export.json left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != EXPORT_FILE)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def add_file(folder: Path, name: str, content: str) -> None:
    """Write one more file into an exported folder and list it in export.json.

    Raises:
        SplitQError: the folder cannot be written, or is none.
    """
    manifest = read_export(folder)
    write_bytes(folder / name, content.encode())
    entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    write_json(folder / EXPORT_FILE, {**manifest, "files": {**manifest["files"], name: entry}})


def read_export(folder: Path) -> dict[str, Any]:
    """The checked content of an exported folder's export.json.

    Raises:
        SplitQError: the folder is missing.
        ArtifactError: no export.json, a newer schema, or a listed file is missing or of another size.
    """
    if not folder.is_dir():
        raise SplitQError(f"exported model {folder}: expected a folder, found none; check the path")
    path = folder / EXPORT_FILE
    if not path.is_file():
        raise ArtifactError(
            f"exported model {folder}: expected {EXPORT_FILE}, found none; make the folder with `splitq-edge export`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        files = {name: int(entry["bytes"]) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: expected the JSON of an export ({error!r}); export the model again") from error
    if not isinstance(schema, int) or schema > EXPORT_SCHEMA:
        raise ArtifactError(
            f"{path}: expected schema {EXPORT_SCHEMA} or older, got {schema!r}; upgrade splitq-edge to read this export"
        )
    for name, size in files.items():
        check_file(folder, name, size)
    return dict(content)


def check_file(folder: Path, name: str, size: int) -> None:
    """Check that a listed file is there in its full length.

    Raises:
        ArtifactError: it is not.
    """
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a file of {size} bytes, found none; copy the whole exported folder")
    found = path.stat().st_size
    if found != size:
        raise ArtifactError(f"{path}: expected {size} bytes, got {found}; copy the exported folder again")


def check_target(out: Path, *, force: bool, marker: str = EXPORT_FILE) -> None:
    """Check that a folder may be written to `out`; called before any work is done.

    Args:
        out: the folder.
        force: whether it may replace an earlier one.
        marker: file by which an earlier one is known.

    Raises:
        SplitQError: `out` has no name of its own, lies where nothing can be written, is a file, or a non-empty folder
            without `force`, or one that `force` may not replace.
    """
    if out.name in ("", ".."):
        raise SplitQError(f"output {out}: expected the name of a folder, got no name; write it out")
    if out.exists() and not out.is_dir():
        raise SplitQError(f"output {out}: expected a folder, got a file; choose another name")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise SplitQError(f"output {out}: expected a writable place, {place} is none; choose another")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise SplitQError(f"output {out}: expected an empty or new folder, it has files; use --force to replace it")
    if not (out / marker).is_file():
        raise SplitQError(
            f"output {out}: only what splitq-edge wrote is replaced and this one has no {marker}; "
            "choose another name or empty it yourself"
        )


@contextmanager
def staged_folder(out: Path, *, force: bool, marker: str = EXPORT_FILE) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name when the block ends well and vanishes when it does not.

    Args:
        out: see `check_target`, as the others.
        force: see there.
        marker: see there.

    Raises:
        SplitQError: see `check_target`; or the parent folder cannot be written.
    """
    import shutil
    import tempfile

    check_target(out, force=force, marker=marker)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise SplitQError(f"output {out}: expected a writable place ({error.strerror}); choose another") from error
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; what was there goes only after the new folder stands in its place."""
    if not out.exists():
        staging.rename(out)
        return
    import shutil
    import tempfile

    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    try:
        out.rename(aside / "old")
        staging.rename(out)
    except BaseException:
        if (aside / "old").exists():
            (aside / "old").rename(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
