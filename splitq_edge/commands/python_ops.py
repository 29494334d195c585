"""Runs an exported folder with the `ai.splitq` ops in Python. Needs onnx and onnxruntime-extensions, no torch."""

from __future__ import annotations

from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.session import ExportedModel


def use_python_ops(model: ExportedModel) -> None:
    """Open the parts of a model with Python ops in place of native kernels and function bodies.

    Raises:
        SplitQError: a package is missing, or the model has no such ops.
        ArtifactError: a graph cannot be read.
    """
    if "static" in model.manifest:
        raise SplitQError(
            f"{model.folder}: ops in Python: expected the flavour portable or packed, got qdq, which has none of them"
        )
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise SplitQError(
            "ops in Python: expected the package onnx, found none; run: pip install 'splitq-edge[pyops]'"
        ) from error
    from splitq_edge.exporters.python_nodes import python_graph
    from splitq_edge.runtime_ops.python_session import PythonSession

    for part, entry in model.manifest["parts"].items():
        path = model.folder / entry["file"]
        graph, nodes = python_graph(path)
        model.use_session(part, PythonSession(graph, nodes, path.parent, threads=model.threads))
