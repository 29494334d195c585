"""A folder of the flavour `qdq`: sessions of fixed size, for one image, a chunk of a prompt and one token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from splitq_edge.runtime_ops.session import ERROR_SEVERITY, ExportedModel, open_session
from splitq_edge.runtime_ops.static_calls import StaticCache, StaticShape, store
from splitq_edge.targets import Target


class StaticModel(ExportedModel):
    """The four parts of a static export; used like `ExportedModel`.

    Args:
        folder: what `splitq-edge export --flavour qdq` wrote.
        threads: intra-op threads, 0 lets ONNX Runtime choose.
        target: run what `splitq-edge compile` made for this NPU; None: the CPU.

    Raises:
        SplitQError: the folder is missing or damaged, or was not compiled for the target.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0, target: Target | None = None) -> None:
        super().__init__(folder, native=False, threads=threads)
        self.shape = StaticShape(**self.manifest["static"])
        self._compiled: dict[str, Path] = {}
        if target is not None:
            from splitq_edge.runtime_ops.compiled import compiled_parts

            self._compiled = compiled_parts(self.folder, target)
        self._target = target

    @property
    def context(self) -> int:
        """See `ExportedModel.context`: the slots of the cache."""
        return self.shape.context

    def _open(self, part: str) -> ort.InferenceSession:
        if self._target is not None and part in self._compiled:
            from splitq_edge.runtime_ops.qnn import npu_session

            return npu_session(self._compiled[part], self._target)
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        options.intra_op_num_threads = self.threads
        # ONNX Runtime would otherwise round the activations of products with constant integers to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.read_weights(part)
        return open_session(self._path(part), options, "export the model again")

    def encode_images(self, pictures: np.ndarray | Mapping[str, np.ndarray] | None) -> np.ndarray:
        """See `ExportedModel.encode_images`; one image or tile a run."""
        found = self._pictures(pictures)
        images = found["pixel_values"] if found else ()
        none = super().encode_images(None)
        return np.concatenate([none, *(super(StaticModel, self).encode_images(image[None]) for image in images)])

    def empty_cache(self, batch: int, *, room: int = 0) -> StaticCache:  # type: ignore[override]
        """The cache before the first token: every slot holds the code of zero; its room is fixed."""
        shape = self.manifest["cache"]
        size = (batch, shape["heads"], self.shape.context, shape["head_dim"])
        return StaticCache({name: np.full(size, zero, shape["dtype"]) for name, zero in shape["zero_points"].items()})

    def decode(  # type: ignore[override]
        self,
        inputs_embeds: np.ndarray,
        modality: np.ndarray,
        attention_mask: np.ndarray,
        cache: StaticCache,
        positions: np.ndarray | None = None,
        *,
        logits_to_keep: int = 0,
        prompt: np.ndarray | None = None,
    ) -> tuple[np.ndarray, StaticCache]:
        """See `ExportedModel.decode`; row by row and chunk by chunk.

        The given cache itself grows. A static export has no use for `positions` and `prompt`.

        Raises:
            SplitQError: the tokens do not fit into the cache.
        """
        rows = []
        for row, embeds in enumerate(inputs_embeds):
            logits, at = [], cache.filled
            for call in self.shape.calls(embeds, modality[row], attention_mask[row], cache, row):
                outputs = self.run(call.part, call.feeds)
                store(cache, row, at, outputs, call.used)
                logits.append(outputs["logits"][0, : call.used])
                at += call.used
            rows.append(np.concatenate(logits))
        cache.filled += inputs_embeds.shape[1]
        return np.stack(rows)[:, -logits_to_keep:], cache
