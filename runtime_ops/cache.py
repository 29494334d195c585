"""The key-value cache of a batch, in the two forms that decoders take.

A decoder of fused attention writes the new tokens into the buffers that hold the old ones, where there is room for
them; another decoder returns everything anew at every call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

LEAST_ROOM = 32  # tokens that a buffer takes at least beyond those it is made for
GROWTH = 1.5  # of a buffer that is full


class Cache(Protocol):
    """What `ExportedModel.decode` goes on from.

    Attributes:
        shift: [batch] int64, by how much the positions of what follows are ahead of its count of tokens: a picture may
            take fewer positions than tokens (`splitq_edge.mrope`); None where positions are counts.
    """

    shift: np.ndarray | None

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    def take(self, rows: np.ndarray) -> Cache:
        """A new cache of the batch that these rows make.

        Args:
            rows: [batch] integers; a row may be taken more than once.
        """

    def with_room(self, length: int) -> Cache:
        """This cache, or one that need not grow before it holds so many tokens."""

    def step(self, session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, Cache]:
        """Run the decoder.

        Args:
            session: the decoder.
            feeds: all its inputs but the past.

        Returns:
            Logits and the cache with the new tokens in it.
        """


@dataclass
class ReturnedCache:
    """A cache that the graph returns anew.

    Attributes:
        values: by decoder input name, [batch, kv_heads, past, channels]: keys and values in float32 or float16, or as
            int8 codes (uint8: two 4-bit codes a byte) with one float32 scale a token and head beside each.
        shift: see `Cache`.
    """

    values: dict[str, np.ndarray]
    shift: np.ndarray | None = None

    @property
    def length(self) -> int:
        """See `Cache.length`."""
        return next(iter(self.values.values())).shape[2]

    def take(self, rows: np.ndarray) -> ReturnedCache:
        """See `Cache.take`."""
        return ReturnedCache({name: value[rows] for name, value in self.values.items()}, _rows(self.shift, rows))

    def with_room(self, length: int) -> ReturnedCache:
        """See `Cache.with_room`."""
        return self

    def step(self, session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, ReturnedCache]:
        """See `Cache.step`."""
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {**feeds, **self.values}), strict=True))
        grown = {name: outputs[_present(name)] for name in self.values}
        return outputs["logits"], ReturnedCache(grown)


@dataclass
class BufferCache:
    """The first `length` tokens of buffers that the decoder writes to.

    A step needs no copy while there is room and nobody else went on from the same buffers.
    """

    buffers: _Buffers
    length: int
    shift: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> BufferCache:
        """See `Cache.take`."""
        room = self.length + LEAST_ROOM
        return BufferCache(self.buffers.copied(self.length, room, rows), self.length, _rows(self.shift, rows))

    def with_room(self, length: int) -> BufferCache:
        """See `Cache.with_room`."""
        if length <= self.buffers.room:
            return self
        return BufferCache(self.buffers.copied(self.length, length + LEAST_ROOM), self.length, self.shift)

    def step(self, session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, BufferCache]:
        """See `Cache.step`."""
        length = self.length + feeds["position_ids"].shape[-1]
        buffers = self.buffers
        if length > buffers.room:
            room = max(length + LEAST_ROOM, int(GROWTH * buffers.room))
            buffers = buffers.copied(self.length, room)
        elif self.length != buffers.filled:
            buffers = buffers.copied(self.length, buffers.room)
        logits = buffers.run(session, feeds)
        buffers.filled = length
        return logits, BufferCache(buffers, length)


@dataclass
class _Buffers:
    """Keys and values by decoder input name, [batch, kv_heads, room, head_dim] floats; the first `filled` are used."""

    values: dict[str, np.ndarray]
    filled: int = 0
    _binding: Any = field(default=None, repr=False)
    _vocabulary: int | None = field(default=None, repr=False)

    @property
    def room(self) -> int:
        """Tokens that fit."""
        return next(iter(self.values.values())).shape[2]

    def copied(self, length: int, room: int, rows: np.ndarray | None = None) -> _Buffers:
        """Other buffers with the same first tokens, of some rows of the batch if they are given."""
        copies = {}
        for name, value in self.values.items():
            used = value[:, :, :length] if rows is None else value[rows, :, :length]
            batch, heads, _, channels = used.shape
            copies[name] = np.zeros((batch, heads, room, channels), value.dtype)
            copies[name][:, :, :length] = used
        return _Buffers(copies, length)

    def run(self, session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Logits; the graph writes its new keys and values behind the old ones."""
        if self._binding is None:  # the addresses stay, so they are given once
            self._binding = session.io_binding()
            for name, value in self.values.items():
                place = ("cpu", 0, value.dtype, value.shape, value.ctypes.data)
                self._binding.bind_input(name, *place)
                self._binding.bind_output(_present(name), *place)
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # alive until the run ends
        for name, value in arrays.items():  # as places: bind_cpu_input knows no input that has a default
            self._binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        logits = np.empty(self._logits_shape(session, feeds), np.float32)
        self._binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        session.run_with_iobinding(self._binding)
        return logits  # asking the binding for it would wrap every tensor of the cache too

    def _logits_shape(self, session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> tuple[int, ...]:
        """[batch, kept positions, vocabulary]."""
        if self._vocabulary is None:
            self._vocabulary = next(value.shape[-1] for value in session.get_outputs() if value.name == "logits")
        batch, tokens = feeds["inputs_embeds"].shape[:2]
        kept = int(feeds["logits_to_keep"][0]) if "logits_to_keep" in feeds else 0
        return batch, min(kept, tokens) if kept else tokens, self._vocabulary


def empty_returned(shapes: dict[str, tuple[tuple[int, ...], str]]) -> ReturnedCache:
    """A cache without tokens.

    Args:
        shapes: by decoder input name, shape with 0 tokens and type.
    """
    return ReturnedCache({name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})


def empty_buffers(shapes: dict[str, tuple[tuple[int, ...], str]], room: int) -> BufferCache:
    """A cache without tokens.

    Args:
        shapes: see `empty_returned`.
        room: tokens that fit before the buffers must grow.
    """
    values = {
        name: np.zeros((*shape[:2], max(room, LEAST_ROOM), shape[3]), dtype) for name, (shape, dtype) in shapes.items()
    }
    return BufferCache(_Buffers(values), 0)


def _rows(shift: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if shift is None else shift[rows]


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")
