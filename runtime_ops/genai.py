"""Text from an exported folder of the genai layout, by onnxruntime-genai: greedy or sampled."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.generate import Generator, answer_pieces, room_for_answer
from splitq_edge.runtime_ops.session import ExportedModel

LAYOUT = "genai"
PACKAGE = "onnxruntime_genai"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; as it is made, the likeliest one.

    Attributes:
        temperature: divides the logits; 0: the likeliest token, whatever the rest says.
        top_k: only so many of the likeliest tokens are drawn from, 0: all.
        top_p: only the likeliest tokens that together have this probability.
        seed: of the draw.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """As search options of genai."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "random_seed": self.seed,
        }


def why_not(model: ExportedModel, *, native: bool | None) -> str | None:
    """Why genai cannot run an export here the way it is asked for; None: it can."""
    if model.manifest.get("layout", "flat") != LAYOUT:
        return f"the folder has the layout {model.manifest.get('layout', 'flat')}; export with --layout genai"
    if importlib.util.find_spec(PACKAGE) is None:
        return "onnxruntime-genai is not installed; run: pip install 'splitq-edge[genai]'"
    library = model.manifest.get("native_library")
    if library is None:
        return "the folder was exported without the native library" if native else None
    if native is False:
        return "genai_config.json names the native library, which --functions leaves out"
    here = f"{sys.platform}-{platform.machine()}"
    if library["platform"] != here:
        return f"its native library is one of {library['platform']}, this is {here}"
    return None


class GenaiGenerator:
    """Answers questions with onnxruntime-genai; tokenizer, image processor and chat template are transformers'.

    Args:
        model: an export that `why_not` has nothing against; its own sessions stay closed.

    Raises:
        SplitQError: genai cannot open the folder.
    """

    def __init__(self, model: ExportedModel) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._prompts = Generator(model)
        self._manifest = model.manifest
        for part in model.parts:
            model.read_weights(part)
        try:
            config = onnxruntime_genai.Config(str(model.folder))
            if model.threads:
                session = {"session_options": {"intra_op_num_threads": model.threads}}
                config.overlay(json.dumps({"model": {"decoder": session}}))
            self._model = onnxruntime_genai.Model(config)
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise SplitQError(f"{model.folder}: onnxruntime-genai cannot open it ({reason})") from error

    def tokens(
        self, inputs: dict[str, np.ndarray], *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Tokens of an answer, the end token included.

        Args:
            inputs: of one chat, as `Generator.prepare` makes them.
            max_new_tokens: limit.
            sampling: how they are drawn; default: greedily.

        Raises:
            SplitQError: the prompt leaves no room in the context, or genai refused the inputs.
        """
        ids = inputs["input_ids"].astype(np.int32)
        room = room_for_answer(self._prompts.model, ids.shape[1], max_new_tokens)
        try:
            params = self._genai.GeneratorParams(self._model)
            chosen = (sampling or Sampling()).options()
            params.set_search_options(max_length=ids.shape[1] + room, **chosen)
            generator = self._genai.Generator(self._model, params)
            generator.set_inputs(self._named(ids, inputs))
            for _ in range(room):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                yield token
                if token in self._manifest["eos_token_ids"]:
                    return
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise SplitQError(f"onnxruntime-genai: {reason}") from error

    def stream(
        self,
        prompt: str,
        images: list[Any],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer as they come, see `Generator.stream`."""
        inputs = self._prompts.chat(prompt, images)
        tokens = self.tokens(inputs, max_new_tokens=max_new_tokens, sampling=sampling)
        return answer_pieces(self._prompts.processor, tokens, stop)

    def _named(self, ids: np.ndarray, inputs: dict[str, np.ndarray]) -> Any:
        """Inputs by the names that genai and the graphs look for."""
        tensors = self._genai.NamedTensors()
        tensors["input_ids"] = ids
        layout = self._prompts.model.image_layout
        pictures = {name: inputs[name] for name in layout.names if name in inputs}
        if pictures:
            for name, array in {**pictures, **layout.graph_inputs(pictures)}.items():
                tensors[name] = np.ascontiguousarray(array)
            count = int((ids == self._manifest["image_token_id"]).sum())
            tensors["num_image_tokens"] = np.array([count], np.int64)
        return tensors
