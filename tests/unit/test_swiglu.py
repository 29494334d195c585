"""SwiGLU: native kernel and body against the equation in double, and the pass that writes the node."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import site_engines
from onnx import TensorProto, helper, inliner
from onnx.reference import ReferenceEvaluator

from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import DOMAIN, VERSION, SwiGLUSpec, make_node
from splitq_edge.exporters.passes.fuse_swiglu import fuse_swiglu
from splitq_edge.exporters.python_nodes import rewrite
from splitq_edge.runtime_ops import library_path
from splitq_edge.runtime_ops.python_session import PythonSession

ULP = 2.0**-23
PYTHON = ["python"] if find_spec("onnxruntime_extensions") else []
SIGMOID_ERROR = 4e-7  # absolute, of ONNX Runtime's own Sigmoid (measured 1e-7)


def swiglu_model(width: int) -> onnx.ModelProto:
    spec = SwiGLUSpec(N=width)
    feeds = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 2 * width])]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", width])
    graph = helper.make_graph([make_node(spec, {"x": "x"}, "y", "gate")], "gate", feeds, [output])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions_for([spec]), ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray, engine: str) -> np.ndarray:
    if engine == "reference":
        return ReferenceEvaluator(inliner.inline_local_functions(model)).run(None, {"x": x})[0]
    if engine == "python":
        return PythonSession(*rewrite(model, Path()), Path(), threads=1).run(None, {"x": x})[0]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if engine == "native":
        options.register_custom_ops_library(str(library_path()))
        del model.functions[:]  # nothing but the kernel can run it
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def assert_equation(got: np.ndarray, x: np.ndarray, engine: str) -> None:
    gate, up = np.split(x.astype(np.float64), 2, -1)
    right = expected(x)
    loose = SIGMOID_ERROR * np.abs(gate * up) if engine == "functions" else 1e-33
    assert (np.abs(got - right) <= 16 * ULP * np.abs(right) + loose).all()


def expected(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64), 2, -1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("engine", ["reference", *PYTHON, *site_engines()])
@pytest.mark.parametrize(("rows", "width"), [((1, 1), 1), ((2, 3), 37), ((1, 300), 160), ((0, 4), 8)])
def test_every_engine_computes_the_equation(engine: str, rows: tuple[int, int], width: int) -> None:
    x = np.random.default_rng(width).standard_normal((*rows, 2 * width)).astype(np.float32) * 6
    got = run(swiglu_model(width), x, engine)
    assert got.shape == (*rows, width)
    assert_equation(got, x, engine)


@pytest.mark.parametrize("engine", site_engines())
def test_numbers_of_any_size(engine: str) -> None:
    gate = np.array([0, -0.0, 1e-38, -1e-38, 30, -30, 80, -80, 200, -200, 1e30, -1e30, np.inf], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None, None]
    got = run(swiglu_model(len(gate)), x, engine)[0, 0]
    near = np.abs(gate) < 1e3
    assert_equation(got[near], np.concatenate([gate[near], np.ones(near.sum(), np.float32)]), engine)
    assert got[list(gate).index(np.float32(1e30))] == np.float32(1e30)
    assert got[-1] == np.inf
    lonely = x.copy()
    lonely[0, 0, 2] = np.nan
    again = run(swiglu_model(len(gate)), lonely, engine)[0, 0]
    assert np.isnan(again[2])
    np.testing.assert_array_equal(np.delete(again, 2), np.delete(got, 2))


@pytest.mark.skipif("native" not in site_engines(), reason="no native library")
def test_another_width_is_refused_in_words() -> None:
    model = swiglu_model(8)
    del model.graph.input[0].type.tensor_type.shape.dim[-1:]
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_param="channels")
    with pytest.raises(Exception, match=r"SwiGLU node 'gate': expected input 'x' of shape \[..., 16\]"):
        run(model, np.zeros((1, 2, 12), np.float32), "native")


def gated(*, halves: tuple[int, int] = (8, 8), swapped: bool = False, extra: bool = False) -> ir.Model:
    """Split, Sigmoid and two Mul as they are traced."""
    nodes = [
        helper.make_node("Split", ["x", "widths"], ["a", "b"], "site.split", axis=-1),
        helper.make_node("Sigmoid", ["b" if swapped else "a"], ["s"]),
        helper.make_node("Mul", ["b" if swapped else "a", "s"], ["silu"]),
        helper.make_node("Mul", ["silu", "a" if swapped else "b"], ["y"]),
        *([helper.make_node("Neg", ["a"], ["z"])] if extra else []),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", *(["z"] if extra else []))
    ]
    known = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2, w]) for n, w in zip("ab", halves, strict=True)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, sum(halves)])],
        outputs,
        [helper.make_tensor("widths", TensorProto.INT64, [2], halves)],
        value_info=known,
    )
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def test_the_pass_writes_one_node_that_keeps_the_outputs_name() -> None:
    model = gated()
    assert fuse_swiglu(model) == {SwiGLUSpec(N=8)}
    (node,) = model.graph
    assert (node.domain, node.op_type, node.attributes["N"].as_int()) == (DOMAIN, "SwiGLU", 8)
    assert model.graph.outputs[0] is node.outputs[0]
    assert node.outputs[0].name == "y"


@pytest.mark.parametrize("other", [{"swapped": True}, {"extra": True}, {"halves": (6, 10)}])
def test_the_pass_leaves_other_shapes_alone(other: dict[str, object]) -> None:
    model = gated(**other)  # type: ignore[arg-type]
    before = [node.op_type for node in model.graph]
    assert fuse_swiglu(model) == set()
    assert [node.op_type for node in model.graph] == before
