"""A quantized site as the op sees it: the node's spec and its initializers."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from splitq_edge.exporters.joined_constants import is_weight, join_constants
from splitq_edge.exporters.nodes import SplitQLinearSpec, weight_initializer
from splitq_edge.modules.split_linear import GROUPS, SplitLinear


def site_node(site: SplitLinear, *, packed: bool) -> tuple[SplitQLinearSpec, dict[str, TensorProto]]:
    """A site's node and its constant inputs; with packed weights all other constants are one tensor."""
    spec = _spec(site, packed=packed)
    tensors = _initializers(site, spec)
    if not packed:
        return spec, tensors
    short = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items() if not is_weight(name)}
    spec, joined = join_constants(spec, short)
    tensors = {name: tensor for name, tensor in tensors.items() if is_weight(name)}
    return spec, tensors | {"constants": numpy_helper.from_array(joined, f"{site.name}.constants")}


def _spec(site: SplitLinear, *, packed: bool) -> SplitQLinearSpec:
    """The node variant that computes a site."""
    groups, correction = site.groups, site.correction
    outlier = groups.get("text") or groups.get("vision")
    identity = bool((site.order == torch.arange(site.in_features)).all())
    return SplitQLinearSpec(
        K=site.in_features,
        N=site.out_features,
        group_widths=site.widths,  # type: ignore[arg-type]
        bits=groups["main"].bits,
        activation_bits=groups["main"].activation_bits,
        outlier_bits=outlier.bits if outlier else 4,
        outlier_activation_bits=outlier.activation_bits if outlier else 8,
        activation_symmetric=site.activation_symmetric,
        residual_bits=correction.residual_bits if correction else 8,
        correction_bits=correction.bits if correction else 4,
        block_size=site.group_size,
        cws_rank=correction.gate_cws.numel() if correction else 0,
        mac_rank=correction.gate_mac.numel() if correction else 0,
        mac_rows=correction.mac_rows if correction else "text",
        channel_order=not identity,
        channel_scale=site.channel_scale is not None,
        transforms=tuple(name in groups and groups[name].p1 is not None for name in GROUPS),  # type: ignore[arg-type]
        activation_clip=any(group.clip != 1.0 for group in groups.values()),
        bias=site.bias is not None,
        packed=packed,
    )


def _initializers(site: SplitLinear, spec: SplitQLinearSpec) -> dict[str, TensorProto]:
    """Constant inputs of a site's node, each with an input of its own, by the contract's input name.

    Tensors are named `<site>.<input>`.
    """
    tensors: dict[str, TensorProto] = {}

    def plain(name: str, value: torch.Tensor | None) -> None:
        if value is not None:
            array = np.ascontiguousarray(value.detach().cpu().numpy())
            tensors[name] = numpy_helper.from_array(array, f"{site.name}.{name}")

    def weight(name: str, codes: torch.Tensor, bits: int, block_size: int = 0) -> None:
        tensors[name] = weight_initializer(f"{site.name}.{name}", codes.cpu().numpy(), bits, spec.packed, block_size)

    if spec.channel_order:
        plain("channel_order", site.order)
    plain("channel_scale", site.channel_scale)
    if spec.activation_clip:
        clips = [site.groups[name].clip if name in site.groups else 1.0 for name in GROUPS]
        plain("activation_clip", torch.tensor(clips, dtype=torch.float32))
    for name, group in site.groups.items():
        plain(f"p1_{name}", group.p1)
        plain(f"p2_{name}", group.p2)
        weight(f"weight_{name}", group.qweight, group.bits, spec.block_size if name == "main" else 0)
        plain(f"scale_{name}", group.scale)
    if site.correction is not None:
        for name in ("u", "v"):
            weight(name, getattr(site.correction, name), site.correction.bits)
            plain(f"{name}_scale", getattr(site.correction, f"{name}_scale"))
        for name in ("gate_cws", "gate_mac"):
            gate = getattr(site.correction, name)
            plain(name, gate if gate.numel() else None)
    plain("bias", site.bias)
    return tensors
