"""The equivalent transform P = P1 ⊗ P2 (paper eq. 2): factor search, orthogonal starts, application."""

from __future__ import annotations

import math

import torch

from splitq_edge.errors import SplitQError

MAX_FACTOR_RATIO = 8
DENSE_WIDTH = 64  # up to here one product with P1 ⊗ P2 is faster than two with the factors


def factor_pair(width: int) -> tuple[int, int]:
    """The two most equal integers a <= b with a * b = width.

    Raises:
        SplitQError: the pair is more lopsided than 1 : 8, where the two small products no longer are small.
    """
    a = next(a for a in range(math.isqrt(width), 0, -1) if width % a == 0)
    if width // a > MAX_FACTOR_RATIO * a and width > MAX_FACTOR_RATIO:
        raise SplitQError(
            f"transform: expected a width with two factors within 1 : {MAX_FACTOR_RATIO}, got {width} = "
            f"{a} x {width // a}; change the split ratio or use transform: identity"
        )
    return a, width // a


def has_balanced_factors(width: int) -> bool:
    """Whether `factor_pair` accepts the width."""
    try:
        factor_pair(width)
    except SplitQError:
        return False
    return True


def orthogonal_start(n: int) -> torch.Tensor:
    """An orthogonal matrix that spreads one channel over all: Hadamard if n is a power of two, else Hartley.

    Returns:
        [n, n] float32 with equal row and column norms; Hadamard entries all have magnitude n^-1/2.
    """
    if n & (n - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < n:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / math.sqrt(n)).float()
    index = torch.arange(n, dtype=torch.float64)
    angle = 2 * math.pi * torch.outer(index, index) / n
    return ((torch.cos(angle) + torch.sin(angle)) / math.sqrt(n)).float()


def apply_transform(x: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """x (P1 ⊗ P2) without forming the product.

    Args:
        x: [..., a * b] float32.
        p1: [a, a].
        p2: [b, b].

    Returns:
        [..., a * b].
    """
    rows = x.reshape(*x.shape[:-1], p1.shape[0], p2.shape[0]) @ p2  # [..., a, b]
    return (p1.T @ rows).reshape(x.shape)


def invert_into_weight(weight: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """(P1 ⊗ P2)^-1 W, the weight side of the equivalent transform.

    Args:
        weight: [a * b, N] float32.
        p1: [a, a].
        p2: [b, b].

    Returns:
        [a * b, N] float32; the inverses are taken in float64.
    """
    return apply_inverse(weight.double(), torch.linalg.inv(p1.double()), torch.linalg.inv(p2.double())).float()


def apply_inverse(weight: torch.Tensor, inverse1: torch.Tensor, inverse2: torch.Tensor) -> torch.Tensor:
    """(P1^-1 ⊗ P2^-1) W as two matrix products over long rows.

    Args:
        weight: [a * b, N].
        inverse1: [a, a].
        inverse2: [b, b].

    Returns:
        [a * b, N].
    """
    a, b = inverse1.shape[0], inverse2.shape[0]
    if a * b <= DENSE_WIDTH:
        return torch.kron(inverse1, inverse2) @ weight
    rows = (inverse1 @ weight.reshape(a, -1)).reshape(a, b, -1)  # [a, b, N]
    # A batched product with one matrix; `inverse2 @ rows` would copy the rows into another order first.
    return torch.bmm(inverse2.expand(a, b, b), rows).reshape(weight.shape)
