"""Embedding rows straight out of a packed output projection, so that a tied weight lies in the folder once."""

from __future__ import annotations

import torch
from torch import nn

from splitq_edge.modules.quantized_embedding import HeadEmbedding
from splitq_edge.runtime_ops.packing import FIELDS, HEADER, PANEL, QUAD, VECTORS, pack


class PackedHeadEmbedding(HeadEmbedding):
    """`HeadEmbedding` over the payload of the packed weight (docs/ops.md, layout 1, 8, 6 or 4 bits).

    A panel holds 16 tokens; in it the 4 bytes of token n in vector v are piece 16 v + n. Of 8 bits a vector is a block
    of 4 channels, of 4 bits one of 8, of 6 bits three vectors are a block of 16.
    """

    places: torch.Tensor

    def __init__(self, embedding: HeadEmbedding) -> None:
        (head,) = embedding.head
        bits = embedding.bits
        self.hidden = head.in_features
        payload = pack(head.groups["main"].qweight.cpu().numpy(), bits)[HEADER.size :]
        super().__init__(head, torch.from_numpy(payload.copy()).reshape(-1, QUAD))
        vectors = -(-self.hidden // (QUAD * FIELDS[bits])) * VECTORS[bits]
        self.pieces = PANEL * vectors  # of a panel
        self.register_buffer("places", PANEL * torch.arange(vectors))

    def _columns(self, ids: torch.Tensor) -> torch.Tensor:
        panel = torch.div(ids, PANEL, rounding_mode="trunc")
        first = ids + panel * (self.pieces - PANEL)  # of the token's pieces
        pieces = nn.functional.embedding(first[:, None] + self.places, self.codes).float()  # [n, vectors, 4]
        if self.bits == 6:
            pieces = _six_bits(pieces)
        elif self.bits == 4:
            pieces = _four_bits(pieces)
        return pieces.flatten(1)[:, : self.hidden] - float(1 << (self.bits - 1))


def stored_embedding(table: nn.Module, *, packed: bool) -> nn.Module:
    """The model's embedding as a graph is to hold it.

    Args:
        table: the embedding.
        packed: whether the decoder's weights are packed. Rows of 4 bits always are: no runtime gathers 4-bit integers.
    """
    if isinstance(table, HeadEmbedding) and (packed or table.bits == 4):
        return PackedHeadEmbedding(table)
    return table


def _four_bits(pieces: torch.Tensor) -> torch.Tensor:
    """Bytes [n, blocks, 4] to stored codes [n, blocks, 2 fields, 4]."""
    high = torch.floor(pieces / 16)
    return torch.stack([pieces - 16 * high, high], 2)


def _six_bits(pieces: torch.Tensor) -> torch.Tensor:
    """Bytes [n, 3 blocks, 4] to stored codes [n, blocks, 4 fields, 4]: whole numbers, so floats are exact."""
    block = pieces.unflatten(1, (-1, VECTORS[6]))
    top = torch.floor(block / 64)  # bits 6-7
    fields = (block - 64 * top).unbind(2)
    low, middle, high = top.unbind(2)
    return torch.stack([*fields, low + 4 * middle + 16 * high], 2)
