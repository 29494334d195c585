"""Why a file of weights cannot be read, in a user's words."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs"


def weights_damage(file: Path, error: Exception | None = None) -> str:
    """What is wrong with a safetensors file and what to do; the end of a message that names the file.

    Args:
        file: that cannot be read.
        error: what the reader said of it.
    """
    if not file.is_file():
        return "expected a whole safetensors file, found none; fetch it again"
    with file.open("rb") as opened:
        begin = opened.read(len(LFS_POINTER))
    if begin == LFS_POINTER:
        return (
            "expected a whole safetensors file, got a Git LFS pointer, which only names it; run git lfs pull in the "
            "checkpoint's folder, or fetch the file from the hub"
        )
    size = file.stat().st_size
    if not size:
        return "expected a whole safetensors file, got an empty one; fetch it again"
    return f"expected a whole safetensors file, got {size} bytes that are none ({error}); fetch it again"
