"""`splitq-edge export`: calibrate, quantize, write the graphs, check them against torch, publish the folder."""

from __future__ import annotations

import gc
import hashlib
import logging
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.artifacts import add_file, check_target, sha256_of, staged_folder
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.data import CalibrationSample, describe_source, encode_sample, load_samples
from splitq_edge.calibration.runner import Calibration
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.commands.export_static import StaticOptions, static_layout, write_static
from splitq_edge.config import KV_CACHES, QuantConfig, load_recipe, preset
from splitq_edge.convert import assemble, effective_bits
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.export_folder import ExportRequest, check_exportable, write_export
from splitq_edge.exporters.layouts.layout import Layout
from splitq_edge.exporters.layouts.registry import default_layout, layout_named
from splitq_edge.loading import LoadedModel, check_name, load_model
from splitq_edge.methods.registry import method_config
from splitq_edge.parallel import Processes
from splitq_edge.quant.kv_cache import HALF_BITS
from splitq_edge.report.model_card import CARD_FILE, model_card
from splitq_edge.runtime_ops.open_model import open_model
from splitq_edge.runtime_ops.verify import ParityRow, disagreements, verify_parity

logger = logging.getLogger(__name__)

EMBEDDINGS = {"W4A8": "W4"}  # by the output projection that can lend it its codes; beside others W8


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command, as typed."""

    model: str
    out: Path
    scheme: str = "W4A8"
    method: str = "splitq"
    recipe: Path | None = None
    calib: str = "easyvqa"
    calib_samples: int = 128
    flavour: str = "portable"
    attention: str | None = None
    layout: str | None = None
    lm_head: str | None = None
    embedding: str | None = None
    kv_cache: str | None = None
    seed: int = 0
    force: bool = False
    revision: str | None = None
    state: Path | None = None
    resume: bool = False
    keep_state: bool = False
    stop_after: int | None = None
    memory_limit: int | None = None
    adapter: Path | None = None
    trust_remote_code: bool = False
    static: dict[str, Any] = field(default_factory=dict)  # of `StaticOptions`, for the flavour qdq

    def load(self, *, lazy: bool | None, device: str = "cpu") -> LoadedModel:
        """The model that the options name, see `load_model`."""
        return load_model(
            self.model,
            revision=self.revision,
            lazy=lazy,
            device=device,
            adapter=None if self.adapter is None else str(self.adapter),
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def state_folder(self) -> Path:
        """Where finished blocks go: --state, or a folder beside OUT."""
        return self.state or self.out.with_name(f"{self.out.name}.calibration")


def run_export(options: ExportOptions, console: Console, config: QuantConfig | None = None) -> dict[str, Any]:
    """Do the whole export.

    Args:
        options: as typed.
        console: progress and tables go there.
        config: a recipe instead of the one that the options name.

    Returns:
        `calibration_s`: seconds that calibration took, without loading the model and writing the graphs, in all runs
        that it was resumed in; `calibrated_on`: kind of device, several with a plus between; `effective_bits`.

    Raises:
        SplitQError: anything the user can mend; the blocks finished so far stay in the state folder.
    """
    check_places(options)
    processes = Processes()
    if not processes.main:
        console = Console(quiet=True)
    chosen = config is None
    config = config or chosen_config(options)
    samples = _samples(options, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blockwise = options.memory_limit is not None or options.stop_after is not None
    # None: from safetensors files weights are read block by block, a float model is written whole
    lazy = True if blockwise else (None if config is not None else False)
    loaded = options.load(lazy=lazy, device=device)
    layout = checked_layout(options, loaded, config)
    if config is None:
        check_finite(loaded)
    elif chosen:
        config = with_default_cache(options, config, loaded.adapter, layout)
    with progress_bars(console) as progress:
        encoded = _encoded(loaded, samples, progress)
        sample = next((inputs for inputs in encoded if "pixel_values" in inputs), None)
        if sample is None:
            raise SplitQError("calibration: expected at least one sample with an image, got none; add one")
        state, result = None, {"calibration_s": 0.0, "calibrated_on": "cpu"}
        if config is not None:
            state = CalibrationState(options.state_folder, _header(options, config, samples, loaded))
            times = calibrate(loaded, config, state, encoded, options, processes, progress)
            result = {"calibration_s": sum(times.values()), "calibrated_on": "+".join(sorted(times))}
    processes.wait()
    if not processes.main:
        return result
    if state is not None and state.finished() < loaded.block_count:
        console.print(
            f"{state.folder}: {state.finished()} of {loaded.block_count} blocks finished; go on with --resume"
        )
        return result
    if device != "cpu" or loaded.weights is not None:
        loaded = _loaded_again(options, config)
    quantized = None if config is None or state is None else assemble(loaded, config, state)
    loaded.read_rest()  # what no site replaced
    bits = 32.0 if quantized is None else effective_bits(quantized.sites)
    label = "float32" if quantized is None else f"{quantized.config.scheme}, {bits:.2f} effective bits a weight"
    request = ExportRequest(
        flavour=options.flavour,
        sample={name: value for name, value in sample.items() if name != "answer"},
        calibration=None if quantized is None else describe_source(options.calib, samples),
        seed=options.seed,
        attention=options.attention or layout.attention,
        layout=layout.name,
    )
    with staged_folder(options.out, force=options.force) as staging:
        console.print("writing graphs")
        if options.flavour == "qdq":
            write_static(loaded, quantized, request, encoded, StaticOptions(**options.static), staging)
        else:
            write_export(loaded, quantized, request, staging)
        loaded.give_up()  # ONNX Runtime needs the memory
        del loaded, quantized
        _verify(staging, console)
    if state is not None and not options.keep_state:
        state.remove()
    console.print(f"{options.out}: {label}")
    return {**result, "effective_bits": bits}


def _samples(options: ExportOptions, config: QuantConfig | None) -> list[CalibrationSample]:
    samples = load_samples(options.calib, options.calib_samples, seed=options.seed)
    if config is not None and len(samples) < options.calib_samples:
        logger.warning("calibration uses the %d samples there are, not %d", len(samples), options.calib_samples)
    return samples


def _encoded(
    loaded: LoadedModel, samples: list[CalibrationSample], progress: Progress
) -> list[dict[str, torch.Tensor]]:
    task = progress.add_task("encode samples", total=len(samples))
    tracked = progress.track(samples, task_id=task)
    return [encode_sample(loaded.processor, sample, loaded.image_layout) for sample in tracked]


def checked_layout(options: ExportOptions, loaded: LoadedModel, config: QuantConfig | None) -> Layout:
    """Of the folder, as asked for or as suits the model; its readers can run the export, if one is to be written.

    Raises:
        SplitQError: it does not fit the flavour qdq, the model or the recipe; or the model cannot be exported.
    """
    if options.flavour == "qdq":
        layout = static_layout(loaded, config, options.layout)
    else:
        layout = layout_named(options.layout or default_layout(loaded.adapter, config))
    if options.stop_after is None:
        check_exportable(loaded)
        layout.check(loaded.adapter, config, flavour=options.flavour, attention=options.attention or layout.attention)
    return layout


def _loaded_again(options: ExportOptions, config: QuantConfig | None) -> LoadedModel:
    """The model for writing its graphs, on the CPU."""
    loaded = options.load(lazy=None if config is not None else False)
    if config is None:
        check_finite(loaded)
    return loaded


def check_finite(loaded: LoadedModel) -> None:
    """See that weights are numbers; those of a lazily loaded model are left alone.

    Raises:
        SplitQError: one holds NaN or infinity.
    """
    for name, weight in loaded.model.named_parameters():
        if weight.is_meta:
            continue
        wrong = weight.numel() - int(torch.isfinite(weight).sum())
        if wrong:
            raise SplitQError(
                f"model {loaded.source}: expected finite numbers as {name}, got NaN or infinity in {wrong} of "
                f"{weight.numel()}; fetch or train the checkpoint again"
            )


def calibrate(
    loaded: LoadedModel,
    config: QuantConfig,
    state: CalibrationState,
    encoded: list[dict[str, torch.Tensor]],
    options: ExportOptions,
    processes: Processes,
    progress: Progress,
) -> dict[str, float]:
    """Calibrate the blocks that the state does not hold yet; returns the seconds of all runs by kind of device."""
    finished = processes.gather(state.start(resume=options.resume) if processes.main else 0)[0]
    begin = time.monotonic()
    scratch = state.scratch(processes.rank)
    shutil.rmtree(scratch, ignore_errors=True)  # a killed run may have left some
    store = ActivationStore(scratch, _activation_budget(loaded, config, options))
    run = Calibration(loaded, config, state, store, options.seed, processes)
    blocks = loaded.block_count if options.stop_after is None else options.stop_after
    steps = run.steps() * blocks // loaded.block_count
    tasks = {"block": progress.add_task("calibrate", total=steps)}

    def advance(what: str, count: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=2 * loaded.block_count)
        progress.advance(tasks[what], count)

    run.progress = advance
    try:
        run.run(encoded, finished=finished, stop_after=options.stop_after)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if processes.main:
            state.add_time(loaded.device.type, time.monotonic() - begin)
    return state.times()


def _activation_budget(loaded: LoadedModel, config: QuantConfig, options: ExportOptions) -> int | None:
    """Bytes of hidden states that may stay in memory: the limit less the process and the working set of a block."""
    if options.memory_limit is None:
        return None
    block = sum(p.numel() for p in loaded.language_blocks()[0].parameters()) * 4
    working = block * (10 if config.learning.epochs else 4)
    return max(0, options.memory_limit - resident_bytes() - working)


def resident_bytes() -> int:
    """Peak resident memory of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _header(
    options: ExportOptions, config: QuantConfig, samples: list[CalibrationSample], loaded: LoadedModel
) -> dict[str, Any]:
    """What the integers depend on."""
    model_config = {name: value for name, value in loaded.model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "model": Path(options.model).resolve().name,
        "revision": options.revision,
        "model_config": hashlib.sha256(repr(model_config).encode()).hexdigest(),
        "weights": weights_digest(loaded),
        "recipe": _calibrated_part(config),
        "seed": options.seed,
        "samples": len(samples),
        "samples_sha256": _samples_digest(samples),
    }


def _calibrated_part(config: QuantConfig) -> dict[str, Any]:
    """The recipe but for the cache; without the embedding while that stays float, as in states of older versions."""
    recipe = config.to_dict() | {"kv_cache_bits": 0}
    return {name: value for name, value in recipe.items() if (name, value) != ("embedding", "none")}


def weights_digest(loaded: LoadedModel) -> str:
    """Of the names and bytes of a model's local weight files and its adapter's; a copy elsewhere has the same."""
    folders = [Path(loaded.base), *filter(None, [loaded.lora])]
    files = [path for folder in folders for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)]
    contents = sorted(f"{path.name} {sha256_of(path)}" for path in files if path.is_file())
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _samples_digest(samples: list[CalibrationSample]) -> str:
    """Of the chats and the bytes of their images."""
    digest = hashlib.sha256()
    for sample in samples:
        for message in sample.messages:
            digest.update(repr(message["role"]).encode())
            for part in message["content"]:
                image = part["type"] == "image"
                digest.update(Path(part["path"]).read_bytes() if image else repr(part["text"]).encode())
    return digest.hexdigest()


def _verify(folder: Path, console: Console) -> None:
    """Check a written folder against torch and put what was found into its model card."""
    gc.collect()  # modules refer to each other: those of the model just given up are still there
    exported = open_model(folder)
    rows = verify_parity(exported)
    console.print(parity_table(rows, native=exported.native))
    if wrong := disagreements(rows):
        raise SplitQError(f"export: expected graphs that say what torch says, got {wrong}; please report it")
    add_file(folder, CARD_FILE, model_card(folder, rows))


def chosen_config(options: ExportOptions) -> QuantConfig | None:
    """The recipe that the options name, None for float.

    Raises:
        SplitQError: the recipe is no recipe, the flavour has no choice of cache, or a float export is to stop after
            blocks or to quantize its output projection, embedding or cache.
    """
    if options.flavour == "qdq" and options.kv_cache is not None:
        raise SplitQError(
            f"export: expected no --kv-cache with --flavour qdq, whose cache has 16 bits, got {options.kv_cache}; "
            "leave it out"
        )
    if options.recipe is not None:
        config = load_recipe(options.recipe)
    elif options.scheme == "none":
        if options.stop_after is not None:
            raise SplitQError(
                "export: expected no --stop-after with --scheme none, which calibrates no blocks, got "
                f"{options.stop_after}; leave one out"
            )
        floats = (
            ("--lm-head", options.lm_head, "none"),
            ("--embedding", options.embedding, "none"),
            ("--kv-cache", options.kv_cache, "float32"),
        )
        for name, value, plain in floats:
            if value not in (None, plain):
                raise SplitQError(f"export: expected {name} {plain} with --scheme none, got {value}; leave one out")
        return None
    else:
        config = method_config(options.method, preset(options.scheme))
        if options.flavour == "qdq":
            config = replace(config, transform_width=0)  # its graphs would multiply by the zeros beside the blocks
        else:  # qdq has integers of its own for what the recipe leaves in float
            head = options.lm_head or default_lm_head(config.bits)
            config = replace(config, lm_head=head, embedding=EMBEDDINGS.get(head, "W8"))
    if options.lm_head is not None:
        config = replace(config, lm_head=options.lm_head)
    if options.kv_cache is not None:
        config = replace(config, kv_cache_bits=KV_CACHES[options.kv_cache])
    return config if options.embedding is None else replace(config, embedding=options.embedding)


def default_lm_head(bits: int) -> str:
    """Scheme of the output projection in an export without a recipe file; the presets themselves leave it in float.

    Args:
        bits: of the language blocks' weights.
    """
    return "W6A8" if bits > 3 else "W4A8"


def with_default_cache(
    options: ExportOptions, config: QuantConfig, adapter: ModelAdapter, layout: Layout
) -> QuantConfig:
    """The recipe with a float16 cache where our attention kernel reads it: in packed exports with fused attention.

    A recipe file and --kv-cache say themselves what the cache is.
    """
    attention = options.attention or layout.attention
    fused = attention == "fused" and not adapter.bidirectional and not adapter.mrope
    if options.recipe is not None or options.kv_cache is not None or options.flavour != "packed":
        return config
    return replace(config, kv_cache_bits=HALF_BITS) if fused else config


def check_places(options: ExportOptions) -> None:
    """Check where an export would write, before any work is done.

    Raises:
        SplitQError: see `check_target`; or MODEL has no name, OUT lies in its folder, or the calibration state in OUT.
    """
    check_name(options.model)
    check_target(options.out, force=options.force)
    out, source, state = (path.resolve() for path in (options.out, Path(options.model), options.state_folder))
    if source.is_dir() and out.is_relative_to(source):
        raise SplitQError(
            f"output {options.out}: expected a folder outside the model's, it lies in {options.model}; choose another"
        )
    if state.is_relative_to(out):
        raise SplitQError(
            f"calibration state {options.state_folder}: expected a folder outside {options.out}, which the export "
            "makes or replaces as a whole; choose another with --state"
        )


def progress_bars(console: Console) -> Progress:
    """The bars of long commands."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
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
            row.asked,
            f"{100 * row.same_top:.1f} %",
            "ok" if row.ok else "DIFFERS",
        )
    return table
