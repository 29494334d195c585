"""What the contract of the ops (docs/ops.md) allows in a spec; every function raises SplitQError otherwise."""

from __future__ import annotations

from typing import Any

from splitq_edge.errors import SplitQError

BITS = (2, 3, 4, 6, 8)
GROUPS = ("main", "text", "vision")
MAC_ROWS = ("text", "all")


def check_activations(spec: Any) -> None:
    """Checks the fields of specs that quantize activations: bits, groups, transforms, symmetry."""
    check_bits(spec, "activation_bits", "outlier_activation_bits", "residual_bits")
    widths = spec.group_widths
    if len(widths) != len(GROUPS) or widths[0] < 1 or min(widths) < 0 or sum(widths) != spec.K:
        raise SplitQError(
            f"{spec.op_type}: expected group_widths [K_m, K_t, K_v] with K_m > 0 and the sum K = {spec.K}, "
            f"got {list(widths)}; correct the split plan"
        )
    for group, width, transform in zip(GROUPS, widths, spec.transforms, strict=True):
        if transform and not width:
            raise SplitQError(f"{spec.op_type}: expected no transform of the empty {group} group, got one; drop it")
    if not spec.activation_symmetric and spec.activation_bits == 8:
        raise SplitQError(
            f"{spec.op_type}: expected activation_bits below 8 for asymmetric activations, got 8; "
            "set activation_symmetric"
        )


def check_bits(spec: Any, *names: str) -> None:
    """Checks fields that are bit widths."""
    for name in names:
        if getattr(spec, name) not in BITS:
            raise SplitQError(
                f"{spec.op_type}: expected {name} 2, 3, 4, 6 or 8, got {getattr(spec, name)}; change the recipe"
            )


def check_joined(spec: Any) -> None:
    """Checks constant_sizes, if the spec has any."""
    if not spec.constant_sizes:
        return
    apart = {"x", "modality", "u", "v", *(f"weight_{group}" for group in GROUPS)}
    given = [name for name, size in zip(spec.inputs, spec.constant_sizes, strict=False) if size]
    wanted = [name for name in spec.meaning_inputs if name not in apart]
    if len(spec.constant_sizes) != len(spec.inputs) - 1 or min(spec.constant_sizes) < 0 or given != wanted:
        raise SplitQError(
            f"{spec.op_type}: expected constant_sizes of {len(spec.inputs) - 1} inputs, above 0 for "
            f"{', '.join(wanted)}, got {list(spec.constant_sizes)}; join the node's constants anew"
        )


def check_positive(spec: Any, *names: str) -> None:
    """Checks fields that are sizes."""
    for name in names:
        if getattr(spec, name) < 1:
            raise SplitQError(f"{spec.op_type}: expected {name} above 0, got {getattr(spec, name)}; give the shape")


def check_ranks(spec: Any) -> None:
    """Checks cws_rank, mac_rank and mac_rows."""
    if min(spec.cws_rank, spec.mac_rank) < 0:
        raise SplitQError(
            f"{spec.op_type}: expected ranks of 0 or more, got cws_rank {spec.cws_rank}, "
            f"mac_rank {spec.mac_rank}; use 0 for none"
        )
    if spec.mac_rows not in MAC_ROWS:
        raise SplitQError(f"{spec.op_type}: expected mac_rows text or all, got '{spec.mac_rows}'; choose one of them")
