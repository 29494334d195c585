"""Reference forward of a quantized site, the paper's algorithm 1: three groups, transforms, CWS and MAC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from splitq_edge.errors import SplitQError
from splitq_edge.modality import TEXT, ModalityContext
from splitq_edge.quant.affine import dequantize_weight, quantize_rows
from splitq_edge.quant.transforms import apply_transform, transposed

GROUPS = ("main", "text", "vision")
LATENT_BITS = 8  # of the vector between U and V, docs/ops.md
EXACT_FLOAT_SUM = 1 << 24  # integers below it add up exactly in float32


@dataclass(frozen=True)
class GroupWeights:
    """One channel group of a site.

    Attributes:
        qweight: [K_g, N] int8.
        scale: [N] or [groups, N] float32.
        p1: [B * a, a] float32, B matrices one under the other, or None for the identity; B * a * b = K_g.
        p2: [b, b] float32 or None.
        bits: weight bits.
        activation_bits: activation bits.
        clip: activation clip factor.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    p1: torch.Tensor | None
    p2: torch.Tensor | None
    bits: int
    activation_bits: int
    clip: float = 1.0


@dataclass(frozen=True)
class Correction:
    """The low-rank branches of a site; see `LowRank` for the tensors.

    Attributes:
        u: [K_m, R] int8 codes, u_scale [R] float32.
        v: [R, N] int8 codes, v_scale [N] float32.
        gate_cws: [cws_rank] float32.
        gate_mac: [mac_rank] float32.
        bits: bits of u and v.
        residual_bits: bits of MAC's activation residual.
        mac_rows: "text" or "all".
    """

    u: torch.Tensor
    u_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    gate_cws: torch.Tensor
    gate_mac: torch.Tensor
    bits: int
    residual_bits: int
    mac_rows: str


class SplitLinear(nn.Module):
    """A quantized site: all linears that read one activation, their weights side by side along N.

    Computes `sum_g Q(x_g P_g) Q(P_g^-1 W_g) + CWS + MAC + bias` (eq. 13-19) with the integers and scales that the
    exported op `ai.splitq::SplitQLinear` holds; docs/ops.md is the contract of both.

    Args:
        name: site name, for messages.
        order: [K] int32, channels in the order main, text, vision.
        groups: the groups present; "main" is required.
        correction: low-rank branches or None.
        bias: [N] float32 or None.
        group_size: of the main weight, 0 for per output channel.
        activation_symmetric: of the main group.
        context: where the modality mask of the running pass comes from.
        channel_scale: [K] float32 in the order of `order`, or None for ones.
    """

    def __init__(  # noqa: PLR0913 - the inputs of the op, each by name
        self,
        name: str,
        *,
        order: torch.Tensor,
        groups: dict[str, GroupWeights],
        context: ModalityContext,
        correction: Correction | None = None,
        bias: torch.Tensor | None = None,
        channel_scale: torch.Tensor | None = None,
        group_size: int = 0,
        activation_symmetric: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.groups = groups
        self.correction = correction
        self.bias = bias
        self.channel_scale = channel_scale
        self.group_size = group_size
        self.activation_symmetric = activation_symmetric
        self.context = context
        self.order = order
        self.widths = tuple(groups[g].qweight.shape[0] if g in groups else 0 for g in GROUPS)
        self.in_features = int(order.numel())
        self.out_features = int(groups["main"].qweight.shape[1])
        if sum(self.widths) != self.in_features:
            raise SplitQError(f"{name}: expected groups covering {self.in_features} channels, got {self.widths}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] float32 -> [..., N] float32."""
        permuted = x.float()[..., self.order.long()]
        if self.channel_scale is not None:
            permuted = permuted * self.channel_scale
        parts = dict(zip(GROUPS, permuted.split(self.widths, -1), strict=True))
        output: torch.Tensor | None = None
        for name, group in self.groups.items():
            rows = parts[name]
            if group.p1 is not None and group.p2 is not None:
                rows = apply_transform(rows, group.p1, group.p2)
            symmetric = self.activation_symmetric or name != "main"
            codes, scale = quantize_rows(rows, group.activation_bits, clip=group.clip, symmetric=symmetric)
            term = self._product(codes, scale, group, self.group_size if name == "main" else 0)
            output = term if output is None else output + term
            if name == "main":
                main_rows, main_codes, main_scale = rows, codes, scale
        assert output is not None
        if self.correction is not None:
            output = output + self._correct(main_rows, main_codes, main_scale)
        if self.bias is not None:
            output = output + self.bias
        return output.to(x.dtype)

    def _product(self, codes: torch.Tensor, scale: torch.Tensor, group: GroupWeights, group_size: int) -> torch.Tensor:
        if group_size:
            total: torch.Tensor | None = None
            blocks = zip(codes.split(group_size, -1), group.qweight.split(group_size), group.scale, strict=True)
            for code, weight, weight_scale in blocks:
                term = _integer_matmul(code, weight) * weight_scale
                total = term if total is None else total + term
            assert total is not None
            return total * scale
        return _integer_matmul(codes, group.qweight) * scale * group.scale

    def _correct(self, rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """CWS + MAC (eq. 16-19) from the main group's transformed rows [..., K_m], codes and scale."""
        c = self.correction
        assert c is not None
        cws_rank, mac_rank, rank = c.gate_cws.numel(), c.gate_mac.numel(), c.u.shape[1]
        latent = rows.new_zeros(*rows.shape[:-1], rank)
        if cws_rank:
            cws = _integer_matmul(codes, c.u[:, :cws_rank]) * scale * c.u_scale[:cws_rank] * c.gate_cws
            latent[..., :cws_rank] += cws
        if mac_rank:
            residual, residual_scale = quantize_rows(rows - codes * scale, c.residual_bits)
            mac = _integer_matmul(residual, c.u[:, :mac_rank]) * residual_scale * c.u_scale[:mac_rank] * c.gate_mac
            latent[..., :mac_rank] += mac * self._mac_rows(rows)
        latent_codes, latent_scale = quantize_rows(latent, LATENT_BITS)
        return _integer_matmul(latent_codes, c.v) * latent_scale * c.v_scale

    def _mac_rows(self, rows: torch.Tensor) -> torch.Tensor | float:
        assert self.correction is not None
        if self.correction.mac_rows == "all":
            return 1.0
        mask = self.context.mask
        if mask is None:
            raise SplitQError(
                f"{self.name}: expected a modality mask for MAC on text rows, got none; "
                "run the model through ModalityContext.using"
            )
        return (mask.to(rows.device) == TEXT).float().reshape(*rows.shape[:-1], 1)

    def dequantized_weight(self) -> torch.Tensor:
        """The weight that the codes stand for, in the original channel order and basis, CWS added back.

        Returns:
            [K, N] float32; compare it with the float weight.
        """
        weight = torch.zeros(self.in_features, self.out_features, device=self.order.device)
        start = 0
        for name, width in zip(GROUPS, self.widths, strict=True):
            if not width:
                continue
            group = self.groups[name]
            part = dequantize_weight(group.qweight, group.scale, self.group_size if name == "main" else 0)
            if name == "main" and self.correction is not None and self.correction.gate_cws.numel():
                c, rank = self.correction, self.correction.gate_cws.numel()
                u = dequantize_weight(c.u, c.u_scale)[:, :rank] * c.gate_cws
                part = part + u @ dequantize_weight(c.v, c.v_scale)[:rank]
            if group.p1 is not None and group.p2 is not None:
                part = apply_transform(part.T.contiguous(), transposed(group.p1), transposed(group.p2)).T  # (P1 ⊗ P2) B
            channels = self.order[start : start + width].long()
            if self.channel_scale is not None:
                part = part * self.channel_scale[start : start + width, None]
            weight[channels] = part
            start += width
        return weight


def side_by_side(sites: Sequence[SplitLinear]) -> SplitLinear:
    """One site of the output channels of several.

    Args:
        sites: the same in everything else, without correction and with one weight scale an output channel.
    """
    first = sites[0]
    if len(sites) == 1:
        return first
    groups = {
        name: replace(
            group,
            qweight=torch.cat([site.groups[name].qweight for site in sites], 1),
            scale=torch.cat([site.groups[name].scale for site in sites]),
        )
        for name, group in first.groups.items()
    }
    biases = [site.bias for site in sites if site.bias is not None]
    return SplitLinear(
        first.name,
        order=first.order,
        groups=groups,
        context=first.context,
        bias=torch.cat(biases) if biases else None,
        channel_scale=first.channel_scale,
        activation_symmetric=first.activation_symmetric,
    )


class SitePart(nn.Module):
    """One of the linears of a site: a slice of the site's output.

    The first part to be called computes the site, the others take their slice of the same result; each result is
    handed out once a part and then forgotten. Change weights between two passes of the model, not within one.
    """

    def __init__(self, site: nn.Module, part: str, start: int, width: int) -> None:
        super().__init__()
        self.site = site
        self.part = part
        self.start = start
        self.width = width
        self._shared: _SharedOutput | None = None

    def share_with(self, shared: _SharedOutput) -> None:
        """Join the parts of one site."""
        self._shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] -> [..., width]."""
        output = self.site(x) if self._shared is None else self._shared.output(self.site, x, self.part)
        return output[..., self.start : self.start + self.width]


class _SharedOutput:
    """Result of a site between the calls of its parts."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self._parts = parts
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None
        self._left: set[str] = set()

    def output(self, site: nn.Module, x: torch.Tensor, part: str) -> torch.Tensor:
        if self._x is not x or part not in self._left or self._y is None:
            self._x, self._y, self._left = x, site(x), set(self._parts)
        result = self._y
        self._left.discard(part)
        if not self._left:
            self._x = self._y = None
        return result


def site_parts(site: nn.Module, widths: dict[str, int]) -> dict[str, SitePart]:
    """Cut a site into the modules that replace its linears.

    Args:
        site: the quantized site.
        widths: output features of each linear, in the order in which they were put side by side.
    """
    shared = _SharedOutput(tuple(widths))
    parts: dict[str, SitePart] = {}
    start = 0
    for name, width in widths.items():
        parts[name] = SitePart(site, name, start, width)
        parts[name].share_with(shared)
        start += width
    if start != site.out_features:
        raise SplitQError(f"{site.name}: expected linears of {site.out_features} outputs in all, got {start}")
    return parts


def _integer_matmul(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact product of integer-valued codes [..., K] and int8 weight [K, N], as float32."""
    largest = 127 * 128 * weight.shape[0]
    if largest < EXACT_FLOAT_SUM:
        return codes @ weight.float()
    return (codes.double() @ weight.double()).float()
