"""How a prompt is fed to decoder graphs of fixed size: chunks, single tokens, slots of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.modality import VISION

PREFILL, STEP = "decoder_prefill", "decoder_step"


@dataclass
class StaticCache:
    """Key-value cache with a fixed number of slots.

    Attributes:
        values: by decoder input name, [batch, kv_heads, context, head_dim] codes (float32 while ranges are measured).
        filled: slots in use, the same in every row; padding takes slots too.
    """

    values: dict[str, np.ndarray]
    filled: int = 0

    @property
    def length(self) -> int:
        """Slots in use."""
        return self.filled

    def take(self, rows: np.ndarray) -> StaticCache:
        """See `Cache.take`."""
        return StaticCache({name: value[rows] for name, value in self.values.items()}, self.filled)


@dataclass(frozen=True)
class Call:
    """One call of a static decoder.

    Attributes:
        part: `PREFILL` or `STEP`.
        feeds: its inputs.
        used: how many of its tokens are real; the last one is repeated behind them.
    """

    part: str
    feeds: dict[str, np.ndarray]
    used: int


@dataclass(frozen=True)
class StaticShape:
    """Sizes and conventions of the static graphs, `static` in export.json.

    Attributes:
        context: cache slots.
        chunk: tokens of a prefill call.
        blocked: attention bias of a slot that is not seen.
        text_rows: whether the decoder reads which rows are text.
    """

    context: int
    chunk: int
    blocked: float
    text_rows: bool

    def calls(
        self, embeds: np.ndarray, modality: np.ndarray, seen: np.ndarray, cache: StaticCache, row: int
    ) -> Iterator[Call]:
        """The calls that take one row's new tokens; after each the cache must have been grown (`store`).

        Args:
            embeds: [tokens, hidden] float32.
            modality: [tokens] int8.
            seen: [filled + tokens] integers, 0 for padding.
            cache: of the batch.
            row: the row in it.

        Raises:
            SplitQError: the tokens do not fit into the cache.
        """
        tokens, before = len(embeds), cache.filled
        if before + tokens > self.context:
            raise SplitQError(
                f"prompt: expected at most {self.context} tokens with the answer, got {before + tokens}; "
                "export again with a larger --context"
            )
        part, size = (STEP, 1) if tokens == 1 and before else (PREFILL, self.chunk)
        positions = np.maximum(np.cumsum(seen) - 1, 0)
        for start in range(0, tokens, size):
            used = min(size, tokens - start)
            index = start + np.minimum(np.arange(size), used - 1)  # repeats the last token
            feeds = {
                "inputs_embeds": embeds[None, index],
                "attention_bias": self._bias(seen[: before + start + used], used, size),
                "position_ids": positions[None, before + index].astype(np.int32),
                **{name: value[row : row + 1] for name, value in cache.values.items()},
            }
            if self.text_rows:
                feeds["text_rows"] = (modality[None, index, None] != VISION).astype(np.float32)
            yield Call(part, feeds, used)

    def _bias(self, seen: np.ndarray, used: int, size: int) -> np.ndarray:
        """[1, 1, size, context + size] float32; the last `used` of `seen` are the call's own tokens."""
        past = len(seen) - used
        bias = np.full((size, self.context + size), self.blocked, np.float32)
        bias[:, :past][:, seen[:past] != 0] = 0
        own = np.tril(np.ones((size, used), bool)) & (seen[past:] != 0)
        bias[:, self.context : self.context + used][own] = 0
        bias[used:] = bias[used - 1]
        return bias[None, None]


def store(cache: StaticCache, row: int, at: int, outputs: Mapping[str, np.ndarray], used: int) -> None:
    """Put a call's new keys and values into a row's slots from `at` on."""
    for name, value in cache.values.items():
        value[row, :, at : at + used] = outputs[present_name(name)][0, :, :used]


def present_name(past: str) -> str:
    """The output that belongs to a cache input."""
    return past.replace("past_key_values", "present")
