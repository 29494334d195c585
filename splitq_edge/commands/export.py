"""`splitq-edge export`: calibrate, quantize, write the graphs, check them against torch, publish the folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from splitq_edge.artifacts import check_target, staged_folder
from splitq_edge.calibration.data import describe_source, encode_sample, load_samples
from splitq_edge.calibration.runner import collect_stats
from splitq_edge.config import QuantConfig, load_recipe, preset
from splitq_edge.convert import QuantizedModel, effective_bits, quantize_model
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.export_folder import ExportRequest, write_export
from splitq_edge.learning.prefix import first_block_batches, padded_batches
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.runtime_ops.session import ExportedModel
from splitq_edge.runtime_ops.verify import ParityRow, verify_parity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command, as typed."""

    model: str
    out: Path
    scheme: str
    recipe: Path | None
    calib: str
    calib_samples: int
    flavour: str
    seed: int
    force: bool
    revision: str | None


def run_export(options: ExportOptions, console: Console) -> None:
    """Do the whole export.

    Raises:
        SplitQError: anything the user can mend; nothing is left behind then.
    """
    check_target(options.out, force=options.force)
    config = _config(options)
    samples = load_samples(options.calib, options.calib_samples, seed=options.seed)
    if config is not None and len(samples) < options.calib_samples:
        logger.warning("calibration uses the %d samples there are, not %d", len(samples), options.calib_samples)
    loaded = load_model(options.model, revision=options.revision)
    _check_not_inside(options.out, options.model)
    with _progress(console) as progress:
        task = progress.add_task("encode samples", total=len(samples))
        batches = [encode_sample(loaded.processor, sample) for sample in progress.track(samples, task_id=task)]
        sample = next((batch for batch in batches if "pixel_values" in batch), None)
        if sample is None:
            raise SplitQError("calibration: expected at least one sample with an image, got none; add one")
        quantized = None if config is None else _quantize(loaded, config, batches, progress, seed=options.seed)
    request = ExportRequest(
        flavour=options.flavour,
        sample=sample,
        calibration=None if config is None else describe_source(options.calib, samples),
        seed=options.seed,
    )
    with staged_folder(options.out, force=options.force) as staging:
        console.print("writing graphs")
        write_export(loaded, quantized, request, staging)
        exported = ExportedModel(staging)
        rows = verify_parity(exported)
        console.print(parity_table(rows, native=exported.native))
        if not all(row.ok for row in rows):
            raise SplitQError(
                "export: a graph differs from torch by more than its limit (table above); please report it"
            )
    if quantized is not None:
        console.print(
            f"{options.out}: {quantized.config.scheme}, {effective_bits(quantized.sites):.2f} effective bits a weight"
        )
    else:
        console.print(f"{options.out}: float32")


def _config(options: ExportOptions) -> QuantConfig | None:
    if options.recipe is not None:
        return load_recipe(options.recipe)
    return None if options.scheme == "none" else preset(options.scheme)


def _check_not_inside(out: Path, model: str) -> None:
    source = Path(model)
    if source.is_dir() and (out.resolve() == source.resolve() or source.resolve() in out.resolve().parents):
        raise SplitQError(f"output {out}: expected a folder outside the model's, it lies in {model}; choose another")


def _quantize(
    loaded: LoadedModel, config: QuantConfig, batches: list[dict[str, torch.Tensor]], progress: Progress, *, seed: int
) -> QuantizedModel:
    task = progress.add_task("calibrate", total=len(batches))
    stats = collect_stats(loaded, batches, progress=lambda: progress.advance(task))
    learning = config.learning
    task = progress.add_task("quantize", total=len(loaded.language_blocks()) * max(learning.epochs, 1))
    block_batches = []
    if learning.epochs:
        pad = loaded.processor.tokenizer.pad_token_id
        padded = padded_batches(batches, learning.batch, 0 if pad is None else pad)
        block_batches = first_block_batches(loaded, padded)
    return quantize_model(loaded, config, stats, block_batches, seed=seed, progress=lambda: progress.advance(task))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def parity_table(rows: list[ParityRow], *, native: bool) -> Table:
    """The comparison of ONNX Runtime with torch."""
    engine = "native kernels" if native else "function bodies"
    table = Table(title=f"ONNX Runtime ({engine}) against torch", box=box.SIMPLE, title_justify="left")
    for name in ("part", "output", "max error", "SQNR dB", "asked", "same top-1", ""):
        table.add_column(name, justify="left" if name in ("part", "output", "") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.part,
            row.output,
            f"{row.max_error:.2e}",
            f"{row.sqnr_db:.1f}",
            f">= {row.limit_db:.0f}",
            f"{100 * row.same_top:.1f} %",
            "ok" if row.ok else "DIFFERS",
        )
    return table
