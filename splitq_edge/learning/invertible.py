"""Learnable matrices that cannot become singular: U diag(s) V^T with orthogonal U, V and positive s (paper eq. 2-3)."""

from __future__ import annotations

import torch
from torch import nn

MAX_LOG = 2.0  # singular values stay within e^-2 .. e^2, so the condition number stays below 55


def cayley(skew_source: torch.Tensor) -> torch.Tensor:
    """Orthogonal matrix (I + K)^-1 (I - K) of the skew-symmetric part K of the strict upper triangle.

    Args:
        skew_source: [..., n, n] float32; zero gives the identity.
    """
    upper = skew_source.triu(1)
    skew = upper - upper.mT
    eye = torch.eye(skew.shape[-1], device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)


class InvertibleMatrix(nn.Module):
    """P [n, n] = start cayley(A) diag(exp(log_s)) cayley(B)^T, initially `start`, or several on one diagonal.

    Args:
        start: [n, n] orthogonal.
        blocks: matrices on the diagonal; the start of each is `start`.
    """

    def __init__(self, start: torch.Tensor, blocks: int = 1) -> None:
        super().__init__()
        n = start.shape[0]
        several = (blocks,) if blocks > 1 else ()
        self.start: torch.Tensor
        self.register_buffer("start", start.clone())
        self.rotations = nn.Parameter(torch.zeros(2, *several, n, n, device=start.device))  # A and B
        self.log_s = nn.Parameter(torch.zeros(*several, n, device=start.device))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P and its inverse, both [blocks * n, n] float32, the matrices of the diagonal one under the other."""
        left, v = cayley(self.rotations)
        u = self.start @ left
        s = (MAX_LOG * torch.tanh(self.log_s / MAX_LOG)).exp().unsqueeze(-2)
        p, inverse = (u * s) @ v.mT, (v / s) @ u.mT
        return (p, inverse) if p.ndim == 2 else (p.flatten(0, 1), inverse.flatten(0, 1))
