"""Every pattern that the HTP compiler rejects or gets wrong is named, with the remedy.

Where onnxruntime-qnn is installed, the same graphs go through its compiler, so that the rules stay true.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.qdq.static_graphs import StaticGraph
from splitq_edge.exporters.qdq.target_check import check_target, rejected
from splitq_edge.runtime_ops.packing import int4_bytes
from splitq_edge.targets import ARCHITECTURES, QNN_HTP, Target

V73 = Target(QNN_HTP, 73)
WITH_QNN = importlib.util.find_spec("onnxruntime_qnn") is not None
K, N, ROWS = 64, 32, 8


class Build:
    """A small QDQ graph with the input x [1, rows, K] and the output y."""

    def __init__(self, rows: int | str = ROWS) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.rows = rows
        self.rng = np.random.default_rng(0)

    def constant(self, array: np.ndarray, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op_type: str, inputs: list[str], name: str, **attributes: int) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def qdq(self, value: str, name: str, high: float = 5.0, bits: int = 16, *, positive: bool = False) -> str:
        scale = self.constant(np.float32((high if positive else 2 * high) / (2**bits - 1)), f"{name}.scale")
        middle = np.array(0 if positive else 2 ** (bits - 1), np.uint16 if bits == 16 else np.uint8)
        zero = self.constant(middle, f"{name}.zero")
        return self.op(
            "DequantizeLinear", [self.op("QuantizeLinear", [value, scale, zero], f"{name}.q"), scale, zero], name
        )

    def weight(self, *, bits: int = 4, block: int = 0, zero: bool = True, shape: tuple[int, int] = (K, N)) -> str:
        codes = self.rng.integers(-8, 8, shape).astype(np.int8)
        scale = (self.rng.random((shape[0] // block, shape[1]) if block else shape[1:]) * 0.01 + 0.005).astype(
            np.float32
        )
        inputs = [self.integers(codes, bits, "w.codes"), self.constant(scale, "w.scale")]
        if zero:
            inputs.append(self.integers(np.zeros(scale.shape, np.int8), bits, "w.zero"))
        settings = {"axis": 0, "block_size": block} if block else {"axis": 1}
        return self.op("DequantizeLinear", inputs, "w", **settings)

    def integers(self, codes: np.ndarray, bits: int, name: str) -> str:
        if bits == 8:
            return self.constant(codes, name)
        raw = int4_bytes(codes)
        self.initializers.append(TensorProto(name=name, data_type=TensorProto.INT4, dims=codes.shape, raw_data=raw))
        return name

    def model(self, shape: list[int | str]) -> onnx.ModelProto:
        self.nodes[-1].output[0] = "y"
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, self.rows, K])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def product(
    op_type: str = "MatMul", *, bits_in: int = 16, bits_out: int = 16, quantized: bool = True, **weight: int
) -> onnx.ModelProto:
    b = Build()
    x = b.qdq("x", "xq", bits=bits_in) if quantized else "x"
    shape: list[int | str] = [1, ROWS, N]
    if op_type == "Gemm":
        flat = b.constant(np.array([ROWS, K]), "flat")
        x, shape = b.op("Reshape", [x, flat], "x2"), [ROWS, N]
        x = b.qdq(x, "x2q", bits=bits_in)
    y = b.op(op_type, [x, b.weight(**weight)], "product")  # type: ignore[arg-type]
    if quantized:
        b.qdq(y, "yq", 8.0, bits_out)
    return b.model(shape)


def pointwise(op_type: str, *, rows: int | str = ROWS) -> onnx.ModelProto:
    b = Build(rows)
    b.qdq(b.op(op_type, [b.qdq("x", "xq")], "point"), "yq")
    return b.model([1, rows, K])


def gathered(high: float) -> onnx.ModelProto:
    b = Build()
    index = b.constant(np.arange(0, K, 2), "index")
    b.qdq(b.op("Gather", [b.qdq("x", "xq"), index], "picked", axis=2), "yq", high)
    return b.model([1, ROWS, K // 2])


def normed(op_type: str, *, scale: bool = True, bias: bool = True) -> onnx.ModelProto:
    b = Build()
    inputs = [b.qdq("x", "xq"), b.constant(np.ones(K, np.float32), "one")]
    if scale:
        inputs[1] = b.qdq("one", "oneq", positive=True)
    if op_type == "LayerNormalization" and bias:
        inputs.append(b.qdq(b.constant(np.zeros(K, np.float32), "none"), "noneq"))
    b.qdq(b.op(op_type, inputs, "norm", axis=-1), "yq")
    return b.model([1, ROWS, K])


# name: graph, what the check says of it; what the compiler itself says follows from the table below
REJECTED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "dynamic_shape": (
        lambda: pointwise("Sigmoid", rows="rows"),
        "input x: expected a static shape, .*--flavour qdq",
    ),
    "erf": (
        lambda: pointwise("Erf"),
        "Erf point: the compiler has no such op; export Gelu as one node",
    ),
    "weight_only_int4": (
        lambda: product(quantized=False),
        "MatMul product: integer weights with float activations; quantize",
    ),
    "blockwise_uint8": (
        lambda: product(bits_in=8, bits_out=8, block=32),
        "MatMul product: blockwise weights with 8-bit",
    ),
    "int4_without_zero_point": (
        lambda: product(zero=0),
        "DequantizeLinear w: INT4 without a zero point.*give a zero",
    ),
    "uint8_in_uint16_out": (
        lambda: product(bits_in=8),
        "MatMul product: 8-bit activations in, 16-bit out; give both",
    ),
    "gather_with_a_new_scale": (
        lambda: gathered(4.0),
        "Gather picked: another quantizer behind an op.*requantize",
    ),
    "rms_norm_with_float_scale": (
        lambda: normed("RMSNormalization", scale=False),
        "RMSNormalization norm: float scale beside a quantized input; quantize the scale",
    ),
    "layer_norm_without_bias": (
        lambda: normed("LayerNormalization", bias=False),
        "LayerNormalization norm: no bias beside a scale whose zero point.*; give",
    ),
}
TAKEN: dict[str, Callable[[], onnx.ModelProto]] = {
    "int4_uint16": product,
    "int8_uint16": lambda: product(bits=8),
    "int4_uint8": lambda: product(bits_in=8, bits_out=8),
    "gemm": lambda: product("Gemm"),
    "blockwise_gemm": lambda: product("Gemm", block=32),
    "blockwise_uint16": lambda: product(block=32),
    "gelu": lambda: pointwise("Gelu"),
    "gather_with_the_same_scale": lambda: gathered(5.0),
    "rms_norm": lambda: normed("RMSNormalization"),
    "layer_norm": lambda: normed("LayerNormalization"),
}


def found(model: onnx.ModelProto, target: Target = V73) -> list[str]:
    return [str(rejection) for rejection in rejected(ir.from_proto(model), target)]


@pytest.mark.parametrize("name", REJECTED)
def test_the_check_names_node_and_remedy(name: str) -> None:
    build, message = REJECTED[name]
    lines = found(build())
    assert lines
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(". ".join(lines))


@pytest.mark.parametrize("name", TAKEN)
def test_the_check_passes_what_the_compiler_takes(name: str) -> None:
    assert found(TAKEN[name]()) == []


def test_blockwise_weights_need_a_newer_processor() -> None:
    assert "blockwise weights need v69" in found(product(block=32), Target(QNN_HTP, 68))[0]


def test_a_node_of_our_domain_is_named_with_the_flavour() -> None:
    b = Build()
    b.nodes.append(helper.make_node("SplitQLinear", ["x"], ["y"], name="site", domain="ai.splitq"))
    model = b.model([1, ROWS, N])
    assert found(model) == [
        "SplitQLinear site: the compiler has no such op of domain ai.splitq; export with --flavour qdq"
    ]


def test_all_nodes_are_reported_in_one_error() -> None:
    graphs = {"a": StaticGraph(ir.from_proto(pointwise("Erf"))), "b": StaticGraph(ir.from_proto(gathered(4.0)))}
    with pytest.raises(SplitQError, match=r"qnn-htp:v73 rejects 2 nodes\. a: Erf point.*\. b: Gather picked"):
        check_target(graphs, V73)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_targets_are_read_by_name(arch: int) -> None:
    assert Target.parse(f"qnn-htp:v{arch}") == Target(QNN_HTP, arch)


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(SplitQError, match=r"expected one of qnn-htp:v73, .*, got 'qnn-htp:v12'"):
        Target.parse("qnn-htp:v12")


def on_htp(model: onnx.ModelProto, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The graph's output in the emulator and on the CPU."""
    from splitq_edge.runtime_ops.qnn import npu_session

    path = folder / "graph.onnx"
    onnx.save(model, path)
    x = np.random.default_rng(1).standard_normal((1, ROWS, K)).astype(np.float32)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    cpu = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return npu_session(path, V73).run(None, {"x": x})[0], cpu.run(None, {"x": x})[0]


def close(npu: np.ndarray, cpu: np.ndarray) -> bool:
    return float(np.abs(npu - cpu).max()) < 0.1 * float(np.abs(cpu).max())


@pytest.mark.skipif(not WITH_QNN, reason="needs onnxruntime-qnn")
@pytest.mark.parametrize("name", TAKEN)
def test_the_emulator_runs_what_the_check_passes(name: str, tmp_path: Path) -> None:
    assert close(*on_htp(TAKEN[name](), tmp_path))


@pytest.mark.skipif(not WITH_QNN, reason="needs onnxruntime-qnn")
@pytest.mark.parametrize("name", REJECTED)
def test_the_emulator_fails_on_what_the_check_rejects(name: str, tmp_path: Path) -> None:
    try:
        right = close(*on_htp(REJECTED[name][0](), tmp_path))
    except SplitQError:
        return
    assert not right
