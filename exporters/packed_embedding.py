"""Embedding rows straight out of a packed output projection, so that a tied weight lies in the folder once."""

from __future__ import annotations

import torch
from torch import nn

from splitq_edge.modules.quantized_embedding import HeadEmbedding
from splitq_edge.runtime_ops.packing import HEADER, PANEL, QUAD, pack


class PackedHeadEmbedding(HeadEmbedding):
    """`HeadEmbedding` over the payload of the packed weight (docs/ops.md, layout 1, 8 bits).

    A panel holds 16 tokens; in it the 4 bytes of token n and of channels 4 b to 4 b + 3 are piece 16 b + n.
    """

    places: torch.Tensor

    def __init__(self, embedding: HeadEmbedding) -> None:
        (head,) = embedding.head
        self.hidden, payload = head.in_features, pack(head.groups["main"].qweight.cpu().numpy(), 8)[HEADER.size :]
        super().__init__(head, torch.from_numpy(payload.copy()).reshape(-1, QUAD))
        blocks = -(-self.hidden // QUAD)
        self.pieces = PANEL * blocks  # of a panel
        self.register_buffer("places", PANEL * torch.arange(blocks))

    def _columns(self, ids: torch.Tensor) -> torch.Tensor:
        panel = torch.div(ids, PANEL, rounding_mode="trunc")
        first = ids + panel * (self.pieces - PANEL)  # of the token's pieces
        pieces = nn.functional.embedding(first[:, None] + self.places, self.codes)  # [n, blocks, 4]
        return pieces.flatten(1)[:, : self.hidden].float() - 128.0
