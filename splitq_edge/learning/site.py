"""A site while it is learned: P, channel scale, clips and gates as parameters (paper eq. 2-3 and 13-21)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from splitq_edge.config import QuantConfig
from splitq_edge.correction.low_rank import quantize_low_rank, quantize_v, rank_of, svd_anchor, u_clip
from splitq_edge.learning.invertible import InvertibleMatrix
from splitq_edge.methods.scales import ScaleInputs, start_scale
from splitq_edge.modality import TEXT, ModalityContext
from splitq_edge.modules.split_linear import GROUPS, Correction, GroupWeights, SplitLinear
from splitq_edge.quant.affine import dequantize_weight, expand_scale, quantize_weight, weight_scale
from splitq_edge.quant.clipping import search_activation_clip, search_weight_clip
from splitq_edge.quant.fake import fake_quantize_rows, fake_quantize_weight
from splitq_edge.quant.rounding import gptq_codes, weight_towards
from splitq_edge.quant.transforms import (
    DENSE_WIDTH,
    apply_inverse,
    apply_transform,
    dense_transform,
    invert_into_weight,
    orthogonal_start,
    transform_shape,
)
from splitq_edge.splitting.plan import SplitPlan

CLIP_LOGIT = 4.0  # sigmoid(4) = 0.982, FlatQuant's start
NO_CLIP_LOGIT = 30.0  # sigmoid is 1 in float32: what is not learned does not clip

Matrices = tuple[torch.Tensor, ...] | None  # P1, P1^-1, P2, P2^-1


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
        place: the group's channels in the site's channel order.
        outputs: N.
        setting: bits.
        transform: blocks and factors of the transform, see `transform_shape`; None for the identity.
        device: of the parameters.
    """

    def __init__(
        self,
        place: slice,
        outputs: int,
        setting: GroupSetting,
        transform: tuple[int, int, int] | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.place = place
        self.setting = setting
        self.p1: InvertibleMatrix | None = None
        self.p2: InvertibleMatrix | None = None
        width = place.stop - place.start
        if transform is not None:
            blocks, a, b = transform
            self.p1 = InvertibleMatrix(orthogonal_start(a).to(device), blocks)
            self.p2 = InvertibleMatrix(orthogonal_start(b).to(device))
        scales = -(-width // setting.group_size) if setting.group_size else 0
        shape = (scales, outputs) if scales else (outputs,)
        self.weight_clip = nn.Parameter(torch.full(shape, setting.clip_logit, device=device))
        self.activation_clip = nn.Parameter(torch.tensor(setting.clip_logit, device=device))

    def matrices(self) -> Matrices:
        """P1, P1^-1, P2, P2^-1, or None for the identity."""
        if self.p1 is None or self.p2 is None:
            return None
        return (*self.p1(), *self.p2())

    def transform(self, rows: torch.Tensor, matrices: Matrices) -> torch.Tensor:
        """Activation side, [..., K_g]."""
        if matrices is None:
            return rows
        if rows.shape[-1] <= DENSE_WIDTH:
            return rows @ dense_transform(matrices[0], matrices[2])
        return apply_transform(rows, matrices[0], matrices[2])

    def untransform(self, weight: torch.Tensor, matrices: Matrices) -> torch.Tensor:
        """P^-1 W, [K_g, N]."""
        return weight if matrices is None else apply_inverse(weight, matrices[1], matrices[3])

    def quantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Fake-quantized activations."""
        clip = torch.sigmoid(self.activation_clip)
        return fake_quantize_rows(rows, self.setting.activation_bits, clip=clip, symmetric=self.setting.symmetric)

    def quantize_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Fake-quantized weight."""
        clip = torch.sigmoid(self.weight_clip)
        return fake_quantize_weight(weight, self.setting.bits, group_size=self.setting.group_size, clip=clip)


class _Permute(torch.autograd.Function):
    """x[..., order]; its gradient is a gather too, where indexing's would be a slow scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.order = order
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(-1, torch.argsort(ctx.order)), None


@dataclass(frozen=True)
class _GroupTarget:
    """What the integers of a group are made from: the weight behind P, CWS taken away, and its scale."""

    p1: torch.Tensor | None
    p2: torch.Tensor | None
    weight: torch.Tensor  # [K_g, N]
    scale: torch.Tensor  # [N] or [groups, N]


@dataclass(frozen=True)
class _WeightSide:
    """What a forward makes of the weight, whatever the rows.

    Attributes:
        matrices: by group.
        weight: [K, N] fake-quantized, CWS's product added.
        u: [K_m, R] fake-quantized, None without low-rank branches.
    """

    matrices: dict[str, Matrices]
    weight: torch.Tensor
    u: torch.Tensor | None


class TrainableSite(nn.Module):
    """The differentiable twin of `SplitLinear`.

    Args:
        name: site name.
        linears: linears that read the activation.
        plan: channel groups.
        config: the recipe.
        context: modality of the running pass.
        inputs: calibration rows, from which scale and clips start; None starts them at one.

    Attributes:
        quantize: False leaves every quantizer out; then the site equals the float linears.
        without: branches left out for reports: "cws", "mac" or both.
    """

    def __init__(
        self,
        name: str,
        linears: list[nn.Linear],
        plan: SplitPlan,
        config: QuantConfig,
        context: ModalityContext,
        inputs: ScaleInputs | None = None,
    ) -> None:
        super().__init__()
        self.name, self.plan, self.config, self.context = name, plan, config, context
        self.quantize = True
        self.without: frozenset[str] = frozenset()
        self.weight = merged_weight(linears)  # [K, N]
        self.order = plan.order.long().to(self.weight.device)  # main, text, vision channels
        self._permuted = self.weight[self.order]  # [K, N]
        self.bias = _merged_bias(linears)
        outputs = self.out_features = self.weight.shape[1]
        device = self.weight.device
        start = torch.zeros(self.weight.shape[0], device=device) if inputs is None else start_scale(inputs, config)
        self.log_scale = nn.Parameter(start)
        self.groups = nn.ModuleDict()
        begin = 0
        for group, width in zip(GROUPS, plan.widths, strict=True):
            if width:
                place = slice(begin, begin + width)
                transform = None if config.transform == "identity" else transform_shape(width, config.transform_width)
                self.groups[group] = TrainableGroup(place, outputs, _setting(config, group), transform, device)
            begin += width
        self._hessian: torch.Tensor | None = None
        self._cross: torch.Tensor | None = None
        self._row_weights: torch.Tensor | None = None
        self._target: torch.Tensor | None = None
        self._exact: torch.Tensor | None = None
        self._held: _WeightSide | None = None
        self._start_low_rank()
        if inputs is not None:
            self._start_clips(inputs)

    def _start_low_rank(self) -> None:
        """SVD anchor of the scaled main weight (eq. 20-21); gates are ones to begin with, the plain SVD."""
        full = min(self.plan.main.numel(), self.weight.shape[1])
        self.cws_rank = rank_of(self.config.correction.cws_ratio, full)
        self.mac_rank = rank_of(self.config.correction.mac_ratio, full)
        self.rank = max(self.cws_rank, self.mac_rank)
        if not self.rank:
            return
        main = self._group("main").place
        device = self.weight.device
        self.anchor_scale = self.log_scale.detach()[self.order[main]].clone()
        self.anchor = svd_anchor(self._permuted[main] * self.anchor_scale.exp()[:, None], self.rank)
        self.v = dequantize_weight(*quantize_v(self.anchor.v, self.config.correction.bits))
        self.gate_cws = nn.Parameter(torch.ones(self.cws_rank, device=device))
        self.gate_mac = nn.Parameter(torch.ones(self.mac_rank, device=device))

    @torch.no_grad()
    def _start_clips(self, inputs: ScaleInputs) -> None:
        """Clip factors by search, where the recipe asks for it."""
        clip, learned = self.config.clip, self.config.learning.epochs > 0
        rows = torch.cat([inputs.text_rows, inputs.vision_rows])
        groups = self._transformed_groups(rows)
        for name, (transformed, target) in groups.items():
            group = self._group(name)
            s = group.setting
            if clip.activation == "search":
                factor = search_activation_clip(
                    transformed, s.activation_bits, symmetric=s.symmetric, largest=clip.activation_max
                )
                group.activation_clip.fill_(_logit(torch.tensor(factor), learned=learned))
            elif clip.activation_max < 1:
                group.activation_clip.fill_(_logit(torch.tensor(clip.activation_max), learned=learned))
            if clip.weight == "search":
                importance = transformed.square().mean(0) if transformed.shape[0] else None
                factors = search_weight_clip(target, s.bits, group_size=s.group_size, importance=importance)
                group.weight_clip.copy_(_logit(factors, learned=learned))

    def _transformed_groups(self, rows: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """By group: rows behind scale and P [T, K_g], and the weight behind both, CWS taken away [K_g, N]."""
        permuted, weights = self._scaled_rows(rows), self._scaled_weight()
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in self.groups:
            group = self._group(name)
            matrices = group.matrices()
            transformed = group.transform(permuted[..., group.place], matrices)
            weight = group.untransform(weights[group.place], matrices)
            if name == "main" and self.cws_rank:
                weight = weight - self._smooth(self._factor_u(matrices))
            found[name] = (transformed, weight)
        return found

    def _group(self, name: str) -> TrainableGroup:
        group = self.groups[name]
        assert isinstance(group, TrainableGroup)
        return group

    def _anchor_u(self) -> torch.Tensor:
        """U_r [K_m, R], following the channel scale as it moves away from the anchor's."""
        main = self.order[self._group("main").place]
        return self.anchor.u * (self.log_scale[main] - self.anchor_scale).exp()[:, None]

    def _factor_u(self, matrices: Matrices) -> torch.Tensor:
        """Fake-quantized U = P^-1 U_r [K_m, R]."""
        u = self._group("main").untransform(self._anchor_u(), matrices)
        bits = self.config.correction.bits
        return fake_quantize_weight(u, bits, clip=u_clip(bits)) if self.quantize else u

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] float32 -> [..., N] float32, everything fake-quantized."""
        side = self._weight_side()
        permuted = self._scaled_rows(x)
        rows = []
        compensation: torch.Tensor | None = None
        for name, matrices in side.matrices.items():
            group = self._group(name)
            transformed = group.transform(permuted[..., group.place], matrices)
            rows.append(group.quantize_rows(transformed) if self.quantize else transformed)
            if name == "main" and side.u is not None:
                compensation = self._compensate(transformed - rows[-1], side.u)
        activations = torch.cat(rows, -1)
        self._observe(activations, compensation)
        output = activations @ side.weight
        if compensation is not None:
            output = output + compensation
        return output if self.bias is None else output + self.bias

    def float_output(self, x: torch.Tensor) -> torch.Tensor:
        """What the float linears say, without bias: x [..., K] -> [..., N]."""
        return x @ self.weight

    def _weight_side(self) -> _WeightSide:
        if self._held is not None:
            return self._held
        scaled = self._scaled_weight()
        matrices: dict[str, Matrices] = {}
        weights = []
        factor: torch.Tensor | None = None
        for name in self.groups:
            group = self._group(name)
            matrices[name] = group.matrices()
            weight = group.untransform(scaled[group.place], matrices[name])
            if name == "main" and self.rank:
                factor = self._factor_u(matrices[name])
                weight = self._smoothed(weight, factor)
            elif self.quantize:
                weight = group.quantize_weight(weight)
            weights.append(weight)
        return _WeightSide(matrices, torch.cat(weights), factor)

    @contextmanager
    def holding_weight(self) -> Iterator[None]:
        """Within the block, forwards quantize the weight once: for passes between which no parameter changes."""
        with torch.no_grad():
            self._held = self._weight_side()
        try:
            yield
        finally:
            self._held = None

    def hold_again(self) -> None:
        """Within `holding_weight`: quantize the weight anew, after a parameter has changed."""
        with torch.no_grad():
            self._held = None
            self._held = self._weight_side()

    def _scaled_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x / s [..., K], channels in the order main, text, vision."""
        return _Permute.apply(x, self.order) / self.log_scale[self.order].exp()

    def _scaled_weight(self) -> torch.Tensor:
        """s W [K, N], channels in the order main, text, vision."""
        return self._permuted * self.log_scale[self.order].exp()[:, None]

    def _smoothed(self, weight: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Q(B - U_s V_s) + U_s V_s of the main group (eq. 17)."""
        group = self._group("main")
        if not self.cws_rank or "cws" in self.without:
            return group.quantize_weight(weight) if self.quantize else weight
        smooth = self._smooth(u)
        rest = weight - smooth
        return (group.quantize_weight(rest) if self.quantize else rest) + smooth

    def _smooth(self, u: torch.Tensor) -> torch.Tensor:
        """CWS product U_s diag(S G_s) V_s [K_m, N] (eq. 16-17)."""
        gate = self.anchor.singular[: self.cws_rank] * self.gate_cws
        return (u[:, : self.cws_rank] * gate) @ self.v[: self.cws_rank]

    def _compensate(self, residual: torch.Tensor, u: torch.Tensor) -> torch.Tensor | None:
        """MAC term (eq. 18-19) on text rows or all."""
        if not self.mac_rank or "mac" in self.without:
            return None
        if self.quantize:
            residual = fake_quantize_rows(residual, self.config.correction.residual_bits)
        gate = self.anchor.singular[: self.mac_rank] * self.gate_mac
        term = (residual @ u[:, : self.mac_rank] * gate) @ self.v[: self.mac_rank]
        if self.config.correction.mac_rows == "all":
            return term
        assert self.context.mask is not None, f"{self.name}: no modality mask while learning"
        return term * (self.context.mask == TEXT).float().reshape(*term.shape[:-1], 1)

    @contextmanager
    def observing(self, weights: torch.Tensor, target: torch.Tensor | None = None) -> Iterator[None]:
        """Within the block, forwards add A^T diag(w) A of the quantized activations to the matrix that GPTQ uses.

        Args:
            weights: w of every token, [batch, sequence, 1], 0 for padding.
            target: `float_output` of what the float model feeds the site, [batch, sequence, N]; given, A^T diag(w) E is
                summed, too, with the error E of the exact weight on the quantized activations, MAC added.
        """
        self._row_weights, self._target = weights, target
        try:
            yield
        finally:
            self._row_weights = self._target = None

    def _observe(self, activations: torch.Tensor, compensation: torch.Tensor | None) -> None:
        if self._row_weights is None:
            return
        root = self._row_weights.sqrt()
        rows = (activations * root).reshape(-1, activations.shape[-1])
        product = rows.T @ rows
        self._hessian = product if self._hessian is None else self._hessian.add_(product)
        if self._target is None:
            return
        error = self._target - activations @ self._exact_weight()
        if compensation is not None:
            error = error - compensation
        product = rows.T @ (error * root).reshape(-1, error.shape[-1])
        self._cross = product if self._cross is None else self._cross.add_(product)

    def _exact_weight(self) -> torch.Tensor:
        """P^-1 s W of all groups [K, N], kept until `take_cross`: it is asked for with every batch."""
        if self._exact is None:
            scaled = self._scaled_weight()
            groups = [self._group(name) for name in self.groups]
            self._exact = torch.cat([group.untransform(scaled[group.place], group.matrices()) for group in groups])
        return self._exact

    def take_hessian(self) -> torch.Tensor | None:
        """What `observing` summed up, [K, K] in the order main, text, vision; forgotten afterwards."""
        hessian, self._hessian = self._hessian, None
        return hessian

    def take_cross(self) -> torch.Tensor | None:
        """What `observing` summed up with a target, [K, N] in the same order; forgotten afterwards."""
        cross, self._cross, self._exact = self._cross, None, None
        return cross

    @torch.no_grad()
    def freeze(
        self, hessian: torch.Tensor | None = None, cross: torch.Tensor | None = None, rows: int = 0
    ) -> SplitLinear:
        """The quantized site with the learned values: integers, scales, factors.

        Args:
            hessian: [K, K] of `take_hessian` for GPTQ rounding, None for nearest.
            cross: [K, N] of `take_cross` for rounding towards the float model's outputs, None for towards the weight.
            rows: that both were summed over.
        """
        correction: Correction | None = None
        targets: dict[str, _GroupTarget] = {}
        for name in self.groups:
            targets[name], correction = self._group_target(name, correction)
        codes = self._codes(targets, hessian, cross, rows)
        groups = {
            name: GroupWeights(
                codes[name],
                target.scale,
                target.p1,
                target.p2,
                self._group(name).setting.bits,
                self._group(name).setting.activation_bits,
                clip=float(torch.sigmoid(self._group(name).activation_clip)),
            )
            for name, target in targets.items()
        }
        order = self.plan.order.to(self.weight.device)
        scale = self.log_scale.exp()
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

    def _group_target(self, name: str, correction: Correction | None) -> tuple[_GroupTarget, Correction | None]:
        group = self._group(name)
        matrices = group.matrices()
        p1, p2 = (None, None) if matrices is None else (matrices[0].clone(), matrices[2].clone())
        weight = self._permuted[group.place] * self.log_scale[self.order[group.place]].exp()[:, None]
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
            correction = Correction(**vars(low_rank), bits=c.bits, residual_bits=c.residual_bits, mac_rows=c.mac_rows)
        s = group.setting
        clip = torch.sigmoid(group.weight_clip)
        return _GroupTarget(
            p1, p2, target, weight_scale(target, s.bits, group_size=s.group_size, clip=clip)
        ), correction

    def _codes(
        self, targets: dict[str, _GroupTarget], hessian: torch.Tensor | None, cross: torch.Tensor | None, rows: int
    ) -> dict[str, torch.Tensor]:
        """int8 codes [K_g, N] of every group; GPTQ lets the error of one group flow into the next."""
        settings = {name: self._group(name).setting for name in targets}
        if hessian is None:
            return {
                name: quantize_weight(
                    target.weight,
                    settings[name].bits,
                    group_size=settings[name].group_size,
                    clip=torch.sigmoid(self._group(name).weight_clip),
                )[0]
                for name, target in targets.items()
            }
        widths = [target.weight.shape[0] for target in targets.values()]
        weight = _joined([target.weight for target in targets.values()])
        if cross is not None:
            weight = weight_towards(weight, hessian, cross, rows)
        scales = [
            expand_scale(target.scale, width, settings[name].group_size).expand(width, -1)
            for (name, target), width in zip(targets.items(), widths, strict=True)
        ]
        bits = torch.cat(
            [torch.full((width,), settings[name].bits) for name, width in zip(targets, widths, strict=True)]
        )
        codes = gptq_codes(weight, hessian, _joined(scales), bits, name=self.name)
        return {name: part.contiguous() for name, part in zip(targets, codes.split(widths), strict=True)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind: "transform" (P and channel scale), "clip", "gate"."""
        kinds: dict[str, list[nn.Parameter]] = {"transform": [], "clip": [], "gate": []}
        for name, parameter in self.named_parameters():
            kind = "clip" if name.endswith("_clip") else "gate" if name.startswith("gate_") else "transform"
            kinds[kind].append(parameter)
        return kinds


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """All rows; a single part itself, which may be large."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def merged_weight(linears: list[nn.Linear]) -> torch.Tensor:
    """The weights of a site side by side, [K, N] float32."""
    return torch.cat([linear.weight.detach().float() for linear in linears]).T.contiguous()


def _logit(factor: torch.Tensor, *, learned: bool) -> torch.Tensor:
    """Logit of a clip factor; what will be learned stays where the sigmoid still has a slope."""
    if learned:
        return torch.logit(factor.clamp(max=torch.sigmoid(torch.tensor(CLIP_LOGIT)).item()))
    return torch.where(factor >= 1, torch.full_like(factor, NO_CLIP_LOGIT), torch.logit(factor, eps=1e-6))


def _setting(config: QuantConfig, group: str) -> GroupSetting:
    logit = CLIP_LOGIT if config.learning.epochs else NO_CLIP_LOGIT
    if group == "main":
        return GroupSetting(config.bits, config.activation_bits, config.group_size, config.activation_symmetric, logit)
    return GroupSetting(config.split.bits, config.split.activation_bits, 0, True, logit)


def _merged_bias(linears: list[nn.Linear]) -> torch.Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features).float()
            if linear.bias is None
            else linear.bias.detach().float()
            for linear in linears
        ]
    )
