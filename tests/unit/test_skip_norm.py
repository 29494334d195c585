"""SkipRMSNorm: native kernel and body against the equation in double, and the pass that writes the node."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import site_engines
from onnx import TensorProto, helper

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import DOMAIN, VERSION, SkipRMSNormSpec, make_node
from splitq_edge.exporters.passes.skip_norm import skip_norms
from splitq_edge.runtime_ops import library_path

ULP = 2.0**-23


def norm_model(width: int, epsilon: float = 1e-5) -> onnx.ModelProto:
    spec = SkipRMSNormSpec(N=width, epsilon=epsilon)
    info = helper.make_tensor_value_info
    free = ["batch", "sequence", "channels"]
    feeds = [*(info(name, TensorProto.FLOAT, free) for name in ("x", "skip")), info("weight", TensorProto.FLOAT, ["n"])]
    outputs = [info(name, TensorProto.FLOAT, free) for name in spec.outputs]
    node = make_node(spec, {name: name for name in spec.inputs}, {name: name for name in spec.outputs}, "norm.0")
    graph = helper.make_graph([node], "g", feeds, outputs)
    opsets = [
        helper.make_opsetid("", 21),
        helper.make_opsetid(DOMAIN, VERSION),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, functions=functions_for([spec]), ir_version=10)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], engine: str) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if engine == "native":
        options.register_custom_ops_library(str(library_path()))
        del model.functions[:]  # nothing but the kernel can run it
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def feeds_of(rows: tuple[int, int], width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(width)
    x, skip = (rng.standard_normal((*rows, width)).astype(np.float32) * 7 for _ in range(2))
    return {"x": x, "skip": skip, "weight": rng.standard_normal(width).astype(np.float32)}


@pytest.mark.parametrize("engine", site_engines())
@pytest.mark.parametrize("epsilon", [1e-5, 2.0])
@pytest.mark.parametrize(("rows", "width"), [((1, 1), 1), ((2, 3), 37), ((1, 300), 160), ((1, 1), 576), ((0, 4), 8)])
def test_every_engine_computes_the_equation(engine: str, epsilon: float, rows: tuple[int, int], width: int) -> None:
    feeds = feeds_of(rows, width)
    y, total = run(norm_model(width, epsilon), feeds, engine)
    np.testing.assert_array_equal(total, feeds["x"] + feeds["skip"])
    wide = total.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(epsilon)) * feeds["weight"]
    assert y.shape == wanted.shape == (*rows, width)
    assert (np.abs(y - wanted) <= 16 * ULP * np.abs(wanted)).all()


@pytest.mark.skipif("native" not in site_engines(), reason="no native library")
@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("x", (1, 2, 12), r"expected input 'x' of shape \[..., 16\]"),
        ("skip", (1, 3, 16), r"input 'skip' of shape \[1, 2, 16\]"),
        ("weight", (8,), r"input 'weight' of shape \[16\]"),
    ],
)
def test_other_shapes_are_refused_in_words(name: str, shape: tuple[int, ...], problem: str) -> None:
    feeds = feeds_of((1, 2), 16) | {name: np.ones(shape, np.float32)}
    with pytest.raises(Exception, match=rf"SkipRMSNorm node 'norm.0': .*{problem}"):
        run(norm_model(16), feeds, "native")


def test_a_negative_epsilon_is_refused() -> None:
    with pytest.raises(SplitQError, match="expected an epsilon of at least 0, got -1"):
        SkipRMSNormSpec(N=4, epsilon=-1.0)


@pytest.mark.skipif("native" not in site_engines(), reason="no native library")
def test_the_kernel_refuses_it_too() -> None:
    model = norm_model(16)
    model.graph.node[0].attribute[1].f = -1.0
    with pytest.raises(Exception, match=r"SkipRMSNorm node 'norm\.0': expected attribute 'epsilon' of at least 0"):
        run(model, feeds_of((1, 2), 16), "native")


def test_the_pass_writes_our_node_with_the_same_values() -> None:
    old = helper.make_node(
        "SkipSimplifiedLayerNormalization",
        ["x", "skip", "w"],
        ["y", "", "", "sum"],
        "norm.3",
        domain="com.microsoft",
        epsilon=0.5,
    )
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [old],
        "g",
        [info("x", TensorProto.FLOAT, [1, 2, 8]), info("skip", TensorProto.FLOAT, [1, 2, 8])],
        [info("y", TensorProto.FLOAT, None), info("sum", TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [8], np.ones(8))],
    )
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert skip_norms(model) == {SkipRMSNormSpec(N=8, epsilon=0.5)}
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == (DOMAIN, "SkipRMSNorm", "norm.3")
    assert [value.name for value in node.inputs] == ["x", "skip", "w"]
    assert list(model.graph.outputs) == list(node.outputs)
    assert [value.name for value in node.outputs] == ["y", "sum"]
