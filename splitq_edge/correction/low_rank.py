"""Low-rank factors of the main weight for CWS and MAC (paper eq. 16-21)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitq_edge.quant.affine import dequantize_weight, quantize_weight
from splitq_edge.quant.clipping import search_weight_clip
from splitq_edge.quant.transforms import invert_into_weight

RANK_MULTIPLE = 4  # dot-product instructions take four consecutive values
GRAM_FROM = 512  # smaller side of a weight from which its Gram matrix is decomposed instead
U_CLIP = 0.85  # of the scale of U's columns: long nearly Gaussian vectors, where this keeps most at 4 bits


def rank_of(ratio: float, full_rank: int) -> int:
    """Rank of a branch: `ratio * full_rank` rounded to a multiple of 4, at least 4; 0 for ratio 0."""
    if ratio == 0:
        return 0
    rounded = round(ratio * full_rank / RANK_MULTIPLE) * RANK_MULTIPLE
    return min(max(rounded, RANK_MULTIPLE), full_rank)


@dataclass(frozen=True)
class LowRank:
    """Quantized shared factors; CWS and MAC are prefixes of them with a gate vector each.

    Attributes:
        u: [K, R] int8 codes of P^-1 U_r, with u_scale [R].
        v: [R, N] int8 codes of V_r^T, with v_scale [N].
        gate_cws: [cws_rank] float32, the diagonal S_r G_s.
        gate_mac: [mac_rank] float32, the diagonal S_r G_c.
    """

    u: torch.Tensor
    u_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    gate_cws: torch.Tensor
    gate_mac: torch.Tensor

    def cws_product(self) -> torch.Tensor:
        """What CWS subtracts from the transformed weight before quantizing it (eq. 17).

        Returns:
            [K, N] float32, `U_s diag(gate_cws) V_s` from the dequantized factors, so that the branch adds back exactly
            what was taken away.
        """
        rank = self.gate_cws.numel()
        u = dequantize_weight(self.u, self.u_scale)[:, :rank]
        return (u * self.gate_cws) @ dequantize_weight(self.v, self.v_scale)[:rank]


@dataclass(frozen=True)
class SvdAnchor:
    """Truncated SVD of a main weight, `weight ~ u diag(singular) v` (eq. 20).

    Attributes:
        u: [K, R] float32, orthonormal columns.
        singular: [R] float32, descending.
        v: [R, N] float32, orthonormal rows.
    """

    u: torch.Tensor
    singular: torch.Tensor
    v: torch.Tensor


def svd_anchor(weight: torch.Tensor, rank: int) -> SvdAnchor:
    """The anchor of rank `rank` of a weight [K, N] before the transform (channel scale applied), taken in float64.

    Of large weights only the leading directions are taken, as eigenvectors of the smaller Gram matrix: a tenth of the
    work of a whole decomposition, and in float64 as good where the singular values are not tiny.
    """
    exact = weight.double()
    if min(weight.shape) < GRAM_FROM:
        left, singular, right = torch.linalg.svd(exact, full_matrices=False)
        return SvdAnchor(left[:, :rank].float(), singular[:rank].float(), right[:rank].float())
    wide = weight.shape[0] < weight.shape[1]
    tall = exact.T if wide else exact
    directions = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)[:, :rank]  # ascending eigenvalues
    images = tall @ directions
    singular = images.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    images = images / singular
    left, right = (directions, images) if wide else (images, directions)
    return SvdAnchor(left.float(), singular.float(), right.T.contiguous().float())


def u_clip(bits: int) -> float:
    """Clip factor of U's columns."""
    return U_CLIP if bits <= 4 else 1.0


def quantize_v(v: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [R, N] int8 and scale [N] of V, the clip of every column by search."""
    return quantize_weight(v, bits, clip=search_weight_clip(v, bits))


def quantize_low_rank(
    anchor: SvdAnchor,
    p1: torch.Tensor | None,
    p2: torch.Tensor | None,
    *,
    gate_cws: torch.Tensor,
    gate_mac: torch.Tensor,
    bits: int,
) -> LowRank:
    """Carry the anchor behind the transform and quantize its factors (eq. 20-21).

    Args:
        anchor: of the larger of the two ranks.
        p1: [B * a, a] transform factor, None for the identity.
        p2: [b, b].
        gate_cws: [cws_rank] float32, the diagonal G_s; ones are the plain SVD.
        gate_mac: [mac_rank] float32, the diagonal G_c.
        bits: bits of the factors.
    """
    u = anchor.u if p1 is None or p2 is None else invert_into_weight(anchor.u, p1, p2)
    u_codes, u_scale = quantize_weight(u, bits, clip=u_clip(bits))
    v_codes, v_scale = quantize_v(anchor.v, bits)
    cws = anchor.singular[: gate_cws.numel()] * gate_cws
    mac = anchor.singular[: gate_mac.numel()] * gate_mac
    return LowRank(u_codes, u_scale, v_codes, v_scale, cws, mac)
