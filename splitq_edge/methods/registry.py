"""Quantization methods by name: settings of one pipeline, no pipeline of their own.

Every method shares loader, calibration samples, quantizers, export and evaluation; a peer is a site with empty outlier
groups and no correction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from splitq_edge.config import ClipConfig, CorrectionConfig, LearningConfig, QuantConfig, SplitConfig
from splitq_edge.errors import SplitQError

_NO_SPLIT = SplitConfig(ratio=0)
_NO_CORRECTION = CorrectionConfig(cws_ratio=0, mac_ratio=0)
_NOTHING_LEARNED = LearningConfig(epochs=0)
_SEARCHED_WEIGHTS = ClipConfig(weight="search")


@dataclass(frozen=True)
class Method:
    """A named strategy.

    Attributes:
        name: as typed after `--method`.
        summary: one line for the help text and the docs.
        configure: the recipe of a scheme's preset (which is SplitQ's) turned into this method's.
    """

    name: str
    summary: str
    configure: Callable[[QuantConfig], QuantConfig]


def _plain(config: QuantConfig, **settings: object) -> QuantConfig:
    """Round-to-nearest with some settings changed."""
    base = replace(
        config,
        transform="identity",
        scale="none",
        rounding="nearest",
        clip=ClipConfig(),
        split=_NO_SPLIT,
        correction=_NO_CORRECTION,
        learning=_NOTHING_LEARNED,
    )
    return replace(base, **settings)  # type: ignore[arg-type]


_ALL = (
    Method("rtn", "round to nearest: per output channel, per token", _plain),
    Method("smoothquant", "channel scale sqrt(|x| / |w|), then nearest", lambda c: _plain(c, scale="smoothquant")),
    Method(
        "awq",
        "channel scale |x|^alpha searched on the weight error, searched weight clips",
        lambda c: _plain(c, scale="awq", clip=_SEARCHED_WEIGHTS),
    ),
    Method("gptq", "error feedback of the rounded weights", lambda c: _plain(c, rounding="gptq")),
    Method(
        "mbq",
        "channel scale searched on the output error, each modality weighted by its gradient",
        lambda c: _plain(c, scale="mbq"),
    ),
    Method(
        "quarot",
        "fixed Hadamard rotation, error feedback, activations clipped at 0.9",
        lambda c: _plain(
            c,
            transform="hadamard",
            transform_width=0,
            rounding="gptq",
            clip=ClipConfig(weight="search", activation_max=0.9),
        ),
    ),
    Method(
        "flatquant",
        "learned Kronecker transform, scale and clips: SplitQ without split and correction",
        lambda c: replace(c, split=_NO_SPLIT, correction=_NO_CORRECTION, transform_width=0),
    ),
    Method("splitq", "modality-specific outlier groups, learned transform, CWS and MAC", lambda c: c),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def method_config(name: str, config: QuantConfig) -> QuantConfig:
    """The recipe of a method at a scheme.

    Args:
        name: a key of `METHODS`.
        config: the scheme's preset.

    Raises:
        SplitQError: unknown method; the message lists the known ones.
    """
    if name not in METHODS:
        raise SplitQError(f"method '{name}': expected one of {', '.join(METHODS)}; choose one of them")
    return replace(METHODS[name].configure(config), method=name)
