"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from splitq_edge import __version__
from splitq_edge.config import EMBEDDINGS, KV_CACHES, LM_HEAD_SCHEMES, PRESETS, RANGE_METHODS, ROUNDINGS, TRANSFORMS
from splitq_edge.errors import SplitQError
from splitq_edge.targets import ARCHITECTURES, QNN_HTP, TARGET_NAMES, Target

ROWS_MISSING = 1
USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143  # 128 + SIGTERM, as shells count
EXTRAS = {
    "accelerate": "quantize",
    "torch": "quantize",
    "rich": "quantize",
    "safetensors": "quantize",
    "yaml": "quantize",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "easy_vqa": "tasks",
    "matplotlib": "tasks",
    "zxcvbn": "tasks",
}
PATH = click.Path(path_type=Path)
# The keys of methods.registry.METHODS; a test keeps them equal.
METHOD_NAMES = ("rtn", "smoothquant", "awq", "gptq", "mbq", "quarot", "flatquant", "splitq")
LAYOUT_NAMES = ("genai", "onnx-community", "flat")  # exporters.layouts.registry.LAYOUTS; a test keeps them equal
ABLATIONS = ("components", "rules", "mac", "options", "bits")  # methods.ablation.TABLES


class _Bytes(click.ParamType):
    """A size such as 8GB, 500MB or 1.5GiB, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"expected a size such as 8GB, got {value!r}", param, ctx)
        number, prefix, binary = match.groups()
        size = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
        if not 1 <= size < 2**63:
            self.fail(f"expected a size from 1 byte to 8 EiB, got {value!r}", param, ctx)
        return int(size)


BYTES = _Bytes()
SEED = click.IntRange(0, 2**31 - 1)
TRANSFORM_LR = click.option(
    "--transform-lr",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="Learning rate of the transforms instead of the preset's, which is for its epochs.",
)
# What an interrupted command leaves; others only read.
KEPT = {
    "export": "finished blocks of the calibration are kept, --resume goes on",
    "table": "measured rows are kept, the same command goes on",
    "ablate": "measured rows are kept, the same command goes on",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="splitq-edge")
@click.option("--debug", is_flag=True, help="Show tracebacks and all log lines.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """Quantize vision-language models with SplitQ, export them to ONNX and run them."""
    context.obj = debug
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    if not debug:
        # transformers prints advice about torch on import; a device that only runs models needs none.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for name in ("torch", "onnxscript", "httpx", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is half written goes, what is finished stays."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `_Terminated`; a second one ends the process at once, as ever."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """One line and exit code 2 for what a user can mend; a traceback only with --debug."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            with _terminable():
                return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            terminated = isinstance(stop, _Terminated)
            word = "terminated" if terminated else "interrupted"
            click.echo(f"\n{word}; {KEPT.get(command.__name__, 'nothing was changed')}", err=True)
            sys.exit(TERMINATED if terminated else INTERRUPTED)
        except (SplitQError, ImportError, OSError) as error:
            if click.get_current_context().find_root().obj or (isinstance(error, BrokenPipeError) and _reader_left()):
                raise
            click.echo(f"error: {_message(error)}", err=True)
            sys.exit(USER_ERROR)

    return wrapper


def _reader_left() -> bool:
    """Whether nobody reads the output any more, as behind `| head`; click then ends the command without a word."""
    try:
        sys.stdout.flush()
        if not hasattr(select, "poll"):
            return False
        poller = select.poll()  # output without a buffer has nothing left to flush
        poller.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poller.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # no file at all
        return False


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}; check the place and its free space"
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package == "splitq_edge":
            return f"{error.name}: expected an installed splitq-edge, got the bare checkout; run: pip install -e ."
        if package not in EXTRAS:
            raise error
        return f"this command needs the package {package}; run: pip install 'splitq-edge[{EXTRAS[package]}]'"
    return " ".join(str(error).split())


def _checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that reads a checkpoint itself."""
    options = (
        click.option("--adapter", type=PATH, help="Folder of a LoRA adapter (peft) to merge into MODEL's weights."),
        click.option("--trust-remote-code", is_flag=True, help="Let transformers run code that comes with MODEL."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("model")
@click.argument("out", type=PATH)
@click.option(
    "--scheme",
    type=click.Choice([*PRESETS, "none"]),
    default="W4A8",
    show_default=True,
    help="Weight and activation bits of the language model; none exports in float32.",
)
@click.option(
    "--method",
    type=click.Choice(METHOD_NAMES),
    default="splitq",
    show_default=True,
    help="SplitQ, or a method to compare it with.",
)
@click.option("--recipe", type=PATH, help="YAML recipe instead of --scheme and --method: every setting by hand.")
@click.option(
    "--calib",
    default="easyvqa",
    show_default=True,
    metavar="DATA",
    help="Calibration data: a folder with images and one .jsonl file of chats, or built-in tasks (a,b or all).",
)
@click.option("--calib-samples", default=128, show_default=True, help="Samples to calibrate with.")
@click.option(
    "--flavour",
    type=click.Choice(["portable", "packed", "qdq"]),
    default="portable",
    show_default=True,
    help="portable: int4 tensors; packed: the kernels' own layout, smaller, used in place; qdq: static graphs with "
    "static activation ranges, for NPUs.",
)
@click.option(
    "--target", type=click.Choice(TARGET_NAMES), help="qdq: stop if this NPU would reject a node, and say which."
)
@click.option("--context", default=256, show_default=True, type=click.IntRange(min=2), help="qdq: tokens of the cache.")
@click.option("--chunk", default=64, show_default=True, type=click.IntRange(min=2), help="qdq: tokens a prefill call.")
@click.option(
    "--ranges",
    type=click.Choice(RANGE_METHODS),
    default="minmax",
    show_default=True,
    help="qdq: how activation ranges are chosen from the calibration samples.",
)
@click.option(
    "--static-bits",
    type=click.Choice(["16", "8"]),
    default="16",
    show_default=True,
    help="qdq: bits of the quantized layers' activations; at 16 MAC is left out, there is nothing to compensate.",
)
@click.option(
    "--lm-head",
    type=click.Choice(LM_HEAD_SCHEMES),
    help="Of the output projection: in a small model it is what a token waits longest for; default: as the recipe "
    "says, without one W6A8, which only packed files store in 6 bits, or W4A8 where the scheme's weights have 3 bits "
    "(none with --flavour qdq).",
)
@click.option(
    "--embedding",
    type=click.Choice(EMBEDDINGS),
    help="Of the token embedding; W8 tied to an output projection of 8 or 6 bits, or W4 to one of 4, is stored with "
    "that; default: as the recipe says, without one W4 beside an output projection W4A8, else W8 (none with --flavour "
    "qdq).",
)
@click.option(
    "--kv-cache",
    type=click.Choice(list(KV_CACHES)),
    help="Of keys and values; default: as the recipe says, without one float16 in packed exports with fused attention "
    "and float32 in others.",
)
@click.option(
    "--attention",
    type=click.Choice(["fused", "standard"]),
    help="fused: one attention node a layer (onnxruntime 1.32), where the model allows it; standard: ops of the "
    "ONNX standard alone, slower; default: fused, standard in the layout onnx-community.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUT_NAMES),
    help="Files as onnxruntime-genai or as transformers.js (onnx-community) opens them, or flat; "
    "default: genai for the types it knows, else flat.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the samples and their order.")
@click.option("--revision", help="Hub revision of MODEL.")
@_checkpoint_options
@click.option("--force", is_flag=True, help="Replace OUT if it holds an earlier export.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same options.")
@click.option("--state", type=PATH, help="Folder of the finished blocks; default: OUT.calibration, deleted at the end.")
@click.option("--keep-state", is_flag=True, help="Keep the folder of the finished blocks.")
@click.option(
    "--stop-after", type=click.IntRange(min=1), help="Stop when so many blocks are finished; --resume goes on."
)
@click.option(
    "--memory-limit",
    type=BYTES,
    help="Memory to stay below, such as 8GB: weights are read block by block, activations go to disk.",
)
@click.option("--dry-run", is_flag=True, help="Print time, size and effective bits to expect; reads no weights.")
@_reports_errors
def export(out: Path, **options: Any) -> None:
    """Calibrate and quantize MODEL (folder or hub id), write ONNX graphs to the folder OUT and verify them.

    MODEL may be the folder of a LoRA adapter: it is merged into the base that adapter_config.json names.
    """
    from splitq_edge.commands.console import make_console
    from splitq_edge.commands.export import ExportOptions, run_export

    dry_run = options.pop("dry_run")
    static = {name: options.pop(name) for name in ("target", "context", "chunk", "ranges")}
    static["activation_bits"] = int(options.pop("static_bits"))
    if static["target"] is not None and options["flavour"] != "qdq":
        raise SplitQError("export: --target checks static graphs; add --flavour qdq")
    chosen = ExportOptions(out=out, static=static, **options)
    if dry_run:
        from splitq_edge.commands.dry_run import print_estimate

        print_estimate(chosen, make_console())
    else:
        run_export(chosen, make_console())


@main.command()
@click.argument("out", type=PATH)
@click.option("--image", "images", type=PATH, multiple=True, help="Picture file; repeat for several.")
@click.option("--prompt", required=True, help="The question.")
@click.option(
    "--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Limit of the answer."
)
@click.option("--native/--functions", default=None, help="Native kernels or function bodies; default: native if there.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(min=0), help="0: ONNX Runtime chooses.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeat for several.")
@click.option(
    "--engine",
    type=click.Choice(["genai", "loop", "pyops"]),
    help="onnxruntime-genai or the loop that comes with splitq-edge; pyops: the loop with our ops in Python; "
    "default: genai where it can run OUT.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="0: the likeliest token; above, tokens are drawn (engine genai).",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from so many of the likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the tokens of this probability.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the draw.")
@_reports_errors
def run(out: Path, images: tuple[Path, ...], prompt: str, **options: Any) -> None:
    """Answer a question about pictures with the exported folder OUT, as the words come."""
    from splitq_edge.commands.run import RunOptions, stream_answer

    pieces = stream_answer(out, images, prompt, RunOptions(**options))
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


@main.command()
@click.argument("out", type=PATH)
@click.option("--prompt-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="With the images'.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(min=2), help="Tokens of the answer.")
@click.option("--images", default=1, show_default=True, type=click.IntRange(min=0), help="Pictures in the prompt.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(min=0), help="0: ONNX Runtime chooses.")
@click.option("--native/--functions", default=None, help="Native kernels or function bodies; default: native if there.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Answers; medians are shown.")
@click.option("--json", "json", type=PATH, help="Write the result to this file too.")
@_reports_errors
def bench(**options: Any) -> None:
    """Time the exported folder OUT: loading, pictures, first token, the tokens after it; and its peak memory."""
    from splitq_edge.commands.bench import BenchOptions, report_lines, run_bench

    for line in report_lines(run_bench(BenchOptions(**options))):
        click.echo(line)


@main.command("eval")
@click.argument("model")
@click.option("--task", default="easyvqa", show_default=True, help="Built-in tasks, with commas between, or all.")
@click.option(
    "--backend",
    type=click.Choice(["torch", "ort", "ort-functions", "pyops", *TARGET_NAMES]),
    default="ort",
    show_default=True,
    help="pyops: the ops in Python; an NPU's name runs what `compile` made, on x86-64 in the emulator.",
)
@click.option("--limit", type=int, help="Questions to ask, drawn at random; default: all.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the draw.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(min=0), help="0: ONNX Runtime chooses.")
@click.option("--json", "json", type=PATH, help="Write the result to this file.")
@click.option("--save-reference", type=PATH, help="Write what MODEL holds likely (.npz), for --reference.")
@click.option("--reference", type=PATH, help="File of --save-reference: also report the KL divergence from its model.")
@click.option(
    "--state", type=PATH, help="With --backend torch: the calibration that export --keep-state left, simulated."
)
@click.option("--save-answers", type=PATH, help="Write every question with its answer to this file (JSON lines).")
@click.option("--answers", type=PATH, help="File of --save-answers: also report how many answers are the same.")
@_checkpoint_options
@_reports_errors
def evaluate(**options: Any) -> None:
    """Accuracy and NLL of MODEL (checkpoint with --backend torch, else an exported folder) on held-out questions."""
    from splitq_edge.commands.console import make_console
    from splitq_edge.commands.evaluate import EvalOptions, run_eval

    run_eval(EvalOptions(**options), make_console())


def _names(known: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    """Reads an option such as `rtn,gptq`, each name one of `known`."""

    def read(_context: click.Context, _option: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        for name in names:
            if name not in known:
                raise click.BadParameter(f"expected names out of {', '.join(known)}, got '{name}'.")
        return names

    return read


def _table_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that `table` and `ablate` share."""
    options = (
        click.option("--task", default="easyvqa", show_default=True, help="Built-in tasks, also the calibration data."),
        click.option("--results", type=PATH, required=True, help="JSON file of the rows; those in it are kept."),
        click.option("--redo", is_flag=True, help="Measure the rows of the file again."),
        click.option("--limit", type=int, help="Questions to ask, drawn at random; default: all."),
        click.option("--calib-samples", default=128, show_default=True, help="Samples to calibrate with."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of samples and draw."),
        click.option(
            "--work", type=PATH, default=Path("build/table"), show_default=True, help="Folder for the exports."
        ),
        click.option("--keep", is_flag=True, help="Keep the exports in the work folder."),
        click.option(
            "--states",
            type=PATH,
            help="Keep the calibrations in this folder and go on with those begun there, of another machine too.",
        ),
        click.option("--markdown", is_flag=True, help="Print the table in Markdown."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _measure_rows(rows: Any, options: dict[str, Any]) -> None:
    from splitq_edge.commands.console import make_console
    from splitq_edge.commands.table import TableOptions, run_table

    failed = run_table(TableOptions(**options), rows, make_console())
    if failed:
        click.echo(f"error: {failed} rows could not be measured (above); the next run tries them again", err=True)
        sys.exit(ROWS_MISSING)


@main.command()
@click.argument("model")
@click.option(
    "--methods",
    default=",".join(METHOD_NAMES),
    show_default=True,
    callback=_names(METHOD_NAMES),
    metavar="NAMES",
    help="Methods, with commas between.",
)
@click.option(
    "--schemes",
    default=",".join(PRESETS),
    show_default=True,
    callback=_names(tuple(PRESETS)),
    metavar="NAMES",
    help="Schemes, with commas between.",
)
@click.option(
    "--epochs", type=click.IntRange(min=0), help="Epochs of the methods that learn instead of the preset's; 0: none."
)
@TRANSFORM_LR
@_table_options
@_reports_errors
def table(
    methods: tuple[str, ...], schemes: tuple[str, ...], epochs: int | None, transform_lr: float | None, **options: Any
) -> None:
    """Measure MODEL (folder or hub id) in float32 and with every method at every scheme, in the native kernels."""
    from splitq_edge.commands.table import method_rows

    _measure_rows(method_rows(methods, schemes, epochs=epochs, transform_lr=transform_lr), options)


@main.command()
@click.argument("model")
@click.option("--scheme", type=click.Choice(list(PRESETS)), default="W3A3", show_default=True)
@click.option(
    "--tables",
    default=",".join(ABLATIONS[:2]),
    show_default=True,
    callback=_names(ABLATIONS),
    metavar="NAMES",
    help="components: flatquant, +MOCD, +CWS, +MAC; rules: how channels are chosen; mac: the rows it works on; "
    "options: the recipe's settings, one changed at a time; bits: peers with as many bits a weight, in group scales.",
)
@click.option("--epochs", type=click.IntRange(min=0), help="Epochs of learning instead of the preset's; 0: none.")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="Start of the transform instead of the preset's.")
@click.option("--rounding", type=click.Choice(ROUNDINGS), help="Rounding of the weights instead of the preset's.")
@TRANSFORM_LR
@_table_options
@_reports_errors
def ablate(
    scheme: str,
    tables: tuple[str, ...],
    epochs: int | None,
    transform: str | None,
    rounding: str | None,
    transform_lr: float | None,
    **options: Any,
) -> None:
    """Measure what each component of SplitQ and each rule of channel choice gives on MODEL, in the native kernels."""
    from splitq_edge.commands.table import ablation_rows

    settings: Any = {"epochs": epochs, "transform_lr": transform_lr, "transform": transform, "rounding": rounding}
    every = [row for name in tables for row in ablation_rows(name, scheme, **settings)]
    rows = list(dict.fromkeys(every))  # the float model once
    _measure_rows(rows, options)


@main.command()
@click.argument("model")
@click.option("--calib", default="easyvqa", show_default=True, help="Built-in tasks or a folder, as for export.")
@click.option("--calib-samples", default=128, show_default=True, help="Samples to look at.")
@click.option(
    "--share", default=0.02, show_default=True, type=click.FloatRange(0.0, 0.5, min_open=True), help="Of top channels."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the samples.")
@click.option("--json", "json", type=PATH, help="Write every site's numbers to this file.")
@click.option("--plot", type=PATH, help="Draw the channels of three blocks into this file; needs matplotlib.")
@_checkpoint_options
@_reports_errors
def outliers(**options: Any) -> None:
    """Show where text and image tokens of MODEL have their largest channels: whether splitting them will pay."""
    from splitq_edge.commands.console import make_console
    from splitq_edge.commands.outliers import OutlierOptions, run_outliers

    run_outliers(OutlierOptions(**options), make_console())


@main.command()
@click.argument("out", type=PATH)
@click.option("--native/--functions", default=None, help="Native kernels or function bodies; default: native if there.")
@click.option("--target", type=click.Choice(TARGET_NAMES), help="Also run what `compile` made for this NPU.")
@_reports_errors
def verify(out: Path, native: bool | None, target: str | None) -> None:
    """Check the hashes of the exported folder OUT and its answers against the stored ones of torch."""
    from splitq_edge.commands.verify import run_verify

    for line in run_verify(out, native=native, target=target):
        click.echo(line)


@main.command()
@click.argument("out", type=PATH)
@click.option("--web", is_flag=True, required=True, help="Serve the page of docs/demo; the model runs in the browser.")
@click.option(
    "--modules",
    type=PATH,
    default=Path("node_modules"),
    show_default=True,
    help="node_modules with onnxruntime-web, @huggingface/tokenizers and @huggingface/jinja.",
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@_reports_errors
def demo(out: Path, web: bool, modules: Path, port: int) -> None:
    """Answer questions about pictures in a browser with the exported folder OUT, from local files alone."""
    from splitq_edge.commands.demo import make_server

    with make_server(out, modules, port) as server:
        click.echo(f"http://{server.server_address[0]!s}:{server.server_address[1]}/")
        server.serve_forever()


@main.command("compile")
@click.argument("out", type=PATH)
@click.option("--target", type=click.Choice([QNN_HTP]), default=QNN_HTP, show_default=True)
@click.option("--arch", type=click.Choice([str(arch) for arch in ARCHITECTURES]), default="73", show_default=True)
@_reports_errors
def compile_(out: Path, target: str, arch: str) -> None:
    """Compile the static graphs of the folder OUT (--flavour qdq) for an NPU, every node on it.

    Needs onnxruntime-qnn: pip install 'splitq-edge[qnn]'. The files go to OUT/compiled.
    """
    from splitq_edge.commands.compile import run_compile

    for line in run_compile(out, Target(target, int(arch))):
        click.echo(line)


@main.command()
@click.argument("out", type=PATH)
@_reports_errors
def inspect(out: Path) -> None:
    """Show what quantization cost every site of the exported folder OUT and which channels were split off."""
    from splitq_edge.commands.console import make_console
    from splitq_edge.commands.inspect import print_report

    print_report(out, make_console())


@main.command()
@_reports_errors
def doctor() -> None:
    """Say what is installed and whether the native kernels are in use."""
    from splitq_edge.commands.doctor import report

    for line in report():
        click.echo(line)


if __name__ == "__main__":
    main()
