"""`splitq-edge doctor`: versions and the native library, for a bug report."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from splitq_edge import __version__, runtime_ops

PACKAGES = (
    "onnxruntime",
    "onnxruntime-genai",
    "onnxruntime-extensions",
    "onnxruntime-qnn",
    "numpy",
    "transformers",
    "torch",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "easy-vqa",
)


def report() -> Iterator[str]:
    """Lines of the report."""
    yield f"splitq-edge {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield from (f"{name} {_version(name)}" for name in PACKAGES)
    yield _library()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _library() -> str:
    import onnxruntime

    path = runtime_ops.library_path()
    if path is None:
        return "native library: none; models run through their function bodies"
    options = onnxruntime.SessionOptions()
    try:
        runtime_ops.register(options)
        isa = native_isa(path)
    except Exception as error:
        return f"native library: {path.name} cannot be loaded ({' '.join(str(error).split())})"
    return f"native library: {path.name}, {isa} kernels"


def native_isa(path: Path) -> str:
    """The instruction set that the library chose: of what it has, the best of this processor that SPLITQ_ISA allows."""
    name = ctypes.CDLL(str(path)).SplitQIsa
    name.restype = ctypes.c_char_p
    return name().decode()
