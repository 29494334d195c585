"""The shared low-rank factors of CWS and MAC (eq. 16-21)."""

from __future__ import annotations

import pytest
import torch
from builders import rng

from splitq_edge.correction.low_rank import GRAM_FROM, LowRank, quantize_low_rank, rank_of, svd_anchor
from splitq_edge.quant.affine import dequantize_weight
from splitq_edge.quant.transforms import apply_transform, orthogonal_start


def low_rank(
    weight: torch.Tensor,
    p1: torch.Tensor | None,
    p2: torch.Tensor | None,
    *,
    cws_rank: int,
    mac_rank: int,
    bits: int,
) -> LowRank:
    """The SVD start: gates G = I."""
    anchor = svd_anchor(weight, max(cws_rank, mac_rank))
    return quantize_low_rank(anchor, p1, p2, gate_cws=torch.ones(cws_rank), gate_mac=torch.ones(mac_rank), bits=bits)


def random_weight(channels: int = 24, outputs: int = 20) -> torch.Tensor:
    return torch.randn(channels, outputs, generator=rng(channels + outputs))


@pytest.mark.parametrize(
    ("ratio", "full", "rank"),
    [
        (0, 4096, 0),
        (0.02, 4096, 80),  # 81.92 -> the nearest multiple of 4 is 80 (or 84: 82 lies between, 20.48 rounds down)
        (0.03, 4096, 124),  # 122.88 / 4 = 30.72
        (0.05, 4096, 204),  # 204.8 / 4 = 51.2
        (0.02, 576, 12),  # 11.52 / 4 = 2.88
        (0.02, 64, 4),  # 1.28: at least 4
        (0.0001, 4096, 4),
        (0.5, 3, 3),  # never above the full rank
        (0.5, 16, 8),
    ],
)
def test_rank_is_a_multiple_of_four_and_at_least_four(ratio: float, full: int, rank: int) -> None:
    assert rank_of(ratio, full) == rank


def test_ranks_are_prefixes_with_the_singular_values_as_gates() -> None:
    weight = random_weight()
    low = low_rank(weight, None, None, cws_rank=4, mac_rank=12, bits=8)
    singular = torch.linalg.svdvals(weight.double()).float()
    assert low.u.shape == (24, 12)
    assert low.v.shape == (12, 20)
    torch.testing.assert_close(low.gate_cws, singular[:4])
    torch.testing.assert_close(low.gate_mac, singular[:12])
    wide = low_rank(weight, None, None, cws_rank=12, mac_rank=4, bits=8)
    assert torch.equal(wide.u, low.u)
    assert torch.equal(wide.v, low.v)
    assert wide.gate_mac.shape == (4,)


def test_full_rank_at_eight_bits_is_the_weight() -> None:
    weight = random_weight()
    product = low_rank(weight, None, None, cws_rank=20, mac_rank=0, bits=8).cws_product()
    assert (product - weight).norm() / weight.norm() < 0.02
    coarse = low_rank(weight, None, None, cws_rank=20, mac_rank=0, bits=4).cws_product()
    assert 0.02 < (coarse - weight).norm() / weight.norm() < 0.5


def test_product_is_the_best_approximation_of_its_rank_up_to_quantization() -> None:
    weight = random_weight()
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :8] * singular[:8]) @ right[:8]
    product = low_rank(weight, None, None, cws_rank=8, mac_rank=12, bits=8).cws_product()
    assert (product - best).norm() / best.norm() < 0.02


def test_u_is_the_inverse_transform_of_the_left_singular_vectors() -> None:
    # eq. 20: U = P^-1 U_r; applying P gives U_r back, to within the 8-bit step of its columns.
    weight = random_weight()
    p1 = torch.eye(4) + torch.randn(4, 4, generator=rng(1)) * 0.1
    p2 = torch.eye(6) + torch.randn(6, 6, generator=rng(2)) * 0.1
    low = low_rank(weight, p1, p2, cws_rank=8, mac_rank=0, bits=8)
    left = torch.linalg.svd(weight.double(), full_matrices=False)[0][:, :8]
    u = dequantize_weight(low.u, low.u_scale).double()
    back = torch.kron(p1.double(), p2.double()) @ u
    amplification = torch.kron(p1.double(), p2.double()).abs().sum(1, keepdim=True)
    assert ((back - left).abs() <= amplification * low.u_scale / 2 * 1.001).all()


def test_branch_in_transformed_space_serves_the_original_weight() -> None:
    # x P (P^-1 U) V = x U V: the branch on transformed activations is the plain low-rank product.
    weight = random_weight(64, 20)
    p1, p2 = orthogonal_start(8), orthogonal_start(8)
    low = low_rank(weight, p1, p2, cws_rank=20, mac_rank=0, bits=8)
    x = torch.randn(5, 64, generator=rng(3))
    got = apply_transform(x, p1, p2) @ low.cws_product()
    assert (got - x @ weight).norm() / (x @ weight).norm() < 0.03


def test_subtracting_the_branch_and_adding_it_back_changes_nothing() -> None:
    # CWS (eq. 17) with Q switched off: (B - U V) + U V = B, because both use the same quantized factors.
    target = random_weight(64, 20)
    low = low_rank(target, None, None, cws_rank=8, mac_rank=8, bits=4)
    product = low.cws_product()
    u, v = dequantize_weight(low.u, low.u_scale), dequantize_weight(low.v, low.v_scale)
    added_back = (u * low.gate_cws) @ v
    assert torch.equal(product, added_back)
    torch.testing.assert_close((target - product) + added_back, target)


def test_smoothing_leaves_less_to_quantize() -> None:
    # What CWS is for: a weight with one strong direction is smaller once the direction is taken out.
    strong = torch.randn(64, 1, generator=rng(1)) @ torch.randn(1, 20, generator=rng(2)) * 5
    weight = random_weight(64, 20) + strong
    low = low_rank(weight, None, None, cws_rank=4, mac_rank=0, bits=8)
    assert (weight - low.cws_product()).abs().max() < weight.abs().max() / 3


def test_unused_branch_has_no_gates() -> None:
    low = low_rank(random_weight(), None, None, cws_rank=0, mac_rank=8, bits=4)
    assert low.gate_cws.shape == (0,)
    assert not low.cws_product().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_are_codes_of_their_bits(bits: int) -> None:
    low = low_rank(random_weight(), None, None, cws_rank=8, mac_rank=4, bits=bits)
    for codes, scale in ((low.u, low.u_scale), (low.v, low.v_scale)):
        assert codes.dtype == torch.int8
        # Clipped columns may use the lowest code too.
        assert 2 ** (bits - 1) - 1 <= codes.int().abs().max() <= 2 ** (bits - 1)
        assert codes.max() <= 2 ** (bits - 1) - 1
        assert scale.shape == (codes.shape[1],)


@pytest.mark.parametrize("shape", [(700, 520), (520, 700)])
def test_anchor_of_a_large_weight_is_its_truncated_svd(shape: tuple[int, int]) -> None:
    assert min(shape) >= GRAM_FROM
    spectrum = torch.logspace(1, -2, 520)
    left = torch.linalg.qr(torch.randn(shape[0], 520, generator=rng(1)))[0]
    right = torch.linalg.qr(torch.randn(shape[1], 520, generator=rng(2)))[0]
    weight = (left * spectrum) @ right.T
    anchor = svd_anchor(weight, 8)
    torch.testing.assert_close(anchor.singular, spectrum[:8], rtol=1e-4, atol=0)
    product = (anchor.u * anchor.singular) @ anchor.v
    torch.testing.assert_close(product, (left[:, :8] * spectrum[:8]) @ right.T[:8], rtol=0, atol=1e-4)
    torch.testing.assert_close(anchor.u.T @ anchor.u, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(anchor.v @ anchor.v.T, torch.eye(8), rtol=0, atol=1e-5)
