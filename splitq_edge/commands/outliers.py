"""`splitq-edge outliers`: the largest channels of text and image tokens of a model, before anything is quantized."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from splitq_edge.artifacts import check_writable, write_json
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import first_block_inputs, padded_batches
from splitq_edge.calibration.data import encode_sample, load_samples
from splitq_edge.calibration.runner import STATS_BATCH, observe_block
from splitq_edge.commands.export import progress_bars
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.parallel import Processes
from splitq_edge.report.modality_outliers import SiteOutliers, as_json, describe, medians, plot


@dataclass(frozen=True)
class OutlierOptions:
    """What to look at.

    Attributes:
        model: folder or hub id.
        calib: calibration data, as `load_samples` reads it.
        calib_samples: samples.
        share: of the channels that count as top.
        seed: of the samples.
        json: file for the numbers of every site, None for none.
        plot: image file, None for none.
        adapter: folder of a LoRA adapter to merge, None for none.
        trust_remote_code: let transformers run code that comes with the model.
    """

    model: str
    calib: str
    calib_samples: int
    share: float
    seed: int
    json: Path | None
    plot: Path | None
    adapter: Path | None = None
    trust_remote_code: bool = False


def run_outliers(options: OutlierOptions, console: Console) -> list[SiteOutliers]:
    """Observe every site of the language blocks and print medians over the blocks.

    Raises:
        SplitQError: a place cannot be written, matplotlib is missing, a model or data that cannot be used, or one
            modality alone.
    """
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot is not None:
        _check_plot(options.plot)
    samples = load_samples(options.calib, options.calib_samples, seed=options.seed)
    adapter = None if options.adapter is None else str(options.adapter)
    loaded = load_model(options.model, lazy=True, adapter=adapter, trust_remote_code=options.trust_remote_code)
    encoded = [encode_sample(loaded.processor, sample, loaded.image_layout) for sample in samples]
    found = _observe(loaded, encoded, options.share, console)
    console.print(_table(options, found))
    if options.json is not None:
        write_json(options.json, as_json(found, options.share))
    if options.plot is not None:
        title = f"{(options.adapter or Path(options.model)).resolve().name}: {len(samples)} samples of {options.calib}"
        plot(found, options.share, title, options.plot)
    return found


def _check_plot(path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise SplitQError(
            "--plot: expected package matplotlib, got none installed; pip install splitq-edge[tasks]"
        ) from error
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".") not in known:
        raise SplitQError(f"--plot {path}: expected a name that ends in .{', .'.join(known)}, got '{path.suffix}'")


def _observe(loaded: LoadedModel, encoded: list, share: float, console: Console) -> list[SiteOutliers]:
    alone = Processes(alone=True)
    pad = loaded.tokenizer.pad_token_id
    found: list[SiteOutliers] = []
    with tempfile.TemporaryDirectory() as folder, progress_bars(console) as progress:
        task = progress.add_task("blocks", total=loaded.block_count)
        batches = padded_batches(encoded, STATS_BATCH, 0 if pad is None else pad, alone)
        with loaded.outside_blocks():
            inputs = first_block_inputs(loaded, batches, ActivationStore(Path(folder)))
        for index in range(loaded.block_count):
            inputs.begin(index)
            observed = observe_block(loaded, index, loaded.block(index), inputs, len(encoded), alone)
            for site in loaded.adapter.language_block:
                stats = observed[loaded.adapter.site_name(index, site)]
                if not (stats.text_tokens and stats.vision_tokens):
                    raise SplitQError(
                        f"outliers: expected text and image tokens, got {stats.text_tokens} and "
                        f"{stats.vision_tokens}; give samples with both"
                    )
                found.append(describe(index, site.name, stats, share))
            inputs.rename("target", "float")
            progress.advance(task)
        inputs.store.clear()
    return found


def _table(options: OutlierOptions, found: list[SiteOutliers]) -> Table:
    top = f"top {100 * options.share:g} %"
    table = Table(title="Largest channels, medians over the blocks", box=box.SIMPLE, title_justify="left")
    for name in (
        "site",
        "text: max / median",
        "image: max / median",
        f"overlap of the {top}",
        "text caught by image's",
    ):
        table.add_column(name, justify="left" if name == "site" else "right")
    for site, values in medians(found).items():
        cells = (f"{values[name]:.2f}" for name in ("text_peak", "vision_peak", "overlap", "borrowed"))
        table.add_row(site, *cells)
    return table
