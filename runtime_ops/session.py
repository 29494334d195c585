"""An exported folder as ONNX Runtime sessions: vision encoder, token embedding, decoder with its cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from splitq_edge import runtime_ops
from splitq_edge.artifacts import read_export
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.image_layout import ImageLayout
from splitq_edge.runtime_ops.cache import BufferCache, Cache, empty_buffers, empty_returned
from splitq_edge.runtime_ops.page_cache import read_through

logger = logging.getLogger(__name__)

PARTS = ("vision_encoder", "embed_tokens", "decoder")
FUSED_SINCE = (1, 32)  # onnxruntime whose GroupQueryAttention knows query_seqlens
ERROR_SEVERITY = 3  # ONNX Runtime's own log level: errors only
PIECE = 512  # tokens of a prompt that are read at once: they take up memory together


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
        self.image_layout = ImageLayout.from_dict(self.manifest.get("image_layout", {"kind": "images"}))
        self.native = self._use_native(native)
        self.threads = threads
        self._sessions: dict[str, ort.InferenceSession] = {}

    @staticmethod
    def _use_native(native: bool | None) -> bool:
        if native:
            require_native()
        return native is not False and runtime_ops.library_path() is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the graphs."""
        return tuple(self.manifest["parts"])

    @cached_property
    def context(self) -> int | None:
        """Tokens of prompt and answer that the model was made for; None: the folder does not say."""
        stated = self.manifest.get("max_positions")
        return _positions_of(self.folder / "config.json") if stated is None else int(stated)

    def session(self, part: str) -> ort.InferenceSession:
        """The session of a part, opened when it is first needed: a text-only prompt never loads the vision encoder."""
        if part not in self._sessions:
            self._sessions[part] = self._open(part)
        return self._sessions[part]

    def close(self, part: str) -> None:
        """Give up the session of a part; the next call that needs it opens it again."""
        self._sessions.pop(part, None)

    def use_session(self, part: str, session: ort.InferenceSession) -> None:
        """Run a part in a session made elsewhere, with options of its own."""
        self._sessions[part] = session

    def session_options(self, part: str) -> ort.SessionOptions:
        """Options of the session of a part, the native kernels among them."""
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        options.intra_op_num_threads = self.threads
        if self.native:
            runtime_ops.register(options)
        if self._is_finished(part):
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    def _is_finished(self, part: str) -> bool:
        """Whether a graph has nothing left to fuse, so that looking for it would only take time."""
        fused = self.manifest.get("attention") == "fused" and self.manifest["scheme"] != "none"
        return part == "decoder" and fused and self.native

    def _open(self, part: str) -> ort.InferenceSession:
        options = self.session_options(part)
        remedy = "update onnxruntime to 1.32" if self._too_old(part) else "export the model again"
        self.read_weights(part)
        return open_session(self._path(part), options, remedy)

    def read_weights(self, part: str) -> None:
        """Have the files with a part's large tensors read before a session maps them, see `page_cache.read_through`."""
        path = self._path(part)
        shared = self.manifest["parts"][part].get("shared_data", ())
        for name in (f"{path.name}.data", f"{path.name}_data", *shared):
            read_through(path.with_name(name))

    def _path(self, part: str) -> Path:
        return self.folder / self.manifest["parts"][part]["file"]

    def _too_old(self, part: str) -> bool:
        """Whether the runtime lacks an input of the fused attention."""
        version = tuple(int(number) for number in ort.__version__.split(".")[:2])
        return part == "decoder" and self.manifest.get("attention") == "fused" and version < FUSED_SINCE

    def _inputs(self, part: str) -> dict[str, int]:
        """Ranks of a graph's inputs by name."""
        return {value.name: len(value.shape) for value in self.session(part).get_inputs()}

    def run(self, part: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one part on named inputs; outputs by name.

        Raises:
            SplitQError: ONNX Runtime refused the inputs.
        """
        session = self.session(part)
        with _failures(part):
            outputs = session.run(None, feeds)
        return {output.name: value for output, value in zip(session.get_outputs(), outputs, strict=True)}

    def encode_images(self, pictures: np.ndarray | Mapping[str, np.ndarray] | None) -> np.ndarray:
        """Image rows of the language model.

        Args:
            pictures: pixel_values [images, 3, height, width] float32, or a mapping with what `ImageLayout.pictures`
                gave, other names in it are left alone; None or none of them for a text-only prompt.

        Returns:
            float32, [images, image_tokens, hidden], or [rows, hidden] where pictures differ in their number of rows.
        """
        found = self._pictures(pictures)
        if "pixel_values" not in found:
            tokens, hidden = self.manifest["image_tokens"], self.manifest["hidden_size"]
            return np.zeros((0, hidden) if tokens is None else (0, tokens, hidden), np.float32)
        feeds = self.image_layout.graph_inputs({**found, "pixel_values": found["pixel_values"].astype(np.float32)})
        if "pixel_attention_mask" in self._inputs("vision_encoder"):  # the graph takes tiles by chat
            tiles, _, *size = feeds["pixel_values"].shape
            feeds = {
                "pixel_values": feeds["pixel_values"][None],
                "pixel_attention_mask": np.ones((1, tiles, *size), bool),
            }
        features = self.run("vision_encoder", feeds)["image_features"]
        tokens = self.manifest["image_tokens"]
        return features if tokens is None else features.reshape(-1, tokens, features.shape[-1])

    def positions(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, pictures: Mapping[str, np.ndarray]
    ) -> np.ndarray | None:
        """Positions of a prompt for `decode`, [3, batch, sequence] int64; None where `decode` can count them.

        Args:
            input_ids: [batch, sequence] int64.
            attention_mask: [batch, sequence] int64.
            pictures: see `encode_images`.

        Raises:
            SplitQError: the number of image tokens is not that of the pictures.
        """
        return self.image_layout.positions(
            input_ids, attention_mask, self._pictures(pictures), self.manifest["image_token_id"]
        )

    def _pictures(self, given: np.ndarray | Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        if given is None:
            return {}
        named = {"pixel_values": given} if isinstance(given, np.ndarray) else given
        return {name: named[name] for name in self.image_layout.names if name in named}

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
        is_image = input_ids == self.manifest["image_token_id"]
        wanted = int(is_image.sum())
        rows = image_features.reshape(-1, image_features.shape[-1])
        if wanted != len(rows):
            raise SplitQError(
                f"prompt: expected {len(rows)} image tokens for the images, got {wanted}; "
                "give one image an image placeholder"
            )
        rank = self._inputs("embed_tokens").get("image_features")
        feeds = {} if rank is None else {"image_features": image_features if rank == 3 else rows}
        outputs = self.run("embed_tokens", {"input_ids": input_ids, **feeds})
        if rank is None:  # the bare table
            outputs["inputs_embeds"][is_image] = rows
        return outputs["inputs_embeds"], outputs.get("modality", is_image.astype(np.int8))

    def empty_cache(self, batch: int, *, room: int = 0) -> Cache:
        """The cache before the first token.

        Args:
            batch: rows.
            room: tokens that it will hold, if that is known: a cache that is written in place need not grow then.
        """
        shape = self.manifest["cache"]
        channels = shape["head_dim"] // 2 if shape.get("bits") == 4 else shape["head_dim"]
        empty = {"": ((batch, shape["heads"], 0, channels), shape["dtype"])}
        floats = shape["dtype"] in ("float32", "float16")
        if not floats:
            empty["_scale"] = ((batch, shape["heads"], 0, 1), "float32")
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            f"past_key_values.{layer}.{kind}{suffix}": tensor
            for layer in range(shape["layers"])
            for kind in ("key", "value")
            for suffix, tensor in empty.items()
        }
        in_place = self.manifest.get("attention") == "fused" and floats
        return empty_buffers(shapes, room) if in_place else empty_returned(shapes)

    def decode(
        self,
        inputs_embeds: np.ndarray,
        modality: np.ndarray,
        attention_mask: np.ndarray,
        cache: Cache,
        positions: np.ndarray | None = None,
        *,
        logits_to_keep: int = 0,
        prompt: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Cache]:
        """Run the decoder over new tokens.

        Args:
            inputs_embeds: [batch, sequence, hidden] float32.
            modality: [batch, sequence] int8.
            attention_mask: [batch, past + sequence] int64, 0 for padding, which may lie between tokens: positions
                count what is not padding.
            cache: what the call before returned, or `empty_cache`.
            positions: of the new tokens, a part of what `positions` gave; none: they follow those of the cache.
            logits_to_keep: last positions whose logits are wanted, 0 for all.
            prompt: [batch, sequence] int8, 1 for tokens of the prompt where these see each other, which they do in one
                call only; none: the first call is the prompt.

        Returns:
            Logits [batch, kept, vocabulary] float32 and the grown cache.

        Raises:
            SplitQError: there are more tokens than the model has positions, or ONNX Runtime refused the inputs.
        """
        self._check_length(attention_mask.shape[1])
        shift, real = cache.shift, attention_mask[:, cache.length :]
        if positions is not None:
            shift = np.where(real, positions.max(0), -1).max(-1) + 1 - attention_mask.sum(-1)
        else:
            positions = np.maximum(attention_mask.cumsum(-1) - 1, 0)[:, cache.length :]
            if self.image_layout.mrope:
                ahead = 0 if shift is None else shift[:, None]
                positions = np.stack([np.where(real, positions + ahead, 0)] * 3)
        feeds: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": positions,
        }
        if self.manifest["modality_input"]:
            feeds["modality"] = modality
        if self.manifest.get("prompt_input"):
            first = np.full(modality.shape, cache.length == 0, np.int8)
            feeds["prompt"] = first if prompt is None else prompt
        trims = bool(self.manifest.get("logits_to_keep"))
        if trims:
            feeds["logits_to_keep"] = np.array([logits_to_keep], np.int64)
        session, pieces = self.session("decoder"), self._pieces(feeds, cache, logits_to_keep)
        grown = cache.with_room(attention_mask.shape[1]) if len(pieces) > 1 else cache
        with _failures("decoder"):
            for piece in pieces:
                logits, grown = grown.step(session, piece)
        grown.shift = shift
        return (logits if trims else logits[:, -logits_to_keep:]), grown

    def _pieces(self, feeds: dict[str, Any], cache: Cache, kept: int) -> list[dict[str, Any]]:
        """Inputs of the decoder's runs one after the other: of about equal length where a prompt may be read in pieces.

        It may be where all logits that are wanted are those of the last piece and attention is fused, which is causal
        (exporters/passes/fuse_attention.py). A cache in float16 rounds what a piece leaves to the next one, as it does
        for the steps behind a prompt.
        """
        tokens = feeds["inputs_embeds"].shape[1]
        count = max(1, -(-tokens // PIECE))
        if not isinstance(cache, BufferCache) or not 0 < kept <= tokens // count:
            return [feeds]
        bounds = [tokens * index // count for index in range(count + 1)]
        pieces = []
        for begin, end in pairwise(bounds):
            piece = {**feeds, "attention_mask": feeds["attention_mask"][:, : cache.length + end]}
            for name in ("inputs_embeds", "modality"):
                if name in feeds:
                    piece[name] = feeds[name][:, begin:end]
            piece["position_ids"] = feeds["position_ids"][..., begin:end]
            if end < tokens and "logits_to_keep" in feeds:
                piece["logits_to_keep"] = np.ones(1, np.int64)
            pieces.append(piece)
        return pieces

    def _check_length(self, tokens: int) -> None:
        """The fused attention has a table of positions; standard ops go on beyond what the model was trained for."""
        most = self.manifest.get("max_positions", tokens)
        if tokens > most and self.manifest.get("attention") == "fused":
            raise SplitQError(
                f"prompt: expected at most {most} tokens with the answer and padding, got {tokens}; shorten them"
            )


def _positions_of(path: Path) -> int | None:
    """max_position_embeddings of the language model in a config.json; export.json of old folders does not say it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return found if isinstance(found, int) else None


@contextmanager
def _failures(part: str) -> Iterator[None]:
    """ONNX Runtime's errors in one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise SplitQError(f"{part}: ONNX Runtime failed ({reason})") from error


def open_session(path: Path, options: ort.SessionOptions, remedy: str) -> ort.InferenceSession:
    """A session on the CPU.

    Raises:
        ArtifactError: ONNX Runtime refuses the file; the message ends with the remedy.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise ArtifactError(f"{path}: ONNX Runtime cannot load it ({ort.__version__}: {reason}); {remedy}") from error


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
