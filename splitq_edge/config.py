"""The recipe of a quantization: what a user may choose, validated when it is made. No heavy import."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from splitq_edge.errors import SplitQError

BIT_WIDTHS = (2, 3, 4, 6, 8)
BLOCK_SIZES = (0, 32, 64, 128)
RANGE_METHODS = ("minmax", "percentile", "mse")  # of static activations, quant.static_ranges
TRANSFORMS = ("hadamard", "identity")
MIN_TRANSFORM_WIDTH = 16
CHANNEL_RULES = ("mocd", "random", "text-max", "vision-max", "all-max", "modality-max")
ROUNDINGS = ("nearest", "gptq", "gptaq")
SCALES = ("none", "smoothquant", "awq", "mbq")
VISION_SCHEMES = ("none", "W8A8", "W4A8", "W4A4")
LM_HEAD_SCHEMES = ("none", "W8A8", "W6A8", "W4A8")
EMBEDDINGS = ("none", "W8", "W4")
KV_CACHES = {"float32": 0, "float16": 16, "int8": 8, "int4": 4}  # and their `kv_cache_bits`
KV_CACHE_BITS = tuple(KV_CACHES.values())

# What YAML may give for a field's declared type; a bool is no number here.
PLAIN_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


def _require(ok: bool, setting: str, expected: str, got: object) -> None:
    if not ok:
        raise SplitQError(f"recipe: {setting}: expected {expected}, got {got!r}; change it in the recipe")


@dataclass(frozen=True)
class SplitConfig:
    """Which channels are split off per modality (MOCD, paper section 4.2).

    Attributes:
        ratio: share of the input channels a modality may claim; the planner rounds it to kernel-friendly widths.
            0 turns the split off.
        rule: how the channels are chosen: "mocd" (the paper, eq. 7-12), "modality-max" (largest magnitudes of each
            modality: eq. 7 for vision, the same for text among the rest), or for comparison "random", "text-max",
            "vision-max" and "all-max" (largest magnitudes over text, vision or all tokens fill both groups).
        clusters: k of the one-dimensional clustering of a text channel's percentile ranks (eq. 10).
        bits: weight bits of the outlier groups, 4 or more.
        activation_bits: activation bits of the outlier groups, 4 or more.
    """

    ratio: float = 0.02
    rule: str = "mocd"
    clusters: int = 3
    bits: int = 4
    activation_bits: int = 8

    def __post_init__(self) -> None:
        _require(0 <= self.ratio <= 0.25, "split.ratio", "0 to 0.25", self.ratio)
        _require(self.rule in CHANNEL_RULES, "split.rule", f"one of {CHANNEL_RULES}", self.rule)
        _require(1 <= self.clusters <= 16, "split.clusters", "1 to 16", self.clusters)
        _require(self.bits in (4, 8), "split.bits", "4 or 8", self.bits)
        _require(self.activation_bits in (4, 8), "split.activation_bits", "4 or 8", self.activation_bits)


@dataclass(frozen=True)
class CorrectionConfig:
    """The two low-rank branches on the main group (ACC = CWS + MAC, paper section 4.3).

    Attributes:
        cws_ratio: rank of cross-modal weight smoothing as a share of the full rank; 0 turns the branch off.
        mac_ratio: the same of modality-specific activation compensation.
        bits: bits of the factors U and V, 4 or 8.
        residual_bits: bits of the activation residual that MAC multiplies, 4 or 8.
        mac_rows: "text" (the paper: compensate text tokens) or "all" (no modality mask in the graph).
    """

    cws_ratio: float = 0.02
    mac_ratio: float = 0.03
    bits: int = 4
    residual_bits: int = 8
    mac_rows: str = "text"

    def __post_init__(self) -> None:
        for name in ("cws_ratio", "mac_ratio"):
            _require(0 <= getattr(self, name) <= 0.5, f"correction.{name}", "0 to 0.5", getattr(self, name))
        _require(self.bits in (4, 8), "correction.bits", "4 or 8", self.bits)
        _require(self.residual_bits in (4, 8), "correction.residual_bits", "4 or 8", self.residual_bits)
        _require(self.mac_rows in ("text", "all"), "correction.mac_rows", "text or all", self.mac_rows)


@dataclass(frozen=True)
class ClipConfig:
    """Clip factors before anything is learned.

    Attributes:
        weight: "none", or "search": the factor of every weight scale that minimizes the squared error of the weight,
            its input channels weighted by their mean squared activation.
        activation: "none", or "search": one factor a channel group that minimizes the squared error of the calibration
            rows.
        activation_max: the largest activation clip factor, in (0, 1].
    """

    weight: str = "none"
    activation: str = "none"
    activation_max: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            _require(getattr(self, name) in ("none", "search"), f"clip.{name}", "none or search", getattr(self, name))
        _require(0 < self.activation_max <= 1, "clip.activation_max", "above 0, at most 1", self.activation_max)


@dataclass(frozen=True)
class LearningConfig:
    """Block-wise reconstruction (paper eq. 3, 20-21): what is learned and how long.

    Attributes:
        epochs: passes over the calibration samples for each block; 0 keeps the closed-form start.
        batch: samples a step.
        transform_lr: peak learning rate of P and the channel scale.
        clip_lr: of the weight and activation clips.
        gate_lr: of the CWS and MAC gates.
        balance: weight of the tokens in the loss: "none" (a plain mean over tokens), "mbq" (each modality by its
            mean absolute gradient, as MBQ does) or "answers" (each token by the gradient of the answers' loss).
        propagate: what a block receives while it is learned: "float" (the float model's activations) or "quantized"
            (those of the blocks already quantized).
    """

    epochs: int = 15
    batch: int = 4
    transform_lr: float = 5e-3
    clip_lr: float = 5e-2
    gate_lr: float = 2e-2
    balance: str = "answers"
    propagate: str = "float"

    def __post_init__(self) -> None:
        _require(0 <= self.epochs <= 1000, "learning.epochs", "0 to 1000", self.epochs)
        _require(1 <= self.batch <= 256, "learning.batch", "1 to 256", self.batch)
        for name in ("transform_lr", "clip_lr", "gate_lr"):
            _require(0 <= getattr(self, name) <= 1, f"learning.{name}", "0 to 1", getattr(self, name))
        _require(self.balance in ("none", "mbq", "answers"), "learning.balance", "none, mbq or answers", self.balance)
        _require(self.propagate in ("float", "quantized"), "learning.propagate", "float or quantized", self.propagate)


@dataclass(frozen=True)
class QuantConfig:
    """One scheme for the language model's linears.

    Attributes:
        scheme: the label, for example "W4A8".
        bits: bits of the main weight.
        activation_bits: bits of the main activation.
        group_size: 0 for one weight scale an output channel, else input channels a scale.
        activation_symmetric: False for asymmetric main activations (below 8 bits).
        transform: start of the equivalent transform P: "hadamard" (Kronecker product of two orthogonal matrices) or
            "identity".
        transform_width: channels at most that P mixes with each other, 0 for no limit; a wider group's P has equal
            blocks, see `splitq_edge.quant.transforms.transform_shape`.
        scale: start of the scale per channel: "none", "smoothquant" (alpha 0.5), or the searches "awq" and "mbq".
        rounding: of the weights: "nearest", "gptq" (error feedback over the quantized activations), or "gptaq" (the
            same towards what the float model's layers say, on the activations of the layers already quantized; sites
            beside the blocks take "gptq").
        method: label of the method whose settings these are, see `splitq_edge.methods`.
        clip: clip factors before learning.
        split: channel split.
        correction: low-rank branches.
        learning: block-wise reconstruction.
        vision: scheme of the vision encoder's blocks, "none" for float32, see `splitq_edge.calibration.extra_sites`.
        lm_head: scheme of the output projection, likewise.
        embedding: "none" for float32, or bits of the token embedding, "W8" or "W4"; with "W8" a tied output projection
            of 8 or 6 bits serves as embedding, see `splitq_edge.modules.quantized_embedding`.
        kv_cache_bits: bits of the key-value cache, 0 for float32, 16 for float16, else integers, see
            `splitq_edge.quant.kv_cache`.
    """

    scheme: str
    bits: int
    activation_bits: int
    group_size: int = 0
    activation_symmetric: bool = True
    transform: str = "hadamard"
    transform_width: int = 1536
    scale: str = "smoothquant"
    rounding: str = "nearest"
    method: str = "splitq"
    clip: ClipConfig = field(default_factory=ClipConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    vision: str = "none"
    lm_head: str = "none"
    embedding: str = "none"
    kv_cache_bits: int = 0

    def __post_init__(self) -> None:
        _require(self.bits in BIT_WIDTHS, "bits", f"one of {BIT_WIDTHS}", self.bits)
        _require(
            self.activation_bits in BIT_WIDTHS,
            "activation_bits",
            f"one of {BIT_WIDTHS}",
            self.activation_bits,
        )
        _require(self.group_size in BLOCK_SIZES, "group_size", f"one of {BLOCK_SIZES}", self.group_size)
        _require(self.transform in TRANSFORMS, "transform", f"one of {TRANSFORMS}", self.transform)
        _require(
            self.transform_width == 0 or self.transform_width >= MIN_TRANSFORM_WIDTH,
            "transform_width",
            f"0 or at least {MIN_TRANSFORM_WIDTH}",
            self.transform_width,
        )
        _require(self.scale in SCALES, "scale", f"one of {SCALES}", self.scale)
        _require(self.rounding in ROUNDINGS, "rounding", f"one of {ROUNDINGS}", self.rounding)
        _require(
            self.activation_symmetric or self.activation_bits < 8,
            "activation_symmetric",
            "true at 8 activation bits",
            self.activation_symmetric,
        )
        _require(self.vision in VISION_SCHEMES, "vision", f"one of {VISION_SCHEMES}", self.vision)
        _require(self.lm_head in LM_HEAD_SCHEMES, "lm_head", f"one of {LM_HEAD_SCHEMES}", self.lm_head)
        _require(self.embedding in EMBEDDINGS, "embedding", f"one of {EMBEDDINGS}", self.embedding)
        _require(self.kv_cache_bits in KV_CACHE_BITS, "kv_cache_bits", f"one of {KV_CACHE_BITS}", self.kv_cache_bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, the form of the YAML recipe and of export.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`; a missing key takes its default.

        Raises:
            SplitQError: an unknown key (the message lists the known ones) or a value out of range.
        """
        values = dict(values)
        for key, kind in SECTIONS.items():
            if key in values:
                _require(isinstance(values[key], dict), key, "a mapping of settings", values[key])
                values[key] = kind(**_checked_keys(kind, values[key], f"{key}."))
        return cls(**_checked_keys(cls, values, ""))


SECTIONS: dict[str, type] = {
    "clip": ClipConfig,
    "split": SplitConfig,
    "correction": CorrectionConfig,
    "learning": LearningConfig,
}


def _checked_keys(kind: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    known = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise SplitQError(f"recipe: unknown key '{prefix}{key}'; known keys: {', '.join(known)}")
    missing = dataclasses.MISSING
    required = [
        item.name for item in dataclasses.fields(kind) if item.default is missing and item.default_factory is missing
    ]
    for key in required:
        if key not in values:
            raise SplitQError(f"recipe: missing key '{prefix}{key}'; add it")
    for item in dataclasses.fields(kind):
        if item.name in values and item.type in PLAIN_TYPES:
            accepted, expected = PLAIN_TYPES[item.type]
            if item.type == "float" and _is_float_without_dot(values[item.name]):
                expected = "a number with a dot (YAML reads 5e-3 as a text, 5.0e-3 as a number)"
            _require(type(values[item.name]) in accepted, f"{prefix}{item.name}", expected, values[item.name])
    return values


def _is_float_without_dot(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) is not None


# What every preset shares; docs/method.md has the measurements behind the choice.
_COMMON: dict[str, Any] = {"rounding": "gptaq", "clip": ClipConfig(weight="search", activation="search")}
# The outlier groups' activations are one width wider than the main ones: 8 bits over 4, and 4 over 3 and 2. Below 8-bit
# activations MAC's residual has 4 bits.
_FOUR_BIT_SPLIT = SplitConfig(activation_bits=4)
_LOW_CORRECTION = CorrectionConfig(residual_bits=4, mac_rows="all")
PRESETS: dict[str, QuantConfig] = {
    "W4A8": QuantConfig("W4A8", bits=4, activation_bits=8, **_COMMON),
    "W4A4": QuantConfig("W4A4", bits=4, activation_bits=4, correction=_LOW_CORRECTION, **_COMMON),
    "W3A3": QuantConfig(
        "W3A3", bits=3, activation_bits=3, split=_FOUR_BIT_SPLIT, correction=_LOW_CORRECTION, **_COMMON
    ),
    "W3A2": QuantConfig(
        "W3A2",
        bits=3,
        activation_bits=2,
        split=_FOUR_BIT_SPLIT,
        correction=replace(_LOW_CORRECTION, cws_ratio=0.03, mac_ratio=0.05),
        **_COMMON,
    ),
}


def preset(scheme: str) -> QuantConfig:
    """The default recipe of a scheme.

    Raises:
        SplitQError: unknown scheme; the message lists the known ones.
    """
    if scheme not in PRESETS:
        raise SplitQError(f"scheme '{scheme}': expected one of {', '.join(PRESETS)}, none; choose one of them")
    return PRESETS[scheme]


def load_recipe(path: Path) -> QuantConfig:
    """Read a YAML recipe.

    Raises:
        SplitQError: unreadable file, not a mapping, unknown key, or a value out of range.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SplitQError(f"recipe {path}: expected a readable YAML file ({reason}); check the path") from error
    if not isinstance(values, dict):
        raise SplitQError(f"recipe {path}: expected a mapping of settings, got {type(values).__name__}")
    config = QuantConfig.from_dict(values)
    bits = f"W{config.bits}A{config.activation_bits}"
    if re.fullmatch(r"W\d+A\d+", config.scheme) and config.scheme != bits:
        raise SplitQError(
            f"recipe {path}: scheme: expected {bits}, which bits and activation_bits say, got {config.scheme}; mend one"
        )
    return config
