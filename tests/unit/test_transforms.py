"""The equivalent transform P = P1 ⊗ P2 (eq. 2): factors, orthogonal starts, application, inverse."""

from __future__ import annotations

import math

import pytest
import torch
from builders import rng

from splitq_edge.config import QuantConfig
from splitq_edge.errors import SplitQError
from splitq_edge.learning.invertible import InvertibleMatrix
from splitq_edge.quant.transforms import (
    MAX_FACTOR_RATIO,
    apply_transform,
    dense_transform,
    factor_pair,
    has_balanced_factors,
    invert_into_weight,
    orthogonal_start,
    starting_factors,
    transform_shape,
    transposed,
)
from splitq_edge.splitting.plan import outlier_width

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 31, 32, 46, 54, 61, 62, 64, 122, 128]
PAIRS = [(1, 1), (1, 5), (2, 3), (4, 4), (6, 9), (8, 16), (16, 32)]


def largest_divisor_up_to_root(width: int) -> int:
    return max(divisor for divisor in range(1, math.isqrt(width) + 1) if width % divisor == 0)


def dense(p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """The Kronecker product entry by entry: P[(i, j), (k, l)] = P1[i, k] P2[j, l], in each block of P1."""
    (size, a), b = p1.shape, p2.shape[0]
    product = torch.zeros(size * b, size * b, dtype=torch.float64)
    for i in range(size):
        first = i // a * a
        for k in range(a):
            columns = slice((first + k) * b, (first + k + 1) * b)
            product[i * b : (i + 1) * b, columns] = p1[i, k].double() * p2.double()
    return product


def random_factors(a: int, b: int, blocks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Well conditioned, neither symmetric nor orthogonal."""
    generator = rng(a * 100 + b)
    *p1, p2 = (torch.eye(n) + torch.randn(n, n, generator=generator) * 0.3 / n**0.5 for n in (*[a] * blocks, b))
    return torch.cat(p1), p2


def test_factor_pair_is_the_most_equal_one_or_a_clear_refusal_for_every_width() -> None:
    for width in range(32, 8193, 2):
        a = largest_divisor_up_to_root(width)
        balanced = width // a <= MAX_FACTOR_RATIO * a
        assert has_balanced_factors(width) == balanced, width
        if balanced:
            assert factor_pair(width) == (a, width // a)
        else:
            with pytest.raises(SplitQError, match=rf"1 : 8, got {width} = {a} x {width // a}; change the split ratio"):
                factor_pair(width)


def test_every_main_width_that_the_planner_gives_has_factors() -> None:
    widths = {channels - outlier_width(channels, ratio) for channels in range(64, 8193, 62) for ratio in (0.01, 0.02)}
    assert len(widths) > 100
    for width in widths:
        a, b = factor_pair(width)
        assert a * b == width
        assert a <= b <= MAX_FACTOR_RATIO * a


@pytest.mark.parametrize(
    ("width", "most", "expected"),
    [
        (7872, 0, (1, 82, 96)),
        (1984, 2048, (1, 32, 62)),
        (3904, 2048, (2, 61, 32)),  # 32 x 61, the factor that fills registers last
        (7872, 2048, (4, 41, 48)),
        (13760, 2048, (8, 40, 43)),
        (8576, 1024, (1, 67, 128)),  # 67 * 128: its blocks would be lopsided or too narrow
        (1472, 368, (4, 23, 16)),
    ],
)
def test_a_wide_group_is_transformed_in_the_fewest_blocks(
    width: int, most: int, expected: tuple[int, int, int]
) -> None:
    assert transform_shape(width, most) == expected
    p1, p2 = starting_factors(width, most)
    blocks, a, b = expected
    assert (p1.shape, p2.shape) == ((blocks * a, a), (b, b))
    assert all(torch.equal(block, orthogonal_start(a)) for block in p1.split(a))


def test_blocks_of_every_planned_width_are_balanced_and_neither_too_wide_nor_too_narrow() -> None:
    for channels in range(2304, 20000, 256):
        width = channels - outlier_width(channels, 0.02)
        blocks, a, b = transform_shape(width, QuantConfig("W4A8", bits=4, activation_bits=8).transform_width)
        assert blocks * a * b == width
        assert max(a, b) <= MAX_FACTOR_RATIO * min(a, b)
        assert blocks == 1 or 384 <= a * b <= 1536


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8])
def test_narrow_groups_are_never_lopsided(width: int) -> None:
    a, b = factor_pair(width)
    assert a * b == width


@pytest.mark.parametrize("width", [11, 3932, 8186, 4099])
def test_widths_that_degenerate_are_refused_in_one_line(width: int) -> None:
    with pytest.raises(SplitQError, match="transform: expected") as raised:
        factor_pair(width)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("n", SIZES)
def test_orthogonal_start_is_orthogonal_and_spreads_every_channel(n: int) -> None:
    matrix = orthogonal_start(n)
    assert matrix.shape == (n, n)
    assert matrix.dtype == torch.float32
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(matrix.double() @ matrix.double().T, identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.double().T @ matrix.double(), identity, atol=1e-6, rtol=0)
    assert matrix.abs().max() <= math.sqrt(2 / n) + 1e-6  # no channel stays where it was


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_hadamard_of_a_power_of_four_is_exact(n: int) -> None:
    assert torch.equal(orthogonal_start(n).abs(), torch.full((n, n), n**-0.5))
    assert torch.equal(orthogonal_start(n) @ orthogonal_start(n).T, torch.eye(n))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_application_equals_the_explicit_kronecker_product(a: int, b: int, blocks: int) -> None:
    p1, p2 = random_factors(a, b, blocks)
    x = torch.randn(2, 3, blocks * a * b, generator=rng())
    expected = x.double() @ dense(p1, p2)
    torch.testing.assert_close(apply_transform(x, p1, p2).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_transform(p1, p2).double(), dense(p1, p2), atol=1e-6, rtol=1e-6)
    back = apply_transform(x, transposed(p1), transposed(p2)).double()
    torch.testing.assert_close(back, x.double() @ dense(p1, p2).T, atol=1e-5, rtol=1e-5)


def test_application_by_hand() -> None:
    # x = [[1, 2], [3, 4]] as a matrix; P1 swaps its rows, P2 doubles its first column.
    p1 = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    p2 = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert apply_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]), p1, p2).tolist() == [6, 4, 2, 2]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_weight_takes_the_inverse_of_the_explicit_product(a: int, b: int, blocks: int) -> None:
    p1, p2 = random_factors(a, b, blocks)
    weight = torch.randn(blocks * a * b, 7, generator=rng())
    expected = torch.linalg.solve(dense(p1, p2), weight.double())
    torch.testing.assert_close(invert_into_weight(weight, p1, p2).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_transform_and_its_inverse_leave_the_linear_unchanged(a: int, b: int, blocks: int) -> None:
    x = torch.randn(5, blocks * a * b, generator=rng(1))
    weight = torch.randn(blocks * a * b, 7, generator=rng(2))
    for p1, p2 in (random_factors(a, b, blocks), (orthogonal_start(a).repeat(blocks, 1), orthogonal_start(b))):
        got = apply_transform(x, p1, p2) @ invert_into_weight(weight, p1, p2)
        torch.testing.assert_close(got, x @ weight, atol=1e-3, rtol=1e-4)


def test_empty_batch_passes_through() -> None:
    assert apply_transform(torch.zeros(0, 12), *random_factors(3, 4)).shape == (0, 12)


def planned_factor_sizes() -> list[int]:
    """Sizes of the factors of all groups that the planner can make of 32 to 8192 channels at the default ratio."""
    widths = set()
    for channels in range(32, 8193, 2):
        try:
            total = outlier_width(channels, 0.02)
        except SplitQError:
            continue  # refused in one line; see test_plan
        half = total // 2
        widths |= {channels - total, half, total - half} if total else set()
    return sorted({size for width in widths for size in factor_pair(width)})


def test_learned_and_starting_factors_of_every_planned_width_are_invertible() -> None:
    sizes = planned_factor_sizes()
    assert len(sizes) > 30
    for n in sizes:
        matrix = InvertibleMatrix(orthogonal_start(n))
        with torch.no_grad():
            products = [orthogonal_start(n).double() @ orthogonal_start(n).double().T]
            for seed, parameter in enumerate(matrix.parameters()):
                # as far as a rotation of 90 degrees and singular values at their bounds
                size = n**-0.5 if parameter.dim() == 3 else 2.0
                parameter.copy_(torch.randn(parameter.shape, generator=rng(n + seed)) * size)
            p, inverse = matrix()
            assert p.dtype == torch.float32
            products += [(p @ inverse).double(), (inverse @ p).double()]
        for product in products:
            torch.testing.assert_close(product, torch.eye(n, dtype=torch.float64), atol=1e-5, rtol=0, msg=f"{n}")


def test_factor_search_ends_for_every_width_and_refuses_lopsided_ones() -> None:
    for width in range(1, 8193):
        a = largest_divisor_up_to_root(width)
        if has_balanced_factors(width):
            assert factor_pair(width) == (a, width // a)
            assert width // a <= MAX_FACTOR_RATIO * max(a, 1)
        else:
            with pytest.raises(SplitQError, match=rf"got {width} = {a} x {width // a}; change the split ratio or use"):
                factor_pair(width)
