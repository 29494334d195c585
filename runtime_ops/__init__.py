"""Native kernels of the `ai.splitq` ops: where the library lies and how a session gets it."""

from __future__ import annotations

import functools
import logging
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from splitq_edge.errors import SplitQError

if TYPE_CHECKING:
    import onnxruntime

LIBRARY_VARIABLE = "SPLITQ_LIBRARY"

_logger = logging.getLogger(__name__)


def library_path() -> Path | None:
    """Path of the native library, or None where the package was installed without one.

    The environment variable SPLITQ_LIBRARY names another file, for instance one from a build folder.

    Raises:
        SplitQError: SPLITQ_LIBRARY names no file.
    """
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        path = Path(chosen).resolve()
        if not path.is_file():
            raise SplitQError(
                f"{LIBRARY_VARIABLE}: expected the path of the native library, got {chosen!r}; "
                "correct the variable or unset it"
            )
        return path
    candidates = (folder / _library_name() for folder in _package_folders())
    return next((path for path in candidates if path.is_file()), None)


def register(session_options: onnxruntime.SessionOptions) -> bool:
    """Let sessions made with these options run the `ai.splitq` ops as native kernels.

    Call it once for each SessionOptions object: ONNX Runtime refuses a second registration of a domain and
    offers no way to ask whether one happened.

    Returns:
        False if there is no native library; models still run then, slower, through their function bodies.

    Raises:
        SplitQError: SPLITQ_LIBRARY names no file.
    """
    path = library_path()
    if path is None:
        _warn_missing_library()
        return False
    session_options.register_custom_ops_library(str(path))
    return True


def _library_name() -> str:
    if sys.platform == "win32":
        return "splitq_ops.dll"
    return "libsplitq_ops.dylib" if sys.platform == "darwin" else "libsplitq_ops.so"


def _package_folders() -> list[Path]:
    """Folders that may hold the library: an editable install keeps it apart from the Python sources."""
    installed = Path(sysconfig.get_path("platlib"), "splitq_edge", "runtime_ops")
    return [*map(Path, __path__), installed]


@functools.cache
def _warn_missing_library() -> None:
    _logger.warning(
        "the native library %s is not installed: models run through their function bodies, slower; "
        "install a C++17 compiler and reinstall splitq-edge to get it",
        _library_name(),
    )
