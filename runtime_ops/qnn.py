"""Qualcomm's HTP through the plugin onnxruntime-qnn: compile a static graph, run it; on x86-64 its emulator runs it.

The plugin and Qualcomm's libraries have their own licence; they are an optional package and nothing of them is part of
this one.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime as ort

from splitq_edge.errors import SplitQError
from splitq_edge.runtime_ops.session import ERROR_SEVERITY
from splitq_edge.targets import Target

PROVIDER = "QNNExecutionProvider"


@functools.cache
def _plugin() -> Any:
    """The plugin, registered once with the process's ONNX Runtime."""
    try:
        import onnxruntime_qnn
    except ImportError as error:
        raise SplitQError(
            "QNN: expected the package onnxruntime-qnn, found none; run: pip install 'splitq-edge[qnn]'"
        ) from error
    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return onnxruntime_qnn


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")}


def npu_session(path: Path, target: Target) -> ort.InferenceSession:
    """A session of a compiled (or plain) graph with every node on the NPU.

    Raises:
        SplitQError: the plugin is missing or refuses a node; nothing falls back to the CPU.
    """
    return _session(path, target, _options(target))


def compile_part(source: Path, out: Path, target: Target) -> None:
    """Compile a static graph to one file with the context binary inside (an EPContext node).

    Args:
        source: static graph of the flavour qdq.
        out: file to write; its folder exists.
        target: the NPU.

    Raises:
        SplitQError: the compiler refuses a node.
    """
    out.unlink(missing_ok=True)  # the plugin never replaces a file
    options = _options(target)
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(out))
    options.add_session_config_entry("ep.context_embed_mode", "1")
    _session(source, target, options)
    if not out.is_file():
        raise SplitQError(f"{source}: {target.name}: expected a compiled file, the compiler wrote none")


def _options(target: Target) -> ort.SessionOptions:
    plugin = _plugin()
    options = ort.SessionOptions()
    options.log_severity_level = ERROR_SEVERITY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    settings = {"backend_path": plugin.get_qnn_htp_path(), "htp_arch": str(target.arch)}
    options.add_provider_for_devices(devices, settings)
    return options


def _session(path: Path, target: Target, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SplitQError(
            f"{path}: {target.name} does not take it ({reason}); `splitq-edge export --target {target.name}` names the "
            "nodes it rejects"
        ) from error
