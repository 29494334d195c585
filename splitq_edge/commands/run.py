"""`splitq-edge run`: answer one question with an exported folder. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitq_edge.commands.python_ops import use_python_ops
from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.genai import GenaiGenerator, Sampling, why_not
from splitq_edge.runtime_ops.generate import Generator, open_image
from splitq_edge.runtime_ops.open_model import open_model
from splitq_edge.runtime_ops.session import ExportedModel

logger = logging.getLogger(__name__)

PYOPS = "pyops"  # the engine whose ops run in Python


@dataclass(frozen=True)
class RunOptions:
    """Options of the command, as typed."""

    max_new_tokens: int = 64
    native: bool | None = None
    threads: int = 0
    stop: tuple[str, ...] = ()
    engine: str | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def stream_answer(out: Path, images: tuple[Path, ...], prompt: str, options: RunOptions) -> Iterator[str]:
    """Pieces of the answer: greedy, or drawn where a temperature is given.

    Raises:
        SplitQError: folder, image, prompt or options are not usable.
    """
    if options.engine == PYOPS and options.native:
        raise SplitQError("--engine pyops: expected no --native beside it, its ops run in Python; leave one out")
    pictures = [open_image(path) for path in images]
    model = open_model(out, native=options.native, threads=options.threads)
    ends: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "stop": options.stop}
    if _by_genai(model, options):
        sampling = Sampling(options.temperature, options.top_k or 0, options.top_p or 1.0, options.seed)
        yield from GenaiGenerator(model).stream(prompt, pictures, sampling=sampling, **ends)
    else:
        if options.engine == PYOPS:
            use_python_ops(model)
        yield from Generator(model).stream(prompt, pictures, **ends)


def _by_genai(model: ExportedModel, options: RunOptions) -> bool:
    """Whether onnxruntime-genai answers.

    Raises:
        SplitQError: it is asked for, or needed for the sampling, and cannot.
    """
    if options.temperature == 0 and (options.top_k or options.top_p):
        raise SplitQError("--top-k, --top-p: expected --temperature above 0 beside them, got 0; give a temperature")
    named = options.engine in ("loop", PYOPS)
    reason = f"--engine {options.engine} leaves it out" if named else why_not(model, native=options.native)
    wanted = "--temperature" if options.temperature else "--engine genai" if options.engine == "genai" else None
    if reason and wanted:
        raise SplitQError(f"{wanted}: expected onnxruntime-genai to run {model.folder}, but {reason}")
    logger.info("engine: %s", f"loop ({reason})" if reason else "onnxruntime-genai")
    return reason is None
