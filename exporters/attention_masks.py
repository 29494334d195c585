"""Attention masks of decoders whose tokens do not all look back only."""

from __future__ import annotations

import torch

MASKED = torch.finfo(torch.float32).min


def causal_and_group_masks(attention_mask: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What new tokens may look at: those up to themselves, and those of their own group.

    Args:
        attention_mask: [batch, past + sequence] int64, 0 for padding.
        groups: [batch, sequence] int64; tokens of one number from 0 up see each other, -1 belongs to no group. A group
            has all its tokens in one call.

    Returns:
        [sequence, past + sequence] and [batch, sequence, past + sequence] bool; padding is not left out yet.
    """
    total, new = attention_mask.shape[1], groups.shape[1]
    keys = torch.arange(total)
    causal = keys <= keys[total - new :, None]  # [sequence, total]
    of_keys = torch.cat([groups.new_full((groups.shape[0], total - new), -1), groups], 1)
    together = (groups[:, :, None] == of_keys[:, None]) & (groups[:, :, None] >= 0)
    return causal, together


def near_mask(attention_mask: torch.Tensor, new: int, window: int) -> torch.Tensor:
    """Whether a key lies within the window that ends with a new token: [batch, sequence, past + sequence] bool.

    Positions count what is no padding, so padding between tokens does not narrow the window.
    """
    positions = attention_mask.cumsum(-1)
    return positions[:, None] > positions[:, positions.shape[1] - new :, None] - window


def additive(allowed: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """As attention adds it: [batch, 1, sequence, past + sequence] float32, 0 where a token may look."""
    seen = allowed & attention_mask[:, None].bool()
    return torch.where(seen, 0.0, MASKED)[:, None]


def image_groups(modality: torch.Tensor) -> torch.Tensor:
    """Groups of the tokens of each picture: runs of image tokens, [batch, sequence] int64."""
    image = modality != 0
    before = torch.cat([torch.zeros_like(image[:, :1]), image[:, :-1]], 1)
    return torch.where(image, (image & ~before).long().cumsum(1) - 1, -1)


def prompt_groups(prompt: torch.Tensor) -> torch.Tensor:
    """One group of all tokens of the prompt, [batch, sequence] int64."""
    return prompt.long() - 1
