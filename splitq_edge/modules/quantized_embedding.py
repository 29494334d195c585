"""Token embeddings as integers with one scale a row: rows of their own, or those of a quantized output projection."""

from __future__ import annotations

import torch
from torch import nn

from splitq_edge.errors import SplitQError
from splitq_edge.modules.split_linear import SplitLinear
from splitq_edge.quant.kv_cache import dequantize_cache, quantize_cache
from splitq_edge.quant.transforms import apply_transform, transposed

# Bits of an output projection whose codes serve as embedding, by the bits that the recipe gives the embedding.
SHARED_BITS = {8: (8, 6), 4: (4,)}


class QuantizedEmbedding(nn.Module):
    """A table of its own, rounded to nearest.

    Args:
        table: [vocabulary, hidden] float32, what the float embedding gives for each token.
        bits: 8 or 4; 4-bit codes lie two a byte, as `quantize_cache` stores them.

    Raises:
        SplitQError: 4 bits and an odd hidden size.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, table: torch.Tensor, bits: int) -> None:
        super().__init__()
        if bits == 4 and table.shape[1] % 2:
            raise SplitQError(
                f"recipe: embedding: expected none or W8 for an odd hidden size of {table.shape[1]}, got W4; "
                "change it in the recipe"
            )
        self.bits = bits
        codes, scale = quantize_cache(table, bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [...] int64 -> [..., hidden] float32."""
        codes, scale = (nn.functional.embedding(input_ids, table) for table in (self.codes, self.scale))
        return dequantize_cache(codes, scale, self.bits)


class HeadEmbedding(nn.Module):
    """The rows of the weight that a tied model's output projection holds, out of its integers.

    The projection's site stores P^-1 diag(1 / s) W; a row of W is a column of that, brought back by s and P (as in
    `SplitLinear.dequantized_weight`).

    Args:
        head: the site; one channel group in its natural order, no correction.
        codes: its integers in another order, see `_columns`; none: as the site has them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    channel_scale: torch.Tensor | None
    p1: torch.Tensor | None
    p2: torch.Tensor | None

    def __init__(self, head: SplitLinear, codes: torch.Tensor | None = None) -> None:
        super().__init__()
        self.head = [head]  # in a list: no module of the embedding's
        main = head.groups["main"]
        self.bits = main.bits
        self.register_buffer("codes", main.qweight if codes is None else codes)
        self.register_buffer("scale", main.scale)
        self.register_buffer("channel_scale", head.channel_scale)
        for name, factor in (("p1", main.p1), ("p2", main.p2)):
            self.register_buffer(name, None if factor is None else transposed(factor))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [...] int64 -> [..., hidden] float32."""
        ids = input_ids.reshape(-1)
        rows = self._columns(ids) * nn.functional.embedding(ids, self.scale[:, None])
        if self.p1 is not None and self.p2 is not None:
            rows = apply_transform(rows, self.p1, self.p2)
        if self.channel_scale is not None:
            rows = rows * self.channel_scale
        return rows.reshape(*input_ids.shape, rows.shape[-1])

    def _columns(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes of tokens: ids [n] -> [n, hidden] float32."""
        return self.codes.index_select(1, ids).T.float()


def can_share(head: SplitLinear | None, bits: int) -> bool:
    """Whether a quantized output projection can serve as an embedding of 8 or 4 bits."""
    return head is not None and head.groups["main"].bits in SHARED_BITS[bits] and head.widths[1:] == (0, 0)
