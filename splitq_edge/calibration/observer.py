"""What calibration records of a site: magnitudes per modality and an even sample of the rows of each sample."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from splitq_edge.errors import SplitQError
from splitq_edge.modality import TEXT, VISION
from splitq_edge.parallel import Processes

SITE_ROWS = 4096  # rows of a modality kept a site; at 18944 channels that is 310 MB in float32


@dataclass(frozen=True)
class SiteStats:
    """Statistics of the activation that enters a site.

    Attributes:
        name: site name, for messages.
        vision_absmax: [K] float32, largest magnitude over vision tokens (zeros if none came).
        text_absmax: [K] float32, the same over text tokens.
        text_rows: [T, K] float32, an even sample of the text tokens, in the order of the samples.
        vision_rows: [V, K] float32, the same of the vision tokens.
        vision_tokens: vision tokens seen.
        text_tokens: text tokens seen.
    """

    name: str
    vision_absmax: torch.Tensor
    text_absmax: torch.Tensor
    text_rows: torch.Tensor
    vision_rows: torch.Tensor
    vision_tokens: int
    text_tokens: int

    @property
    def channels(self) -> int:
        """K."""
        return self.vision_absmax.numel()

    @property
    def absmax(self) -> torch.Tensor:
        """[K] float32, over all tokens."""
        return torch.maximum(self.vision_absmax, self.text_absmax)


@dataclass
class Observer:
    """Collects `SiteStats` batch by batch.

    Args:
        name: site name.
        samples: how many samples will come in all processes; every sample may keep an equal share of the rows, so the
            result depends neither on batches nor on processes.
        max_rows: rows of a modality kept in all.
    """

    name: str
    samples: int
    max_rows: int = SITE_ROWS
    _absmax: dict[int, torch.Tensor] = field(init=False, default_factory=dict)
    _tokens: dict[int, int] = field(init=False)
    _rows: list[tuple[int, int, torch.Tensor]] = field(init=False, default_factory=list)  # sample, modality, rows

    def __post_init__(self) -> None:
        self._tokens = {TEXT: 0, VISION: 0}

    def update(self, x: torch.Tensor, modality: torch.Tensor, keep: torch.Tensor, samples: torch.Tensor) -> None:
        """Add a batch.

        Args:
            x: [batch, sequence, K] float.
            modality: [batch, sequence] int8.
            keep: [batch, sequence] bool, False for padding.
            samples: [batch] int64, number of each sample.
        """
        x = x.detach().float()
        for kind in (TEXT, VISION):
            chosen = keep & (modality == kind)
            rows = x[chosen]
            known = self._absmax.get(kind, torch.zeros(x.shape[-1], device=x.device))
            self._absmax[kind] = torch.maximum(known, rows.abs().amax(0)) if rows.shape[0] else known
            self._tokens[kind] += rows.shape[0]
            for index, sample in enumerate(samples.tolist()):
                self._keep(sample, kind, x[index][chosen[index]])

    def _keep(self, sample: int, kind: int, rows: torch.Tensor) -> None:
        share = max(1, self.max_rows // self.samples)
        if self.samples > self.max_rows and sample % -(-self.samples // self.max_rows):
            return
        if rows.shape[0]:
            self._rows.append((sample, kind, rows[:: -(-rows.shape[0] // share)].clone()))

    def stats(self, processes: Processes) -> SiteStats:
        """What was seen so far, by all processes.

        Raises:
            SplitQError: a value is NaN or infinite.
        """
        device = self._absmax[TEXT].device
        kept = [entry for part in processes.gather(self._rows) for entry in part]
        kept.sort(key=lambda entry: entry[:2])
        tokens = processes.sum(torch.tensor([self._tokens[TEXT], self._tokens[VISION]], device=device))
        rows = {
            kind: torch.cat([rows.to(device) for _, of, rows in kept if of == kind] or [self._none()])
            for kind in (TEXT, VISION)
        }
        absmax = {kind: processes.max(self._absmax[kind]) for kind in (VISION, TEXT)}
        if not all(bool(torch.isfinite(values).all()) for values in absmax.values()):
            raise SplitQError(
                f"{self.name}: expected finite activations, got NaN or infinity; check the checkpoint's weights"
            )
        return SiteStats(
            self.name,
            vision_absmax=absmax[VISION],
            text_absmax=absmax[TEXT],
            text_rows=rows[TEXT],
            vision_rows=rows[VISION],
            vision_tokens=int(tokens[1]),
            text_tokens=int(tokens[0]),
        )

    def _none(self) -> torch.Tensor:
        absmax = self._absmax[TEXT]
        return absmax.new_zeros(0, absmax.numel())
