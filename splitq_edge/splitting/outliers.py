"""Scores of modality-specific outlier channels (MOCD, paper section 4.2, eq. 7-12)."""

from __future__ import annotations

import torch

LLOYD_STEPS = 50


def vision_scores(vision_absmax: torch.Tensor) -> torch.Tensor:
    """s_v(c): largest magnitude of a channel over the vision tokens (eq. 7). [K] float32 in and out."""
    return vision_absmax


def percentile_ranks(magnitudes: torch.Tensor) -> torch.Tensor:
    """Share of a token's channels that are not larger than each of them (eq. 9).

    Args:
        magnitudes: [T, C] float32, |x| of text tokens over the candidate channels.

    Returns:
        [T, C] float32 in (0, 1]; scaling a whole token leaves its row unchanged.
    """
    ordered = magnitudes.sort(-1).values
    return torch.searchsorted(ordered, magnitudes.contiguous(), right=True).float() / magnitudes.shape[-1]


def within_cluster_variance(sequences: torch.Tensor, clusters: int) -> torch.Tensor:
    """Mean squared distance to the own centre after one-dimensional k-means (eq. 10), every column on its own.

    Lloyd's algorithm from the quantiles (2i + 1) / 2k, so the result depends on the values alone.

    Args:
        sequences: [T, C] float32.
        clusters: k.

    Returns:
        [C] float32.
    """
    steps = torch.arange(clusters, dtype=sequences.dtype, device=sequences.device)
    levels = (steps * 2 + 1) / (2 * clusters)
    centres = torch.quantile(sequences, levels, dim=0)  # [k, C]
    for _ in range(LLOYD_STEPS):
        owner = (sequences[None] - centres[:, None]).abs().argmin(0)  # [T, C]
        sums = torch.zeros_like(centres).scatter_add_(0, owner, sequences)
        counts = torch.zeros_like(centres).scatter_add_(0, owner, torch.ones_like(sequences))
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return (sequences[None] - centres[:, None]).square().amin(0).mean(0)


def choose_channels(
    vision_absmax: torch.Tensor, text_rows: torch.Tensor, *, vision_count: int, text_count: int, clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sets C_v and C_t (eq. 8 and 11); ties go to the lower channel number.

    Args:
        vision_absmax: [K] float32, largest magnitudes over vision tokens.
        text_rows: [T, K] float32, activations of text tokens.
        vision_count: size of C_v.
        text_count: size of C_t.
        clusters: k of eq. 10.

    Returns:
        Two ascending int64 vectors, disjoint.
    """
    vision = largest_channels(vision_scores(vision_absmax), vision_count)
    candidate = torch.ones(vision_absmax.numel(), dtype=torch.bool, device=vision_absmax.device)
    candidate[vision] = False
    rest = candidate.nonzero().flatten()
    scores = within_cluster_variance(percentile_ranks(text_rows[:, rest].abs()), clusters)
    text = rest[largest_channels(scores, text_count)]
    return vision, text


def largest_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the `count` largest scores, ascending int64; ties go to the lower number."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def halves_by_rank(scores: torch.Tensor, vision_count: int, text_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One joint outlier set by a single score, dealt to the two groups: the larger scores to the vision group.

    Returns:
        Two ascending int64 vectors, disjoint.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:vision_count].sort().values, order[vision_count : vision_count + text_count].sort().values
