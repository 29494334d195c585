"""What a node of domain `ai.splitq` states (docs/ops.md): attributes, optional inputs, weight form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.spec_checks import (
    GROUPS,
    check_activations,
    check_bits,
    check_joined,
    check_positive,
    check_ranks,
)

DOMAIN = "ai.splitq"
VERSION = 1

SPLIT_INPUTS = (
    "x",
    "channel_order",
    "channel_scale",
    "p1_main",
    "p2_main",
    "p1_text",
    "p2_text",
    "p1_vision",
    "p2_vision",
    "activation_clip",
)


@dataclass(frozen=True, kw_only=True)
class ChannelSplitQuantizeSpec:
    """All that a `ChannelSplitQuantize` node states.

    Attributes:
        K: input channels.
        group_widths: (K_m, K_t, K_v), the channels of the groups main, text and vision.
        activation_bits: bits of the main codes.
        outlier_activation_bits: bits of the text and vision codes.
        activation_symmetric: False for asymmetric main codes (activation_bits below 8).
        residual_bits: bits of the residual codes.
        channel_order: whether the input channel_order is given; so for the four below.
        channel_scale: see channel_order.
        transforms: whether the Kronecker factors of main, text and vision are given.
        activation_clip: see channel_order.
        residual: whether the residual outputs are wanted.

    Raises:
        SplitQError: a value outside the contract.
    """

    K: int
    group_widths: tuple[int, int, int]
    activation_bits: int
    outlier_activation_bits: int = 8
    activation_symmetric: bool = True
    residual_bits: int = 8
    channel_order: bool = False
    channel_scale: bool = False
    transforms: tuple[bool, bool, bool] = (False, False, False)
    activation_clip: bool = False
    residual: bool = False

    op_type: ClassVar[str] = "ChannelSplitQuantize"
    inputs: ClassVar[tuple[str, ...]] = SPLIT_INPUTS
    outputs: ClassVar[tuple[str, ...]] = tuple(
        f"{group}_{part}" for group in (*GROUPS, "residual") for part in ("codes", "scale")
    )

    def __post_init__(self) -> None:
        check_activations(self)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that have channels."""
        return tuple(group for group, width in zip(GROUPS, self.group_widths, strict=True) if width)

    @property
    def present_inputs(self) -> tuple[str, ...]:
        """The inputs the node takes, in the order of the contract."""
        return tuple(name for name in self.inputs if name == "x" or _takes_split_input(self, name))

    @property
    def present_outputs(self) -> tuple[str, ...]:
        """The outputs the node gives, in the order of the contract."""
        given = (*self.groups, "residual") if self.residual else self.groups
        return tuple(name for name in self.outputs if name.split("_")[0] in given)

    @property
    def attributes(self) -> dict[str, int | list[int]]:
        """The attributes of the node, all of them."""
        return {
            "K": self.K,
            "group_widths": list(self.group_widths),
            "activation_bits": self.activation_bits,
            "outlier_activation_bits": self.outlier_activation_bits,
            "activation_symmetric": int(self.activation_symmetric),
            "residual_bits": self.residual_bits,
        }

    @property
    def overload(self) -> str:
        """Names the variant; the same for equal specs and for no other."""
        residual = f"res{self.residual_bits}" if self.residual else _unless(self.residual_bits, 8, "r{}")
        return _join(_activation_token(self), _widths_token(self), *_activation_flags(self), residual)


@dataclass(frozen=True, kw_only=True)
class CrossModalCorrectionSpec:
    """All that a `CrossModalCorrection` node states.

    Attributes:
        K: input channels, K_m of the site.
        N: output channels.
        bits: bits of u and v.
        cws_rank: columns of u and rows of v that CWS uses; 0 for none.
        mac_rank: the same for MAC.
        mac_rows: "text" for MAC on rows of modality 0, "all" for every row.
        packed: whether u and v are packed.

    Raises:
        SplitQError: a value outside the contract.
    """

    K: int
    N: int
    bits: int = 4
    cws_rank: int = 0
    mac_rank: int = 0
    mac_rows: str = "text"
    packed: bool = False

    op_type: ClassVar[str] = "CrossModalCorrection"
    inputs: ClassVar[tuple[str, ...]] = (
        "main_codes",
        "main_scale",
        "residual_codes",
        "residual_scale",
        "modality",
        "u",
        "u_scale",
        "v",
        "v_scale",
        "gate_cws",
        "gate_mac",
    )
    outputs: ClassVar[tuple[str, ...]] = ("correction",)

    def __post_init__(self) -> None:
        check_positive(self, "K", "N")
        check_bits(self, "bits")
        check_ranks(self)
        if not self.rank:
            raise SplitQError(f"{self.op_type}: expected a rank above 0, got none; leave the node out")

    @property
    def rank(self) -> int:
        """R, the columns of u and rows of v."""
        return max(self.cws_rank, self.mac_rank)

    @property
    def masked(self) -> bool:
        """Whether the modality decides which rows take MAC."""
        return self.mac_rank > 0 and self.mac_rows == "text"

    @property
    def present_inputs(self) -> tuple[str, ...]:
        """The inputs the node takes, in the order of the contract."""
        absent: set[str] = set()
        if not self.mac_rank:
            absent |= {"residual_codes", "residual_scale", "gate_mac"}
        if not self.cws_rank:
            absent |= {"gate_cws"}
        if not self.masked:
            absent |= {"modality"}
        return tuple(name for name in self.inputs if name not in absent)

    @property
    def present_outputs(self) -> tuple[str, ...]:
        """The outputs the node gives."""
        return self.outputs

    @property
    def attributes(self) -> dict[str, int | str]:
        """The attributes of the node, all of them."""
        names = ("K", "N", "bits", "cws_rank", "mac_rank", "mac_rows")
        return {name: getattr(self, name) for name in names}

    @property
    def overload(self) -> str:
        """Names the variant; the same for equal specs and for no other."""
        packed = "packed" if self.packed else ""
        return _join(f"w{self.bits}", f"k{self.K}", f"n{self.N}", *_rank_tokens(self), packed)


@dataclass(frozen=True, kw_only=True)
class SplitQLinearSpec:
    """All that a `SplitQLinear` node states: attributes, optional inputs and weight form.

    Attributes:
        K: input channels.
        N: output channels.
        group_widths: (K_m, K_t, K_v), the channels of the groups main, text and vision.
        bits: bits of the main weight.
        activation_bits: bits of the main activations.
        outlier_bits: bits of the text and vision weights.
        outlier_activation_bits: bits of the text and vision activations.
        activation_symmetric: False for asymmetric main activations (activation_bits below 8).
        residual_bits: bits of MAC's residual.
        correction_bits: bits of u and v.
        block_size: input channels that share a scale of the main weight; 0 for all of them.
        cws_rank: columns of u and rows of v that CWS uses; 0 for none.
        mac_rank: the same for MAC.
        mac_rows: "text" for MAC on rows of modality 0, "all" for every row.
        channel_order: whether the input channel_order is given; so for the four below.
        channel_scale: see channel_order.
        transforms: whether the Kronecker factors of main, text and vision are given.
        activation_clip: see channel_order.
        bias: see channel_order.
        packed: whether the weights are packed (for the native kernels) instead of INT4 or INT8 tensors.
        constant_sizes: how many numbers of each input lie in the input `constants`, in the order of `inputs` up to
            bias, see `joined`; () if all have inputs of their own.

    Raises:
        SplitQError: a value outside the contract.
    """

    K: int
    N: int
    group_widths: tuple[int, int, int]
    bits: int
    activation_bits: int
    outlier_bits: int = 4
    outlier_activation_bits: int = 8
    activation_symmetric: bool = True
    residual_bits: int = 8
    correction_bits: int = 4
    block_size: int = 0
    cws_rank: int = 0
    mac_rank: int = 0
    mac_rows: str = "text"
    channel_order: bool = False
    channel_scale: bool = False
    transforms: tuple[bool, bool, bool] = (False, False, False)
    activation_clip: bool = False
    bias: bool = False
    packed: bool = False
    constant_sizes: tuple[int, ...] = ()

    op_type: ClassVar[str] = "SplitQLinear"
    inputs: ClassVar[tuple[str, ...]] = (
        "x",
        "modality",
        *SPLIT_INPUTS[1:],
        *(f"{part}_{group}" for group in GROUPS for part in ("weight", "scale")),
        "u",
        "u_scale",
        "v",
        "v_scale",
        "gate_cws",
        "gate_mac",
        "bias",
        "constants",
    )
    outputs: ClassVar[tuple[str, ...]] = ("y",)

    def __post_init__(self) -> None:
        check_positive(self, "N")
        check_joined(self)
        check_bits(self, "bits", "outlier_bits", "correction_bits")
        check_ranks(self)
        check_activations(self)
        if self.block_size and (self.block_size < 16 or self.block_size % 16):
            raise SplitQError(
                f"{self.op_type}: expected block_size 0 or a multiple of 16, got {self.block_size}; "
                "change the group size of the recipe"
            )

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that have channels."""
        return self.quantize.groups

    @property
    def quantize(self) -> ChannelSplitQuantizeSpec:
        """The first half of the node."""
        return ChannelSplitQuantizeSpec(
            K=self.K,
            group_widths=self.group_widths,
            activation_bits=self.activation_bits,
            outlier_activation_bits=self.outlier_activation_bits,
            activation_symmetric=self.activation_symmetric,
            residual_bits=self.residual_bits,
            channel_order=self.channel_order,
            channel_scale=self.channel_scale,
            transforms=self.transforms,
            activation_clip=self.activation_clip,
            residual=self.mac_rank > 0,
        )

    @property
    def correction(self) -> CrossModalCorrectionSpec | None:
        """The low-rank half of the node, if it has one."""
        if not max(self.cws_rank, self.mac_rank):
            return None
        return CrossModalCorrectionSpec(
            K=self.group_widths[0],
            N=self.N,
            bits=self.correction_bits,
            cws_rank=self.cws_rank,
            mac_rank=self.mac_rank,
            mac_rows=self.mac_rows,
            packed=self.packed,
        )

    @property
    def joined(self) -> tuple[str, ...]:
        """The inputs that lie one behind the other in the input `constants`: those of floats and the channel order."""
        return tuple(name for name, size in zip(self.inputs, self.constant_sizes, strict=False) if size)

    @property
    def present_inputs(self) -> tuple[str, ...]:
        """The inputs the node takes, in the order of the contract."""
        if not self.constant_sizes:
            return self.meaning_inputs
        return (*(name for name in self.meaning_inputs if name not in self.joined), "constants")

    @property
    def meaning_inputs(self) -> tuple[str, ...]:
        """What the node is given, through inputs of its own or in `constants`, in the order of the contract."""
        present = {f"{part}_{group}" for group in self.groups for part in ("weight", "scale")}
        present.update(self.quantize.present_inputs)
        if self.correction:
            activations = {"main_codes", "main_scale", "residual_codes", "residual_scale"}
            present.update(set(self.correction.present_inputs) - activations)
        if self.bias:
            present.add("bias")
        return tuple(name for name in self.inputs if name in present)

    @property
    def present_outputs(self) -> tuple[str, ...]:
        """The outputs the node gives."""
        return self.outputs

    @property
    def attributes(self) -> dict[str, int | str | list[int]]:
        """The attributes of the node, all of them."""
        joined: dict[str, int | str | list[int]] = {}
        if self.constant_sizes:
            joined["constant_sizes"] = list(self.constant_sizes)
        return joined | {
            "K": self.K,
            "N": self.N,
            "group_widths": list(self.group_widths),
            "bits": self.bits,
            "activation_bits": self.activation_bits,
            "outlier_bits": self.outlier_bits,
            "outlier_activation_bits": self.outlier_activation_bits,
            "activation_symmetric": int(self.activation_symmetric),
            "residual_bits": self.residual_bits,
            "correction_bits": self.correction_bits,
            "block_size": self.block_size,
            "cws_rank": self.cws_rank,
            "mac_rank": self.mac_rank,
            "mac_rows": self.mac_rows,
        }

    @property
    def overload(self) -> str:
        """Names the variant; the same for equal specs and for no other."""
        block = f"b{self.block_size}" if self.block_size else ""
        return _join(
            f"w{self.bits}{block}{_activation_token(self)}",
            _widths_token(self),
            f"n{self.N}",
            *_rank_tokens(self),
            _unless(self.outlier_bits, 4, "ow{}"),
            _unless(self.residual_bits, 8, "r{}"),
            _unless(self.correction_bits, 4, "c{}"),
            *_activation_flags(self),
            "bias" if self.bias else "",
            "packed" if self.packed else "",
            _joined_token(self),
        )


def _joined_token(spec: SplitQLinearSpec) -> str:
    """Rows of the first factors, with their columns where they have blocks; the rest of the spec gives all others."""
    if not spec.constant_sizes:
        return ""
    shapes = [joined_factor_shape(f"p1_{group}", spec.constant_sizes, spec.group_widths) for group in spec.groups]
    return ".".join(["joined", *(f"{rows}" if rows == a else f"{rows}x{a}" for rows, a in shapes)])


def joined_factor_shape(name: str, sizes: Sequence[int], widths: Sequence[int]) -> tuple[int, int]:
    """Shape of a Kronecker factor in `constants`: p2 is square, p1 has the rows that p2 leaves of the group's channels.

    Args:
        name: "p1_main" and the like.
        sizes: numbers of each input, 0 for those that `constants` lacks.
        widths: channels of the groups.

    Returns:
        Rows and columns, zeros for a group without factors.
    """
    group = name[3:]
    b = isqrt(sizes[SplitQLinearSpec.inputs.index(f"p2_{group}")])
    if not b or name.startswith("p2_"):
        return b, b
    rows = widths[GROUPS.index(group)] // b
    return rows, sizes[SplitQLinearSpec.inputs.index(name)] // rows


class _WholeSpec:
    """Of an op whose nodes take every input, give every output and have one body."""

    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    overload: ClassVar[str] = ""

    @property
    def present_inputs(self) -> tuple[str, ...]:
        """The inputs the node takes."""
        return self.inputs

    @property
    def present_outputs(self) -> tuple[str, ...]:
        """The outputs the node gives."""
        return self.outputs


@dataclass(frozen=True, kw_only=True)
class SwiGLUSpec(_WholeSpec):
    """All that a `SwiGLU` node states.

    Attributes:
        N: channels of its output, half of those of its input.

    Raises:
        SplitQError: N is below 1.
    """

    N: int

    op_type: ClassVar[str] = "SwiGLU"
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    outputs: ClassVar[tuple[str, ...]] = ("y",)

    def __post_init__(self) -> None:
        check_positive(self, "N")

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of the node, all of them."""
        return {"N": self.N}


@dataclass(frozen=True, kw_only=True)
class CachedAttentionSpec(_WholeSpec):
    """All that a `CachedAttention` node states.

    Attributes:
        num_heads: of the queries, a multiple of kv_num_heads.
        kv_num_heads: of keys and values.
        head_size: channels of a head, even.
        scale: of the scores.

    Raises:
        SplitQError: a number is below 1, or heads or their size do not divide.
    """

    num_heads: int
    kv_num_heads: int
    head_size: int
    scale: float

    op_type: ClassVar[str] = "CachedAttention"
    inputs: ClassVar[tuple[str, ...]] = (
        "qkv",
        "past_key",
        "past_value",
        "last_key",
        "total_length",
        "cosine",
        "sine",
        "position_ids",
        "bias",
        "new_tokens",
    )
    outputs: ClassVar[tuple[str, ...]] = ("y", "present_key", "present_value")

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "kv_num_heads", "head_size")
        if self.num_heads % self.kv_num_heads or self.head_size % 2:
            raise SplitQError(
                "CachedAttention: expected num_heads a multiple of kv_num_heads and an even head_size, got "
                f"{self.num_heads}, {self.kv_num_heads} and {self.head_size}; correct the model's configuration"
            )

    @property
    def channels(self) -> int:
        """Of the input qkv."""
        return (self.num_heads + 2 * self.kv_num_heads) * self.head_size

    @property
    def attributes(self) -> dict[str, int | float]:
        """The attributes of the node, all of them."""
        return {
            "num_heads": self.num_heads,
            "kv_num_heads": self.kv_num_heads,
            "head_size": self.head_size,
            "scale": self.scale,
        }


@dataclass(frozen=True, kw_only=True)
class SkipRMSNormSpec(_WholeSpec):
    """All that a `SkipRMSNorm` node states.

    Attributes:
        N: channels.
        epsilon: added to the mean of the squares.

    Raises:
        SplitQError: N is below 1, or epsilon below 0.
    """

    N: int
    epsilon: float

    op_type: ClassVar[str] = "SkipRMSNorm"
    inputs: ClassVar[tuple[str, ...]] = ("x", "skip", "weight")
    outputs: ClassVar[tuple[str, ...]] = ("y", "sum")

    def __post_init__(self) -> None:
        check_positive(self, "N")
        if self.epsilon < 0:
            raise SplitQError(
                f"SkipRMSNorm: expected an epsilon of at least 0, got {self.epsilon}; correct the model's configuration"
            )

    @property
    def attributes(self) -> dict[str, int | float]:
        """The attributes of the node, all of them."""
        return {"N": self.N, "epsilon": self.epsilon}


Spec = (
    SplitQLinearSpec
    | ChannelSplitQuantizeSpec
    | CrossModalCorrectionSpec
    | SwiGLUSpec
    | CachedAttentionSpec
    | SkipRMSNormSpec
)


def _takes_split_input(spec: ChannelSplitQuantizeSpec, name: str) -> bool:
    """Whether an optional input of the first half is given."""
    if name.startswith(("p1_", "p2_")):
        return spec.transforms[GROUPS.index(name[3:])]
    return getattr(spec, name)


def _join(*tokens: str) -> str:
    return "_".join(token for token in tokens if token)


def _unless(value: int, default: int, form: str) -> str:
    return "" if value == default else form.format(value)


def _activation_token(spec: SplitQLinearSpec | ChannelSplitQuantizeSpec) -> str:
    return f"a{spec.activation_bits}" + ("" if spec.activation_symmetric else "u")


def _widths_token(spec: SplitQLinearSpec | ChannelSplitQuantizeSpec) -> str:
    return ".".join(map(str, spec.group_widths))


def _activation_flags(spec: SplitQLinearSpec | ChannelSplitQuantizeSpec) -> list[str]:
    transforms = "".join(str(int(given)) for given in spec.transforms)
    return [
        _unless(spec.outlier_activation_bits, 8, "oa{}"),
        "order" if spec.channel_order else "",
        "scale" if spec.channel_scale else "",
        f"p{transforms}" if any(spec.transforms) else "",
        "clip" if spec.activation_clip else "",
    ]


def _rank_tokens(spec: SplitQLinearSpec | CrossModalCorrectionSpec) -> list[str]:
    mac = f"mac{spec.mac_rank}" + ("all" if spec.mac_rows == "all" else "")
    return [f"cws{spec.cws_rank}" if spec.cws_rank else "", mac if mac != "mac0" else ""]
