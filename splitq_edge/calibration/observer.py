"""What calibration records of a site: magnitudes per modality and a bounded sample of text rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

TEXT_ROWS = 4096  # rows kept a site; at 18944 channels that is 310 MB in float32


@dataclass(frozen=True)
class SiteStats:
    """Statistics of the activation that enters a site.

    Attributes:
        name: site name, for messages.
        vision_absmax: [K] float32, largest magnitude over vision tokens (zeros if none came).
        text_absmax: [K] float32, the same over text tokens.
        text_rows: [T, K] float32, an even sample of the text tokens.
        vision_tokens: vision tokens seen.
        text_tokens: text tokens seen.
    """

    name: str
    vision_absmax: torch.Tensor
    text_absmax: torch.Tensor
    text_rows: torch.Tensor
    vision_tokens: int
    text_tokens: int

    @property
    def channels(self) -> int:
        """K."""
        return self.vision_absmax.numel()


@dataclass
class Observer:
    """Collects `SiteStats` batch by batch."""

    name: str
    channels: int
    max_text_rows: int = TEXT_ROWS
    _absmax: list[torch.Tensor] = field(init=False)
    _tokens: list[int] = field(init=False)
    _rows: list[torch.Tensor] = field(init=False)
    _stride: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        self._absmax = [torch.zeros(self.channels), torch.zeros(self.channels)]
        self._tokens = [0, 0]
        self._rows = []

    def update(self, x: torch.Tensor, modality: torch.Tensor) -> None:
        """Add tokens.

        Args:
            x: [tokens, K] float.
            modality: [tokens] int8, 0 text and 1 vision; leave padding out beforehand.
        """
        x = x.detach().float()
        for kind in (0, 1):
            rows = x[modality == kind]
            if rows.shape[0]:
                self._absmax[kind] = torch.maximum(self._absmax[kind], rows.abs().amax(0).cpu())
            if kind == 0:
                self._keep(rows.cpu())
            self._tokens[kind] += rows.shape[0]

    def _keep(self, rows: torch.Tensor) -> None:
        """Keep every `stride`-th text token; when the store is full, drop every second row and double the stride."""
        first = -self._tokens[0] % self._stride
        self._rows.extend(row.clone() for row in rows[first :: self._stride])
        while len(self._rows) > self.max_text_rows:
            self._rows = self._rows[::2]
            self._stride *= 2

    def stats(self) -> SiteStats:
        """What was seen so far."""
        rows = torch.stack(self._rows) if self._rows else torch.zeros(0, self.channels)
        return SiteStats(self.name, self._absmax[1], self._absmax[0], rows, self._tokens[1], self._tokens[0])
