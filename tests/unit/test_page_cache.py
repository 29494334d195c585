"""Weights' files are read as one stream before they are mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from splitq_edge.runtime_ops.page_cache import read_through

SIZE = 6 << 20


def pages_in_memory(path: Path) -> float:
    """Share of a file's pages that the system holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, np.uint8)
        states = (ctypes.c_ubyte * -(-len(array) // mmap.PAGESIZE))()
        address, length = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(array))
        assert ctypes.CDLL(None).mincore(address, length, states) == 0
        del array
        return float(np.mean(np.frombuffer(states, np.uint8) & 1))


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache of Linux")
def test_a_file_is_in_memory_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx.data"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(path) == 1:
        pytest.skip("this file system keeps its files in memory")
    read_through(path)
    assert pages_in_memory(path) == 1


def test_what_cannot_be_read_is_left_to_who_maps_it(tmp_path: Path) -> None:
    read_through(tmp_path / "missing")
    read_through(tmp_path)
    (tmp_path / "empty").touch()
    read_through(tmp_path / "empty")


def test_other_systems_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"1")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "sendfile", lambda *_: pytest.fail("read"), raising=False)
    read_through(path)
