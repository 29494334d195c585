"""Graphs whose ops run in Python through onnxruntime-extensions: what is rewritten and why, and how failures come out.

That the ops compute what the oracle computes is tested with the other engines in test_ops_bodies.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from op_models import Case, OpModel, build

from splitq_edge.commands.python_ops import use_python_ops
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.exporters.nodes import SplitQLinearSpec
from splitq_edge.exporters.python_nodes import python_graph, rewrite
from splitq_edge.runtime_ops.numpy_ops import PYTHON_DOMAIN, CodeProduct
from splitq_edge.runtime_ops.python_session import PythonSession

extensions = pytest.importorskip("onnxruntime_extensions", reason="needs onnxruntime-extensions (splitq-edge[pyops])")

SPEC = SplitQLinearSpec(K=72, N=33, group_widths=(40, 16, 16), bits=4, activation_bits=8, cws_rank=4, mac_rank=4)


def op_model() -> OpModel:
    return build(Case(SPEC), np.random.default_rng(0))


def session(built: OpModel) -> PythonSession:
    graph, nodes = rewrite(built.model, Path())
    return PythonSession(graph, nodes, Path(), threads=1)


def load(nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto) -> ort.InferenceSession:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])]
    graph = helper.make_graph(
        nodes, "graph", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], initializers
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("test.python", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(extensions.get_library_path())
    return ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def test_why_graphs_are_rewritten() -> None:
    # When this fails, the package takes INT4 or absent inputs and nodes could stay as they are.
    kinds = extensions.PyCustomOpDef
    for name in ("Weight", "Optional"):
        op = extensions.onnx_op(op_type=f"test.python::{name}", inputs=[kinds.dt_float, kinds.dt_int8])
        op(lambda x, _other: x)
    int8, int4 = (helper.make_tensor("w", kind, [2], [1, -2]) for kind in (TensorProto.INT8, TensorProto.INT4))
    node = helper.make_node("Weight", ["x", "w"], ["y"], domain="test.python")
    (y,) = load([node], int8).run(None, {"x": np.ones(4, np.float32)})
    assert y.tolist() == [1] * 4
    with pytest.raises(Exception, match=r"Type 'tensor\(int4\)' .* is invalid"):
        load([node], int4)
    with pytest.raises(Exception, match="input 1 is marked single but has an empty string"):
        load([helper.make_node("Optional", ["x", ""], ["y"], domain="test.python")])


def test_nothing_of_the_domain_is_left_and_the_rest_stays() -> None:
    model = op_model().model
    graph, nodes = rewrite(onnx.ModelProto.FromString(model.SerializeToString()), Path())
    found = onnx.load_from_string(graph)
    assert [node.domain for node in found.graph.node] == [PYTHON_DOMAIN]
    assert (list(found.functions), list(found.graph.initializer)) == ([], [])
    assert list(found.graph.input) == list(model.graph.input)
    assert list(found.graph.output) == list(model.graph.output)
    assert (nodes[0].inputs, nodes[0].outputs) == (("x", "modality"), ("y",))
    assert set(nodes[0].constants) == set(SPEC.present_inputs) - {"x", "modality"}
    assert nodes[0].constants["weight_main"].dtype == np.int8


def test_a_computed_weight_is_one_clear_error() -> None:
    model = op_model().model
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weight_main")
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weight_main"], value=tensor))
    with pytest.raises(ArtifactError, match="node: expected an initializer as weight_main, got a computed value"):
        rewrite(model, Path())


def test_a_file_that_is_no_graph_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / 'decoder.onnx'}: expected an ONNX graph")):
        python_graph(tmp_path / "decoder.onnx")


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_an_op_raises_comes_out_of_run(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    built = op_model()
    running = session(built)

    def broken(*_arrays: np.ndarray) -> np.ndarray:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(running, "_kernels", dict.fromkeys(running._kernels, broken))
        with pytest.raises(type(error)):
            running.run(None, built.feeds)
    assert running.run(None, built.feeds)[0].shape == (2, 3, 33)


def test_sessions_keep_their_nodes_apart() -> None:
    first, second = (build(Case(SPEC), np.random.default_rng(seed)) for seed in (1, 2))
    sessions = [session(first), session(second)]
    expected = [running.run(None, first.feeds)[0] for running in sessions]
    assert not np.allclose(*expected)
    del sessions[1]
    np.testing.assert_array_equal(sessions[0].run(None, first.feeds)[0], expected[0])


@pytest.mark.parametrize(("inputs", "exact_in"), [(1024, np.float32), (1025, np.float64)])
def test_sums_of_codes_are_exact(inputs: int, exact_in: type) -> None:
    product = CodeProduct(np.full((inputs, 1), -128, np.int8))
    assert product._weight.dtype == exact_in
    codes = np.where(np.arange(inputs) % 2, -128, 127)[None].astype(np.float32)
    codes[0, 0] = -128  # an odd number of the smallest step in the sum
    assert product(codes).item() == np.float32(int(codes.astype(int).sum()) * -128)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built = op_model()
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    with pytest.raises(
        SplitQError, match=r"onnxruntime-extensions, found none; run: pip install 'splitq-edge\[pyops\]'"
    ):
        session(built)


def test_static_graphs_have_no_such_ops() -> None:
    model: Any = SimpleNamespace(folder=Path("out"), manifest={"static": {}})
    with pytest.raises(SplitQError, match="out: ops in Python: expected the flavour portable or packed, got qdq"):
        use_python_ops(model)
