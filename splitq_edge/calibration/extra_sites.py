"""Sites outside the language blocks: the vision encoder's blocks and the output projection.

They are quantized in closed form, whatever the method: one channel group, no correction, Hadamard transform,
SmoothQuant's scale, searched clips, one weight scale an output channel; weights are rounded as the recipe says.
Statistics come from hooks while the float model runs, so the language blocks are calibrated on the float encoder's
features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from splitq_edge.adapters.adapter import Site
from splitq_edge.calibration.block_inputs import BlockInputs, PaddedBatch
from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.calibration.state import BlockRecord
from splitq_edge.config import ClipConfig, CorrectionConfig, LearningConfig, QuantConfig, SplitConfig
from splitq_edge.errors import SplitQError
from splitq_edge.learning.site import TrainableSite
from splitq_edge.loading import LoadedModel
from splitq_edge.methods.scales import ScaleInputs
from splitq_edge.modality import VISION
from splitq_edge.modules.split_linear import SplitLinear, side_by_side, site_parts
from splitq_edge.parallel import Processes
from splitq_edge.quant.kv_cache import head_dimension
from splitq_edge.quant.transforms import has_balanced_factors
from splitq_edge.report.site_quality import PlainQuality
from splitq_edge.splitting.plan import SplitPlan

logger = logging.getLogger(__name__)

EXTRAS = ("vision", "lm_head")  # fields of the recipe, and names of the records in the calibration state
VISION_ROWS = 1024  # rows kept a vision site; 23 CLIP-L blocks keep 0.7 GB
HEAD_ROWS = 4096
SLICE = 1 << 25  # weights that are worked on at a time, some six copies of them in float32


def wanted_extras(config: QuantConfig) -> tuple[str, ...]:
    """The entries of `EXTRAS` that the recipe quantizes."""
    return tuple(name for name in EXTRAS if getattr(config, name) != "none")


def check_extras(loaded: LoadedModel, config: QuantConfig) -> None:
    """Check that the model has what the recipe quantizes beside the language blocks.

    Raises:
        SplitQError: no vision encoder, or heads of an odd width with a 4-bit cache.
    """
    if config.vision != "none" and not loaded.adapter.vision_blocks:
        raise SplitQError(
            f"recipe: vision: expected none for a model without vision encoder ('{loaded.adapter.model_type}'), "
            f"got {config.vision!r}; change it in the recipe"
        )
    head_dim = head_dimension(loaded.text_config)
    if config.kv_cache_bits == 4 and head_dim % 2:
        raise SplitQError(
            f"recipe: kv_cache_bits: expected 0 or 8 for heads of {head_dim} channels (4 bits need an even number), "
            "got 4; change it in the recipe"
        )


def extra_config(config: QuantConfig, extra: str, width: int) -> QuantConfig:
    """The recipe of one extra site.

    Args:
        config: the language model's.
        extra: an entry of `EXTRAS` that is not "none".
        width: input channels; a width without two near-equal factors is left untransformed.
    """
    scheme = getattr(config, extra)
    return replace(
        config,
        scheme=scheme,
        bits=int(scheme[1]),
        activation_bits=int(scheme[3]),
        group_size=0,
        activation_symmetric=True,
        transform="hadamard" if has_balanced_factors(width) else "identity",
        scale="smoothquant",
        clip=ClipConfig(weight="search", activation="search"),
        split=SplitConfig(ratio=0),
        correction=CorrectionConfig(cws_ratio=0, mac_ratio=0),
        learning=LearningConfig(epochs=0),
    )


def extra_sites(loaded: LoadedModel, extra: str) -> tuple[Site, ...]:
    """Sites of an entry of `EXTRAS`; paths start at the model."""
    adapter = loaded.adapter
    if extra == "lm_head":
        return (Site("lm_head", (adapter.lm_head,)),)
    return tuple(
        Site(f"vision.{block}.{site.name}", tuple(f"{adapter.vision_blocks}.{block}.{path}" for path in site.linears))
        for block in range(used_vision_blocks(loaded))
        for site in adapter.vision_block
    )


def used_vision_blocks(loaded: LoadedModel) -> int:
    """Vision blocks that the language model depends on: LLaVA takes the features of an earlier layer than the last."""
    count = len(loaded.model.get_submodule(loaded.adapter.vision_blocks))
    layers = getattr(loaded.model.config, "vision_feature_layer", None)
    if layers is None:
        return count
    # Hidden state 0 is the embedding, hidden state i the output of block i - 1.
    return max(layer % (count + 1) for layer in ([layers] if isinstance(layers, int) else layers))


def place_extra(loaded: LoadedModel, extra: str, sites: dict[str, SplitLinear]) -> None:
    """Put quantized sites in place of the model's linears; the embedding that a tied lm_head shares stays as it is."""
    for site in extra_sites(loaded, extra):
        widths = {path: linear.out_features for path, linear in _linears(loaded.model, site).items()}
        for path, part in site_parts(sites[site.name], widths).items():
            loaded.model.set_submodule(path, part)


def _linears(model: nn.Module, site: Site) -> dict[str, nn.Linear]:
    linears = {}
    for path in site.linears:
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise SplitQError(f"{site.name}: expected {path} to be a linear layer, got {type(linear).__name__}")
        linears[path] = linear
    return linears


@dataclass
class VisionObserver:
    """Statistics of the vision sites while calibration samples run; see `observing_vision`."""

    observers: dict[str, Observer]
    running: PaddedBatch | None = None

    def begin(self, batch: PaddedBatch) -> None:
        """Say which batch runs next."""
        self.running = batch

    def add(self, name: str, x: torch.Tensor) -> None:
        """Add what entered a site: rows of the images one after the other, [..., K]."""
        assert self.running is not None
        rows = x.reshape(-1, x.shape[-1])
        pixels = self.running.pixel_rows
        each = rows.shape[0] // sum(pixels)  # tokens of the encoder a row of pixel_values
        for sample, part in zip(self.running.samples, rows.split([each * count for count in pixels]), strict=True):
            everything = torch.ones(1, part.shape[0], dtype=torch.bool, device=x.device)
            self.observers[name].update(part[None], everything.to(torch.int8) * VISION, everything, sample[None])

    def stats(self, processes: Processes) -> dict[str, SiteStats]:
        """What was seen in all processes, by site name.

        Raises:
            SplitQError: no sample had an image.
        """
        found = {name: observer.stats(processes) for name, observer in self.observers.items()}
        for name, stats in found.items():
            if stats.vision_tokens == 0:
                raise SplitQError(f"{name}: expected calibration samples with images, got none; add some")
        return found


@contextmanager
def observing_vision(loaded: LoadedModel, samples: int) -> Iterator[VisionObserver]:
    """Within the block, forwards of the model fill the observer.

    Args:
        loaded: the float model.
        samples: how many samples will come in all processes.
    """
    observer = VisionObserver({})

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: observer.add(name, args[0])

    with ExitStack() as handles:
        for site in extra_sites(loaded, "vision"):
            first = next(iter(_linears(loaded.model, site).values()))
            observer.observers[site.name] = _started(Observer(site.name, samples, VISION_ROWS), first, loaded.device)
            handles.callback(first.register_forward_pre_hook(hook(site.name)).remove)
        yield observer


@torch.no_grad()
def head_stats(loaded: LoadedModel, inputs: BlockInputs, samples: int, processes: Processes) -> SiteStats:
    """What enters the output projection over the text tokens.

    Args:
        loaded: with the weights of what follows the blocks (`outside_blocks`).
        inputs: the stream "float" holds the last block's float outputs.
        samples: samples of all processes.
        processes: who shares them.
    """
    norm = loaded.model.get_submodule(loaded.final_norm_path)
    (site,) = extra_sites(loaded, "lm_head")
    (linear,) = _linears(loaded.model, site).values()
    observer = _started(Observer(site.name, samples, HEAD_ROWS), linear, loaded.device)
    for number in inputs.own:
        batch = inputs.batch(number)
        text = batch.keep & (batch.modality != VISION)
        observer.update(norm(inputs.get("float", number)), batch.modality, text, batch.samples)
    return observer.stats(processes)


def _started(observer: Observer, linear: nn.Linear, device: torch.device) -> Observer:
    """The observer, its widths known even where no sample of this process reaches it."""
    empty = torch.zeros(1, 0, dtype=torch.bool, device=device)
    nothing = torch.zeros(1, 0, linear.in_features, device=device)
    observer.update(nothing, empty.to(torch.int8), empty, torch.zeros(1, dtype=torch.long))
    return observer


@torch.no_grad()
def quantize_extra(loaded: LoadedModel, config: QuantConfig, extra: str, stats: dict[str, SiteStats]) -> BlockRecord:
    """Quantize the sites of an entry of `EXTRAS`; the model is left as it was.

    Args:
        loaded: with the weights of these sites (`outside_blocks`).
        config: the recipe.
        extra: which.
        stats: by site name, the same in all processes.

    Raises:
        SplitQError: a weight is not finite.
    """
    sites: dict[str, SplitLinear] = {}
    report: dict[str, Any] = {}
    _log_untransformed(extra, [known.channels for known in stats.values()])
    for site in extra_sites(loaded, extra):
        linears = _linears(loaded.model, site)
        for path, linear in linears.items():
            if not torch.isfinite(linear.weight).all():
                raise SplitQError(
                    f"{site.name}: expected finite weights in {path}, got NaN or infinity; check the checkpoint"
                )
        known = stats[site.name]
        sites[site.name], report[site.name] = _quantized(
            site.name, list(linears.values()), known, extra_config(config, extra, known.channels), loaded
        )
    return BlockRecord(sites, {"sites": report})


def _quantized(
    name: str, linears: list[nn.Linear], stats: SiteStats, config: QuantConfig, loaded: LoadedModel
) -> tuple[SplitLinear, dict[str, Any]]:
    """A site's integers and its report.

    Output channels are made in slices: they share the scale, the transform, the activations' clip and GPTQ's matrix,
    and an output projection has so many that copies of all of them would be most of an export's memory.
    """
    extremes = torch.stack([torch.stack(linear.weight.detach().aminmax(dim=0)) for linear in linears]).float()
    inputs = ScaleInputs(extremes.flatten(0, 1).T, stats.absmax, stats.text_rows, stats.vision_rows)
    every = torch.arange(stats.channels)
    plan = SplitPlan(every, every[:0], every[:0])
    quality = PlainQuality(stats)
    hessian: torch.Tensor | None = None
    frozen: list[SplitLinear] = []
    for part in _slices(linears, max(1, SLICE // stats.channels)):
        trained = TrainableSite(name, part, plan, config, loaded.context, inputs)
        if config.rounding != "nearest" and hessian is None:
            hessian = _hessian(trained, stats)
        frozen.append(trained.freeze(hessian))
        quality.add(trained, frozen[-1])
    return side_by_side(frozen), quality.report()


def _slices(linears: list[nn.Linear], outputs: int) -> Iterator[list[nn.Linear]]:
    """The linears themselves if they have no more than so many outputs together, else parts of each."""
    if sum(linear.out_features for linear in linears) <= outputs:
        yield linears
        return
    for linear in linears:
        for start in range(0, linear.out_features, outputs):
            place = slice(start, start + outputs)
            part = nn.Linear(1, 1, bias=False, device="meta")
            part.weight = nn.Parameter(linear.weight.detach()[place], requires_grad=False)
            part.out_features, part.in_features = part.weight.shape
            if linear.bias is not None:
                part.bias = nn.Parameter(linear.bias.detach()[place], requires_grad=False)
            yield [part]


def _hessian(site: TrainableSite, stats: SiteStats) -> torch.Tensor | None:
    """A^T A of the kept rows for GPTQ, [K, K], drawn towards a multiple of the identity by K / (2 rows) of its mean.

    With few rows GPTQ would fit these rows alone. 512 synthetic rows of 512 channels, error on other rows over that of
    rounding to nearest: 1.89 at the usual damping and 1.04 with this one where the spectrum falls as i^-0.5, 0.73 and
    0.50 where it falls as i^-1.
    """
    rows = torch.cat([stats.text_rows, stats.vision_rows])
    with site.context.using(None), site.observing(rows.new_ones(rows.shape[0], 1)):
        site(rows)
    hessian = site.take_hessian()
    if hessian is not None and rows.shape[0]:
        hessian.diagonal().add_(hessian.diagonal().mean() * (stats.channels / (2 * rows.shape[0])))
    return hessian


def _log_untransformed(extra: str, widths: Iterable[int]) -> None:
    odd = sorted({width for width in widths if not has_balanced_factors(width)})
    if odd:
        logger.warning(
            "%s: sites of %s input channels stay untransformed: no two near-equal factors",
            extra,
            ", ".join(map(str, odd)),
        )
