"""The benchmark's native library (peers/): llama.cpp's linear layers and the processor's integer peak."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np

UNIQUE = 64  # output channels that are quantized; the others repeat them
FLOATS = POINTER(c_float)


class NativeLibrary:
    """peers/build.sh's library.

    Args:
        path: libbench_peers.so.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        signatures: dict[str, tuple[object, list[object]]] = {
            "ggml_peer_new": (
                c_void_p,
                [c_char_p, c_int, FLOATS, c_int64, c_int64, c_int64, c_int64, c_int64, c_int],
            ),
            "ggml_round_trip": (c_int, [c_char_p, FLOATS, c_int64, c_int64, FLOATS]),
            "ggml_peer_delete": (None, [c_void_p]),
            "ggml_peer_weight_bytes": (c_int64, [c_void_p]),
            "ggml_peer_set_x": (None, [c_void_p, FLOATS]),
            "ggml_peer_run": (c_int, [c_void_p]),
            "ggml_peer_get_y": (None, [c_void_p, FLOATS]),
            "peak_gops": (c_double, [c_int]),
            "read_gbps": (c_double, [c_int]),
            "read_on_gbps": (c_double, [POINTER(c_int64), c_int64, c_int, POINTER(c_int), c_int]),
            "round_trip_ns": (c_double, [c_int, c_int]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments

    def peak_gops(self, threads: int) -> float:
        """10^9 operations a second of the widest int8 dot product, 0 if unknown."""
        return float(self.functions.peak_gops(threads))

    def read_gbps(self, threads: int) -> float:
        """10^9 bytes a second from memory."""
        return float(self.functions.read_gbps(threads))

    def read_on_gbps(self, values: np.ndarray, passes: int, processors: list[int]) -> float:
        """10^9 bytes a second at which int64 values are read, a part of them by each processor; 0 if unknown.

        Args:
            values: [N] int64, N a multiple of 16 for each processor.
            passes: times that they are read.
            processors: of the threads, one each.
        """
        numbers = (c_int * len(processors))(*processors)
        data = values.ctypes.data_as(POINTER(c_int64))
        return float(self.functions.read_on_gbps(data, values.size, passes, numbers, len(processors)))

    def round_trip_ns(self, first: int, second: int) -> float:
        """Nanoseconds that a cache line takes from one processor to another and back, 0 if unknown."""
        return float(self.functions.round_trip_ns(first, second))


def floats(array: np.ndarray) -> object:
    return array.ctypes.data_as(FLOATS)


class GgmlLayer:
    """Copies of one quantized weight, multiplied with the same rows.

    Args:
        library: the native library.
        type_name: ggml's name of the type, as "q4_0".
        repacked: whether the weight is stored in ggml's order for this processor.
        x: [M, K] float32.
        n: output channels.
        copies: weights.
        threads: threads.

    Raises:
        ValueError: ggml has no such type, or cannot store K channels in it, or has no order of its own for it.
    """

    def __init__(
        self, library: NativeLibrary, type_name: str, repacked: bool, x: np.ndarray, n: int, copies: int, threads: int
    ) -> None:
        self.functions = library.functions
        self.type_name = type_name.encode()
        m, k = x.shape
        self.x, self.n = np.ascontiguousarray(x, np.float32), n
        self.weight = np.random.default_rng(k).standard_normal((UNIQUE, k), np.float32)
        self.peer = self.functions.ggml_peer_new(
            self.type_name, repacked, floats(self.weight), UNIQUE, k, n, copies, m, threads
        )
        if not self.peer:
            raise ValueError(f"ggml: {type_name}{' repacked' if repacked else ''} does not take {k} channels here")
        self.functions.ggml_peer_set_x(self.peer, floats(self.x))

    def __del__(self) -> None:
        if getattr(self, "peer", None):
            self.functions.ggml_peer_delete(self.peer)

    def run(self) -> None:
        """The products of all copies.

        Raises:
            RuntimeError: ggml could not compute them.
        """
        if not self.functions.ggml_peer_run(self.peer):
            raise RuntimeError("ggml: the product failed")

    def weight_bytes(self) -> int:
        """Of one copy."""
        return int(self.functions.ggml_peer_weight_bytes(self.peer))

    def error(self) -> float:
        """Largest difference from the float product with the rounded weight, relative to its largest magnitude."""
        rounded = np.empty_like(self.weight)
        self.functions.ggml_round_trip(self.type_name, floats(self.weight), *self.weight.shape, floats(rounded))
        y = np.empty((len(self.x), self.n), np.float32)
        self.functions.ggml_peer_get_y(self.peer, floats(y))
        wanted = np.tile(self.x @ rounded.T, (1, -(-self.n // UNIQUE)))[:, : self.n]
        return float(np.abs(y - wanted).max() / np.abs(wanted).max())
