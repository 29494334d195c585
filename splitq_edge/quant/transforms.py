"""The equivalent transform P = P1 ⊗ P2 (paper eq. 2): factor search, orthogonal starts, application.

P1 of a wide group is block-diagonal: P mixes the channels of a block of the group with each other only. It is kept as
[B * a, a], its B matrices [a, a] one under the other.
"""

from __future__ import annotations

import math

import torch

from splitq_edge.errors import SplitQError

MAX_FACTOR_RATIO = 8
MIN_BLOCK_SHARE = 4
VECTOR = 16  # floats of the widest vector registers
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


def transform_shape(width: int, most: int) -> tuple[int, int, int]:
    """Blocks B of the transform and the sizes of its factors: P1 has B matrices [a, a] on its diagonal, P2 is [b, b].

    The fewest equal blocks of at most `most` channels, and at least a quarter of that, with factors within 1 : 8. b is
    the one that fills vector registers, where only one does.

    Args:
        width: channels of the group.
        most: channels a block; 0 for one block whatever the width.

    Returns:
        B, a and b, B * a * b = width; one block with the factors of `factor_pair` where the width is at most `most` or
        no number of blocks fits.

    Raises:
        SplitQError: as `factor_pair`.
    """
    if most and width > most:
        for blocks in range(-(-width // most), width * MIN_BLOCK_SHARE // most + 1):
            block = width // blocks
            if width % blocks == 0 and has_balanced_factors(block):
                a, b = factor_pair(block)
                return (blocks, b, a) if a % VECTOR == 0 and b % VECTOR else (blocks, a, b)
    return 1, *factor_pair(width)


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


def starting_factors(width: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """P1 and P2 before anything is learned, see `transform_shape` for the arguments and errors.

    Returns:
        [B * a, a] and [b, b] float32.
    """
    blocks, a, b = transform_shape(width, most)
    return orthogonal_start(a).repeat(blocks, 1), orthogonal_start(b)


def apply_transform(x: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """x (P1 ⊗ P2) without forming the product.

    Args:
        x: [..., B * a * b] float32.
        p1: [B * a, a], B matrices one under the other.
        p2: [b, b].

    Returns:
        [..., B * a * b].
    """
    a, b = p1.shape[1], p2.shape[0]
    if p1.shape[0] == a:  # no axis of blocks, which would make a batch of the second product
        rows = x.reshape(*x.shape[:-1], a, b) @ p2
        return (p1.T @ rows).reshape(x.shape)
    blocks = _blocks(p1)
    rows = x.reshape(*x.shape[:-1], blocks.shape[0], a, b) @ p2
    return (blocks.mT @ rows).reshape(x.shape)


def invert_into_weight(weight: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """(P1 ⊗ P2)^-1 W, the weight side of the equivalent transform.

    Args:
        weight: [B * a * b, N] float32.
        p1: [B * a, a].
        p2: [b, b].

    Returns:
        [B * a * b, N] float32; the inverses are taken in float64.
    """
    inverse1 = torch.linalg.inv(_blocks(p1).double()).flatten(0, 1)
    return apply_inverse(weight.double(), inverse1, torch.linalg.inv(p2.double())).float()


def apply_inverse(weight: torch.Tensor, inverse1: torch.Tensor, inverse2: torch.Tensor) -> torch.Tensor:
    """(P1^-1 ⊗ P2^-1) W as two matrix products over long rows.

    Args:
        weight: [B * a * b, N].
        inverse1: [B * a, a].
        inverse2: [b, b].

    Returns:
        [B * a * b, N].
    """
    if weight.shape[0] <= DENSE_WIDTH:
        return dense_transform(inverse1, inverse2) @ weight
    height, a, b = *inverse1.shape, inverse2.shape[0]
    rows = (_blocks(inverse1) @ weight.reshape(height // a, a, -1)).reshape(height, b, -1)  # [B * a, b, N]
    # A batched product with one matrix; `inverse2 @ rows` would copy the rows into another order first.
    return torch.bmm(inverse2.expand(height, b, b), rows).reshape(weight.shape)


def dense_transform(p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """P1 ⊗ P2 of [B * a, a] and [b, b] as one matrix [B * a * b, B * a * b]."""
    return torch.kron(block_diagonal(p1).contiguous(), p2.contiguous())  # it cannot view a product of transposed ones


def block_diagonal(factor: torch.Tensor) -> torch.Tensor:
    """The matrices [n, n] of a factor [B * n, n] on the diagonal of one [B * n, B * n]."""
    return factor if factor.shape[0] == factor.shape[1] else torch.block_diag(*_blocks(factor))


def transposed(factor: torch.Tensor) -> torch.Tensor:
    """The matrices [n, n] of a factor [B * n, n], each transposed."""
    return _blocks(factor).mT.flatten(0, 1).contiguous()


def _blocks(factor: torch.Tensor) -> torch.Tensor:
    """[B * n, n] as [B, n, n]."""
    return factor.unflatten(0, (-1, factor.shape[1]))
