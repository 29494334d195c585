"""A site while it is learned: P, channel scale, clips and gates as parameters (paper eq. 2-3 and 13-21)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from splitq_edge.config import QuantConfig
from splitq_edge.correction.low_rank import quantize_low_rank, rank_of, svd_anchor
from splitq_edge.learning.invertible import InvertibleMatrix
from splitq_edge.modality import TEXT, ModalityContext
from splitq_edge.modules.split_linear import Correction, GroupWeights, SplitLinear
from splitq_edge.quant.affine import dequantize_weight, quantize_weight
from splitq_edge.quant.fake import fake_quantize_rows, fake_quantize_weight
from splitq_edge.quant.transforms import apply_transform, factor_pair, invert_into_weight, orthogonal_start
from splitq_edge.splitting.plan import SplitPlan

CLIP_LOGIT = 4.0  # sigmoid(4) = 0.982, FlatQuant's start
NO_CLIP_LOGIT = 30.0  # sigmoid is 1 in float32: what is not learned does not clip


@dataclass(frozen=True)
class GroupSetting:
    """Bits of one channel group."""

    bits: int
    activation_bits: int
    group_size: int
    symmetric: bool
    clip_logit: float


class TrainableGroup(nn.Module):
    """One channel group: its transform and clips.

    Args:
        channels: [K_g] int64, the group's channels.
        outputs: N.
        setting: bits.
        transform: "hadamard" or "identity".
    """

    def __init__(self, channels: torch.Tensor, outputs: int, setting: GroupSetting, transform: str) -> None:
        super().__init__()
        self.channels = channels
        self.setting = setting
        self.p1: InvertibleMatrix | None = None
        self.p2: InvertibleMatrix | None = None
        width = channels.numel()
        if transform != "identity":
            a, b = factor_pair(width)
            self.p1, self.p2 = InvertibleMatrix(orthogonal_start(a)), InvertibleMatrix(orthogonal_start(b))
        blocks = -(-width // setting.group_size) if setting.group_size else 0
        shape = (blocks, outputs) if blocks else (outputs,)
        self.weight_clip = nn.Parameter(torch.full(shape, setting.clip_logit))
        self.activation_clip = nn.Parameter(torch.tensor(setting.clip_logit))

    def matrices(self) -> tuple[torch.Tensor, ...] | None:
        """P1, P1^-1, P2, P2^-1, or None for the identity."""
        if self.p1 is None or self.p2 is None:
            return None
        return (*self.p1(), *self.p2())

    def transform(self, rows: torch.Tensor, matrices: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """Activation side, [..., K_g]."""
        return rows if matrices is None else apply_transform(rows, matrices[0], matrices[2])

    def untransform(self, weight: torch.Tensor, matrices: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """P^-1 W, [K_g, N]: (P1^-1 ⊗ P2^-1) applied to the rows."""
        if matrices is None:
            return weight
        return apply_transform(weight.T, matrices[1].T, matrices[3].T).T

    def quantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Fake-quantized activations."""
        clip = torch.sigmoid(self.activation_clip)
        return fake_quantize_rows(rows, self.setting.activation_bits, clip=clip, symmetric=self.setting.symmetric)

    def quantize_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Fake-quantized weight."""
        clip = torch.sigmoid(self.weight_clip)
        return fake_quantize_weight(weight, self.setting.bits, group_size=self.setting.group_size, clip=clip)


class TrainableSite(nn.Module):
    """The differentiable twin of `SplitLinear`.

    Args:
        name: site name.
        linears: linears that read the activation.
        plan: channel groups.
        config: the recipe.
        context: modality of the running pass.
        input_absmax: [K] float32, for the start of the channel scale; None leaves the scale at one.
    """

    def __init__(
        self,
        name: str,
        linears: list[nn.Linear],
        plan: SplitPlan,
        config: QuantConfig,
        context: ModalityContext,
        input_absmax: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.name, self.plan, self.config, self.context = name, plan, config, context
        self.float_only = False  # True: answer with the float weight
        self.weight = torch.cat([linear.weight.detach().float() for linear in linears]).T.contiguous()  # [K, N]
        self.bias = _merged_bias(linears)
        outputs = self.out_features = self.weight.shape[1]
        self.log_scale = nn.Parameter(_scale_start(input_absmax, self.weight))
        self.groups = nn.ModuleDict(
            {
                group: TrainableGroup(channels, outputs, _setting(config, group), config.transform)
                for group, channels in (("main", plan.main), ("text", plan.text), ("vision", plan.vision))
                if channels.numel()
            }
        )
        self._start_low_rank()

    def _start_low_rank(self) -> None:
        """SVD anchor of the scaled main weight (eq. 20-21); gates are the singular values to begin with."""
        full = min(self.plan.main.numel(), self.weight.shape[1])
        self.cws_rank = rank_of(self.config.correction.cws_ratio, full)
        self.mac_rank = rank_of(self.config.correction.mac_ratio, full)
        self.rank = max(self.cws_rank, self.mac_rank)
        if not self.rank:
            return
        main = self.plan.main
        self.anchor_scale = self.log_scale.detach()[main].clone()
        self.anchor = svd_anchor(self.weight[main] * self.anchor_scale.exp()[:, None], self.rank)
        self.v = dequantize_weight(*quantize_weight(self.anchor.v, self.config.correction.bits))
        self.gate_cws = nn.Parameter(torch.ones(self.cws_rank))
        self.gate_mac = nn.Parameter(torch.ones(self.mac_rank))

    def _anchor_u(self) -> torch.Tensor:
        """U_r [K_m, R], following the channel scale as it moves away from the anchor's."""
        return self.anchor.u * (self.log_scale[self.plan.main] - self.anchor_scale).exp()[:, None]

    def _factor_u(self, matrices: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """Fake-quantized U = P^-1 U_r [K_m, R]."""
        group = self.groups["main"]
        assert isinstance(group, TrainableGroup)
        return fake_quantize_weight(group.untransform(self._anchor_u(), matrices), self.config.correction.bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] float32 -> [..., N] float32, everything fake-quantized."""
        if self.float_only:
            output = x @ self.weight
            return output if self.bias is None else output + self.bias
        scale = self.log_scale.exp()
        x = x / scale
        rows, weights = [], []
        compensation: torch.Tensor | None = None
        for name, group in self.groups.items():
            assert isinstance(group, TrainableGroup)
            matrices = group.matrices()
            transformed = group.transform(x[..., group.channels], matrices)
            quantized = group.quantize_rows(transformed)
            weight = group.untransform(self.weight[group.channels] * scale[group.channels, None], matrices)
            if name == "main" and self.rank:
                u = self._factor_u(matrices)
                smooth = self._smooth(u)
                weight = group.quantize_weight(weight - smooth) + smooth
                compensation = self._compensate(transformed - quantized, u)
            else:
                weight = group.quantize_weight(weight)
            rows.append(quantized)
            weights.append(weight)
        output = torch.cat(rows, -1) @ torch.cat(weights)
        if compensation is not None:
            output = output + compensation
        return output if self.bias is None else output + self.bias

    def _smooth(self, u: torch.Tensor) -> torch.Tensor:
        """CWS product U_s diag(S G_s) V_s [K_m, N] (eq. 16-17)."""
        gate = self.anchor.singular[: self.cws_rank] * self.gate_cws
        return (u[:, : self.cws_rank] * gate) @ self.v[: self.cws_rank]

    def _compensate(self, residual: torch.Tensor, u: torch.Tensor) -> torch.Tensor | None:
        """MAC term (eq. 18-19) on text rows or all."""
        if not self.mac_rank:
            return None
        residual = fake_quantize_rows(residual, self.config.correction.residual_bits)
        gate = self.anchor.singular[: self.mac_rank] * self.gate_mac
        term = (residual @ u[:, : self.mac_rank] * gate) @ self.v[: self.mac_rank]
        if self.config.correction.mac_rows == "all":
            return term
        assert self.context.mask is not None, f"{self.name}: no modality mask while learning"
        return term * (self.context.mask == TEXT).float().reshape(*term.shape[:-1], 1)

    @torch.no_grad()
    def freeze(self) -> SplitLinear:
        """The quantized site with the learned values: integers, scales, factors."""
        order = self.plan.order
        scale = self.log_scale.exp()
        groups: dict[str, GroupWeights] = {}
        correction: Correction | None = None
        for name, group in self.groups.items():
            assert isinstance(group, TrainableGroup)
            matrices = group.matrices()
            p1, p2 = (None, None) if matrices is None else (matrices[0].clone(), matrices[2].clone())
            weight = self.weight[group.channels] * scale[group.channels, None]
            target = weight if p1 is None or p2 is None else invert_into_weight(weight, p1, p2)
            if name == "main" and self.rank:
                c = self.config.correction
                low_rank = quantize_low_rank(
                    replace(self.anchor, u=self._anchor_u()),
                    p1,
                    p2,
                    gate_cws=self.gate_cws,
                    gate_mac=self.gate_mac,
                    bits=c.bits,
                )
                if self.cws_rank:
                    target = target - low_rank.cws_product()
                correction = Correction(
                    **vars(low_rank), bits=c.bits, residual_bits=c.residual_bits, mac_rows=c.mac_rows
                )
            s = group.setting
            clip = torch.sigmoid(group.weight_clip)
            qweight, weight_scale = quantize_weight(target, s.bits, group_size=s.group_size, clip=clip)
            groups[name] = GroupWeights(qweight, weight_scale, p1, p2, s.bits, s.activation_bits)
            groups[name] = replace(groups[name], clip=float(torch.sigmoid(group.activation_clip)))
        return SplitLinear(
            self.name,
            order=order,
            groups=groups,
            context=self.context,
            correction=correction,
            bias=self.bias,
            channel_scale=(1.0 / scale)[order.long()].contiguous() if bool((scale != 1).any()) else None,
            group_size=self.config.group_size,
            activation_symmetric=self.config.activation_symmetric,
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind: "transform" (P and channel scale), "clip", "gate"."""
        kinds: dict[str, list[nn.Parameter]] = {"transform": [], "clip": [], "gate": []}
        for name, parameter in self.named_parameters():
            kind = "clip" if name.endswith("_clip") else "gate" if name.startswith("gate_") else "transform"
            kinds[kind].append(parameter)
        return kinds


def _setting(config: QuantConfig, group: str) -> GroupSetting:
    logit = CLIP_LOGIT if config.learning.epochs else NO_CLIP_LOGIT
    if group == "main":
        return GroupSetting(config.bits, config.activation_bits, config.group_size, config.activation_symmetric, logit)
    return GroupSetting(config.split.bits, config.split.activation_bits, 0, True, logit)


def _scale_start(input_absmax: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """SmoothQuant's balance sqrt(|x| / |w|) per channel, normalized to geometric mean one, as a logarithm [K]."""
    if input_absmax is None:
        return torch.zeros(weight.shape[0])
    start = 0.5 * (input_absmax.clamp(min=1e-4).log() - weight.abs().amax(1).clamp(min=1e-4).log())
    return start - start.mean()


def _merged_bias(linears: list[nn.Linear]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat([torch.zeros(x.out_features) if x.bias is None else x.bias.detach().float() for x in linears])
