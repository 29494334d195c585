"""Which token is text and which is vision: the int8 modality mask and the way it reaches the quantized layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TEXT = 0
VISION = 1


def modality_of(input_ids: torch.Tensor, image_token_id: int | None) -> torch.Tensor:
    """Modality mask of a token sequence.

    Args:
        input_ids: [batch, sequence] integer.
        image_token_id: id of the token that image features replace; None for a text-only model.

    Returns:
        [batch, sequence] int8, 0 text and 1 vision.
    """
    import torch

    if image_token_id is None:
        return torch.zeros_like(input_ids, dtype=torch.int8)
    return (input_ids == image_token_id).to(torch.int8)


class ModalityContext:
    """Carries the mask of the running forward pass to layers whose signature has no room for it.

    One object is shared by all quantized sites of a model. The model's forward sets it, the sites read it.
    """

    def __init__(self) -> None:
        self._mask: torch.Tensor | None = None
        self._keep: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor | None:
        """The [batch, sequence] int8 mask of the running pass, None outside one."""
        return self._mask

    @property
    def keep(self) -> torch.Tensor | None:
        """[batch, sequence] bool, False for padding; None where nothing is padded."""
        return self._keep

    @contextmanager
    def using(self, mask: torch.Tensor | None, keep: torch.Tensor | None = None) -> Iterator[None]:
        """Set the mask (and what is no padding) for the passes run inside the `with` block."""
        before, self._mask, self._keep = (self._mask, self._keep), mask, keep
        try:
            yield
        finally:
            self._mask, self._keep = before
