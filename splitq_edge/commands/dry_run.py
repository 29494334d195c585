"""`splitq-edge export --dry-run`: time, size and effective bits to expect; no weight is read and nothing is written."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from splitq_edge.calibration.data import encode_sample, load_samples
from splitq_edge.commands.export import ExportOptions, check_places, checked_layout, chosen_config, with_default_cache
from splitq_edge.config import KV_CACHES
from splitq_edge.errors import SplitQError
from splitq_edge.estimate import estimate

TOKEN_SAMPLES = 8  # samples whose length is measured


def print_estimate(options: ExportOptions, console: Console) -> None:
    """Print what an export with these options would take and give.

    Raises:
        SplitQError: the options cannot be used, as in the export itself.
    """
    check_places(options)
    config = chosen_config(options)
    if config is None:
        raise SplitQError("--dry-run: expected a scheme to calibrate, got none; a float export has nothing to estimate")
    samples = load_samples(options.calib, options.calib_samples, seed=options.seed)
    loaded = options.load(lazy=True)
    config = with_default_cache(options, config, loaded.adapter, checked_layout(options, loaded, config))
    lengths = [
        encode_sample(loaded.processor, sample, loaded.image_layout)["input_ids"].shape[1]
        for sample in samples[:TOKEN_SAMPLES]
    ]
    tokens = round(sum(lengths) / len(lengths) * len(samples))
    found = estimate(loaded, config, tokens=tokens, samples=len(samples), packed=options.flavour == "packed")
    table = Table(box=box.SIMPLE, show_header=False)
    rows = {
        "method, scheme": f"{config.method}, {config.scheme}",
        "effective bits a weight": f"{found.effective_bits:.2f}",
        "blocks": str(found.blocks),
        "samples, tokens": f"{len(samples)}, about {found.tokens}",
        "calibration, one block": f"about {_duration(found.block_seconds)} on this machine",
        "calibration, all blocks": f"about {_duration(found.block_seconds * found.blocks)}",
        "quantized linears": _megabytes(found.decoder_bytes),
        **{f"{name}, {getattr(config, name)}": _megabytes(size) for name, size in found.extra_bytes.items()},
        "left in float32": _megabytes(found.float_bytes),
    }
    if options.flavour != "qdq":  # which has 16-bit codes
        rows["keys and values"] = next(name for name, bits in KV_CACHES.items() if bits == config.kv_cache_bits)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
