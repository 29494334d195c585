"""Low-rank factors of the main weight for CWS and MAC (paper eq. 16-21)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitq_edge.quant.affine import dequantize_weight, quantize_weight
from splitq_edge.quant.transforms import invert_into_weight

RANK_MULTIPLE = 4  # dot-product instructions take four consecutive values


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


def svd_anchor(
    weight: torch.Tensor,
    p1: torch.Tensor | None,
    p2: torch.Tensor | None,
    *,
    cws_rank: int,
    mac_rank: int,
    bits: int,
) -> LowRank:
    """The SVD start of the factors (eq. 20-21) with gates G = I.

    Args:
        weight: [K, N] float32, main weight before the transform (channel scale already divided out).
        p1: [a, a] transform factor, None for the identity.
        p2: [b, b].
        cws_rank: rank of CWS.
        mac_rank: rank of MAC; the larger of the two is the rank of the shared factors and must be above 0.
        bits: bits of the factors.

    Returns:
        Quantized factors and gates.
    """
    rank = max(cws_rank, mac_rank)
    left, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    u = left[:, :rank].float()
    if p1 is not None and p2 is not None:
        u = invert_into_weight(u, p1, p2)
    u_codes, u_scale = quantize_weight(u, bits)
    v_codes, v_scale = quantize_weight(right[:rank].float(), bits)
    gates = singular[:rank].float()
    return LowRank(u_codes, u_scale, v_codes, v_scale, gates[:cws_rank].clone(), gates[:mac_rank].clone())
