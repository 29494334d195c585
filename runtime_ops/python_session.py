"""A session whose `ai.splitq` nodes are Python functions, through onnxruntime-extensions.

The package (0.15) takes no INT4 tensors and no absent inputs, so the graph is rewritten first
(`splitq_edge.exporters.python_nodes`): a node keeps the inputs that the graph computes, its constants stay in Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.runtime_ops.numpy_ops import NUMBER, OPS, PYTHON_DOMAIN, PythonNode
from splitq_edge.runtime_ops.session import ERROR_SEVERITY

TYPES = {"x": "dt_float", "y": "dt_float", "correction": "dt_float", "modality": "dt_int8"}  # codes, scales: by suffix

_owners: weakref.WeakValueDictionary[int, PythonSession] = weakref.WeakValueDictionary()  # by a node's number
_declared: set[str] = set()


class PythonSession(ort.InferenceSession):
    """Runs a rewritten graph.

    Args:
        graph: the serialized model.
        nodes: its nodes in `PYTHON_DOMAIN`.
        folder: where the tensors lie that the graph keeps outside itself.
        threads: intra-op threads, 0 lets ONNX Runtime choose.

    Raises:
        SplitQError: onnxruntime-extensions is not installed.
        ArtifactError: ONNX Runtime refuses the graph.
    """

    def __init__(self, graph: bytes, nodes: Sequence[PythonNode], folder: Path, *, threads: int = 0) -> None:
        extensions = _extensions()
        self._kernels: dict[int, Callable[..., Any]] = {node.number: OPS[node.op_type](node) for node in nodes}
        self._failure: BaseException | None = None
        for node in nodes:
            _owners[node.number] = self
            _declare(extensions, node)
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_SEVERITY
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.register_custom_ops_library(extensions.get_library_path())
        try:
            super().__init__(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise ArtifactError(
                f"{folder}: ONNX Runtime cannot load a graph with its ops in Python ({ort.__version__}: {reason}); "
                "export the model again"
            ) from error

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """See `onnxruntime.InferenceSession.run`; what an op raised comes out here."""
        try:
            return super().run(output_names, input_feed, run_options)
        finally:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def compute(self, number: int, inputs: Sequence[np.ndarray], outputs: int) -> Any:
        """Run a node. The package ends the process when an op raises, even by Ctrl-C, so nothing is raised here."""
        try:
            return self._kernels[number](*inputs)
        except BaseException as error:
            self._failure = error
            nothing = np.zeros(0, np.float32)
            return nothing if outputs == 1 else (nothing,) * outputs


def _extensions() -> Any:
    try:
        import onnxruntime_extensions
    except ImportError as error:
        raise SplitQError(
            "ops in Python: expected the package onnxruntime-extensions, found none; "
            "run: pip install 'splitq-edge[pyops]'"
        ) from error
    return onnxruntime_extensions


def _declare(extensions: Any, node: PythonNode) -> None:
    """Make the node's op known to the package, once a process."""
    if node.name in _declared:
        return

    def compute(*inputs: np.ndarray, **attributes: int) -> Any:
        number = attributes[NUMBER]
        return _owners[number].compute(number, inputs, len(node.outputs))

    def types(names: tuple[str, ...]) -> list[int]:
        kinds = (TYPES.get(name, "dt_int8" if name.endswith("_codes") else "dt_float") for name in names)
        return [getattr(extensions.PyCustomOpDef, kind) for kind in kinds]

    extensions.onnx_op(
        op_type=f"{PYTHON_DOMAIN}::{node.name}",
        inputs=types(node.inputs),
        outputs=types(node.outputs),
        attrs={NUMBER: extensions.PyCustomOpDef.dt_int64},
    )(compute)
    _declared.add(node.name)
