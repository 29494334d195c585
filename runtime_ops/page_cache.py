"""Where a model's weights lie in memory once the system has read them from their file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHUNK = 64 << 20  # bytes a call


def read_through(path: Path) -> None:
    """Have a file read from one end to the other before it is mapped; one that is in memory stays as it lies there.

    ONNX Runtime maps every large weight by itself and touches it here and there, so that Linux reads it in many pieces
    and keeps much of it in single pages of 4 KiB. Read as one stream it comes into pages of up to 2 MiB where the file
    system has them (seen on ext4, kernel 6.18), and the processor finds their places faster at every step
    (docs/benchmarks/models.md). Nothing is copied. Elsewhere than on Linux, and of what is no file or cannot be read,
    this does nothing: who maps it will tell.

    Args:
        path: any path.
    """
    if sys.platform != "linux":
        return
    try:
        if not path.is_file():
            return
        with path.open("rb") as file, open(os.devnull, "wb") as nowhere:
            done, size = 0, os.fstat(file.fileno()).st_size
            while done < size:
                sent = os.sendfile(nowhere.fileno(), file.fileno(), done, min(CHUNK, size - done))
                if sent == 0:
                    return
                done += sent
    except OSError:
        return
