"""An exported folder as ONNX Runtime sessions: vision encoder, token embedding, decoder with its cache."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from splitq_edge import runtime_ops
from splitq_edge.artifacts import read_export
from splitq_edge.errors import ArtifactError, SplitQError

logger = logging.getLogger(__name__)

PARTS = ("vision_encoder", "embed_tokens", "decoder")
ERROR_SEVERITY = 3  # ONNX Runtime's own log level: errors only


@dataclass
class Cache:
    """Key-value cache of a batch.

    Attributes:
        values: by decoder input name, [batch, kv_heads, past, channels]: keys and values in float32, or as int8 codes
            (uint8: two 4-bit codes a byte) with one float32 scale a token and head beside each.
    """

    values: dict[str, np.ndarray]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return next(iter(self.values.values())).shape[2]

    def take(self, rows: np.ndarray) -> Cache:
        """The cache of the batch that these rows make.

        Args:
            rows: [batch] integers; a row may be taken more than once.
        """
        return Cache({name: value[rows] for name, value in self.values.items()})


class ExportedModel:
    """The three parts of an exported vision-language model.

    Args:
        folder: what `splitq-edge export` wrote.
        native: True needs the native library, False runs the function bodies alone, None takes the library if it is
            there.
        threads: intra-op threads, 0 lets ONNX Runtime choose.

    Raises:
        SplitQError: the folder is missing or damaged, or `native` is True and there is no library.
    """

    def __init__(self, folder: str | Path, *, native: bool | None = None, threads: int = 0) -> None:
        self.folder = Path(folder)
        self.manifest = read_export(self.folder)
        self.native = self._use_native(native)
        self.threads = threads

    @staticmethod
    def _use_native(native: bool | None) -> bool:
        if native:
            require_native()
        return native is not False and runtime_ops.library_path() is not None

    @functools.cached_property
    def _sessions(self) -> dict[str, ort.InferenceSession]:
        return {part: self._open(part) for part in PARTS}

    def _open(self, part: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        options.intra_op_num_threads = self.threads
        if self.native:
            runtime_ops.register(options)
        path = self.folder / self.manifest["parts"][part]["file"]
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise ArtifactError(f"{path}: ONNX Runtime cannot load it ({reason}); export the model again") from error

    def run(self, part: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one part on named inputs; outputs by name.

        Raises:
            SplitQError: ONNX Runtime refused the inputs.
        """
        session = self._sessions[part]
        try:
            outputs = session.run(None, feeds)
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise SplitQError(f"{part}: ONNX Runtime failed ({reason})") from error
        return {output.name: value for output, value in zip(session.get_outputs(), outputs, strict=True)}

    def encode_images(self, pixel_values: np.ndarray | None) -> np.ndarray:
        """Image rows of the language model.

        Args:
            pixel_values: [images, 3, height, width] float32, or None for a text-only prompt.

        Returns:
            [images, image_tokens, hidden] float32.
        """
        if pixel_values is None:
            tokens, hidden = self.manifest["image_tokens"], self.manifest["hidden_size"]
            return np.zeros((0, tokens, hidden), np.float32)
        return self.run("vision_encoder", {"pixel_values": pixel_values.astype(np.float32)})["image_features"]

    def embed(self, input_ids: np.ndarray, image_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token embeddings with the image rows merged in.

        Args:
            input_ids: [batch, sequence] int64; each image token takes the next row of image_features.
            image_features: see `encode_images`.

        Returns:
            inputs_embeds [batch, sequence, hidden] float32 and modality [batch, sequence] int8.

        Raises:
            SplitQError: the number of image tokens is not the number of image rows.
        """
        wanted = int((input_ids == self.manifest["image_token_id"]).sum())
        rows = image_features.shape[0] * image_features.shape[1]
        if wanted != rows:
            raise SplitQError(
                f"prompt: expected {rows} image tokens for {image_features.shape[0]} images, got {wanted}; "
                "give one image an image placeholder"
            )
        outputs = self.run("embed_tokens", {"input_ids": input_ids, "image_features": image_features})
        return outputs["inputs_embeds"], outputs["modality"]

    def empty_cache(self, batch: int) -> Cache:
        """The cache before the first token."""
        shape = self.manifest["cache"]
        channels = shape["head_dim"] // 2 if shape.get("bits") == 4 else shape["head_dim"]
        empty = {"": np.zeros((batch, shape["heads"], 0, channels), shape["dtype"])}
        if shape["dtype"] != "float32":
            empty["_scale"] = np.zeros((batch, shape["heads"], 0, 1), np.float32)
        return Cache(
            {
                f"past_key_values.{layer}.{kind}{suffix}": value
                for layer in range(shape["layers"])
                for kind in ("key", "value")
                for suffix, value in empty.items()
            }
        )

    def decode(
        self, inputs_embeds: np.ndarray, modality: np.ndarray, attention_mask: np.ndarray, cache: Cache
    ) -> tuple[np.ndarray, Cache]:
        """Run the decoder over new tokens.

        Args:
            inputs_embeds: [batch, sequence, hidden] float32.
            modality: [batch, sequence] int8.
            attention_mask: [batch, past + sequence] int64, 0 for padding, which may lie between tokens: positions
                count what is not padding.
            cache: what the call before returned, or `empty_cache`.

        Returns:
            Logits [batch, sequence, vocabulary] float32 and the grown cache.
        """
        positions = np.maximum(attention_mask.cumsum(-1) - 1, 0)[:, cache.length :]
        feeds: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": positions,
            **cache.values,
        }
        if self.manifest["modality_input"]:
            feeds["modality"] = modality
        outputs = self.run("decoder", feeds)
        grown = {name: outputs[name.replace("past_key_values", "present")] for name in cache.values}
        return outputs["logits"], Cache(grown)


def require_native() -> None:
    """Check that the native library is there.

    Raises:
        SplitQError: it is not.
    """
    if runtime_ops.library_path() is None:
        raise SplitQError(
            "native library: expected one beside splitq_edge.runtime_ops, found none; install a C++ compiler and "
            "reinstall splitq-edge, or run with the function bodies"
        )
