"""One engine with one decoder, in a process of its own, told what to time over its standard input.

    python tests/bench/model_engines.py ENGINE PATH --threads 1

Reads lines `TOKENS STEPS`: runs a prompt of TOKENS random tokens from an empty cache, then STEPS single tokens, and
answers with a line of JSON: seconds of the prompt and of all steps; processor time with one thread, elapsed time with
more. Says first how long loading took, the engine's Python modules included; ends with the input, and says last how
much memory the process took at most.
Engines: ours (ONNX Runtime, native kernels), genai (onnxruntime-genai), llama (llama.cpp).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

Timed = Callable[[int, int], tuple[float, float]]
Clock = Callable[[], float]
LONGEST = 1200  # tokens a cache must hold


def token_ids(count: int) -> np.ndarray:
    """Random tokens below 1000, int32."""
    return np.random.default_rng(count).integers(1, 1000, count, dtype=np.int32)


def ours(path: Path, threads: int, clock: Clock) -> Timed:
    """An exported decoder; the embeddings of its prompts are drawn before the clock starts, a row a token."""
    import onnxruntime as ort

    from splitq_edge.runtime_ops.session import ExportedModel

    model = ExportedModel(path, native=True, threads=threads)
    options = model.session_options("decoder")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # other engines take turns with this one
    model.read_weights("decoder")
    model.use_session("decoder", ort.InferenceSession(str(path / "decoder.onnx"), options))
    size = (1, LONGEST, model.manifest["hidden_size"])
    modality, mask = np.zeros((1, LONGEST), np.int8), np.ones((1, LONGEST), np.int64)

    def run(tokens: int, steps: int) -> tuple[float, float]:
        rows = np.random.default_rng(tokens).random(size, np.float32) - 0.5
        cache = model.empty_cache(1, room=tokens + steps)
        marks = [clock()]
        for start, end in ((0, tokens), *((at, at + 1) for at in range(tokens, tokens + steps))):
            piece = slice(start, end)
            logits, cache = model.decode(rows[:, piece], modality[:, piece], mask[:, :end], cache, logits_to_keep=1)
            int(logits[0, -1].argmax())
            marks.append(clock())
        return marks[1] - marks[0], marks[-1] - marks[1]

    return run


def genai(path: Path, threads: int, clock: Clock) -> Timed:
    """What onnxruntime-genai's model builder wrote."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(tokens: int, steps: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=tokens + steps + 2, min_length=tokens + steps + 2, do_sample=False)
        generator = og.Generator(model, params)
        marks = [clock()]
        generator.append_tokens(token_ids(tokens))
        generator.generate_next_token()
        marks.append(clock())
        for _ in range(steps):
            generator.generate_next_token()
        marks.append(clock())
        return marks[1] - marks[0], marks[2] - marks[1]

    return run


def llama(path: Path, threads: int, clock: Clock) -> Timed:
    """A GGUF file."""
    import llama_cpp as cpp

    silent = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch = LONGEST, LONGEST
    settings.n_threads = settings.n_threads_batch = threads
    context = cpp.llama_init_from_model(model, settings)
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def feed(tokens: np.ndarray) -> int:
        array = (cpp.llama_token * len(tokens))(*tokens.tolist())
        if cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp: decoding failed")
        logits = np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        return int(logits.argmax())

    def run(tokens: int, steps: int) -> tuple[float, float]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        prompt = token_ids(tokens)
        marks = [clock()]
        token = feed(prompt)
        marks.append(clock())
        for _ in range(steps):
            token = feed(np.array([token]))
        marks.append(clock())
        return marks[1] - marks[0], marks[2] - marks[1]

    run.kept = (silent, model)  # type: ignore[attr-defined]
    return run


ENGINES: dict[str, Callable[[Path, int, Clock], Timed]] = {"ours": ours, "genai": genai, "llama": llama}


def say(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def peak_rss_mb() -> float:
    """Of this process since its program began: what getrusage says includes the parent it was forked from."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


@click.command(help=__doc__)
@click.argument("engine", type=click.Choice(list(ENGINES)))
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--threads", default=1, show_default=True)
def main(engine: str, path: Path, threads: int) -> None:
    """Answer until the input ends."""
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    timed = ENGINES[engine](path, threads, clock)
    say(load_s=clock() - start)
    for line in sys.stdin:
        tokens, steps = map(int, line.split())
        prompt_s, steps_s = timed(tokens, steps)
        say(prompt_s=prompt_s, steps_s=steps_s)
    say(peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
