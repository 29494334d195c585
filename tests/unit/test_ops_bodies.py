"""Function bodies, in onnx.reference and in ONNX Runtime, native kernels and Python ops give what the oracle gives."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import oracle
import pytest
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from op_models import Case, OpModel, build

from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import (
    ChannelSplitQuantizeSpec,
    CrossModalCorrectionSpec,
    Spec,
    SplitQLinearSpec,
)
from splitq_edge.runtime_ops import library_path

EPS = float(np.finfo(np.float32).eps)
ALL, NONE = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL

PARTS = ("codes", "scale")

Engine = Callable[[onnx.ModelProto, dict[str, np.ndarray]], list[np.ndarray]]


def run_reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, feeds)


def run_oracle(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model, new_ops=oracle.OPS).run(None, feeds)


def session_options(level: ort.GraphOptimizationLevel = ALL) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    return options


def run_session(model: onnx.ModelProto, feeds: dict, options: ort.SessionOptions) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_native(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    path = library_path()
    assert path is not None, "SPLITQ_EXPECT_NATIVE=1, but library_path() found no native library"
    options = session_options()
    options.register_custom_ops_library(str(path))
    return run_session(model, feeds, options)


def run_python(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    from splitq_edge.exporters.python_nodes import rewrite
    from splitq_edge.runtime_ops.python_session import PythonSession

    graph, nodes = rewrite(onnx.ModelProto.FromString(model.SerializeToString()), Path())
    return PythonSession(graph, nodes, Path(), threads=1).run(None, feeds)


BODIES: dict[str, Engine] = {
    "reference": run_reference,
    "ort": lambda model, feeds: run_session(model, feeds, session_options()),
    "ort_unoptimized": lambda model, feeds: run_session(model, feeds, session_options(NONE)),
}
WITH_PYTHON = importlib.util.find_spec("onnxruntime_extensions") is not None
WITH_NATIVE = os.environ.get("SPLITQ_EXPECT_NATIVE") == "1" or library_path() is not None
ENGINES = BODIES | ({"native": run_native} if WITH_NATIVE else {}) | ({"python": run_python} if WITH_PYTHON else {})

COMMON_AXES = {
    "activation_bits": [2, 3, 4, 6, 8],
    "outlier_activation_bits": [8, 8, 4],
    "activation_symmetric": [True, False],
    "residual_bits": [8, 8, 4, 3, 2],
    "K_m": [32, 40, 96, 160],
    "K_t": [0, 16, 24],
    "K_v": [0, 16, 7],
    "channel_order": [False, True],
    "channel_scale": [False, True],
    "transform_main": [False, True],
    "transform_text": [False, True],
    "transform_vision": [False, True],
    "activation_clip": [False, True],
}
RANK_AXES = {
    "ranks": [(0, 0), (4, 0), (0, 4), (4, 4), (4, 9), (8, 3)],
    "mac_rows": ["text", "all"],
    "N": [1, 7, 33, 48],
    "packed": [False, True],
}
LINEAR_AXES = {
    **COMMON_AXES,
    **RANK_AXES,
    "bits": [2, 3, 4, 6, 8],
    "block_size": [0, 32, 64, 128],
    "outlier_bits": [4, 4, 2, 3, 8],
    "correction_bits": [4, 4, 2, 3, 8],
    "bias": [False, True],
    "joined": [False, True],
}
FEED_AXES = {
    "leading": [(1, 1), (2, 3), (5,), (2, 1, 3), (0,), (2, 0)],
    "modality": ["text", "vision", "mixed"],
}


def sample(axes: dict[str, list], count: int, seed: int) -> list[dict]:
    """`count` points of the full product; each axis goes through all its values evenly, in shuffled order."""
    rng = np.random.default_rng(seed)
    columns = []
    for values in axes.values():
        indices = np.concatenate([rng.permutation(len(values)) for _ in range(-(-count // len(values)))])
        columns.append([values[i] for i in rng.permutation(indices[:count])])
    return [dict(zip(axes, point, strict=True)) for point in zip(*columns, strict=True)]


def case_of(spec_class: type[Spec], point: dict, exact: bool = True) -> Case:
    """The case at a point of the grid."""
    values = dict(point)
    feed = {name: values.pop(name) for name in (*FEED_AXES, "joined", "blocks") if name in values}
    if "K_m" in values:
        values["group_widths"] = tuple(values.pop(name) for name in ("K_m", "K_t", "K_v"))
        values["K"] = sum(values["group_widths"])
        wanted = [values.pop(f"transform_{group}") for group in ("main", "text", "vision")]
        present = zip(wanted, values["group_widths"], strict=True)
        values["transforms"] = tuple(transform and width > 0 for transform, width in present)
        values["activation_symmetric"] |= values["activation_bits"] == 8
    if "ranks" in values:
        values["cws_rank"], values["mac_rank"] = values.pop("ranks")
    return Case(spec_class(**values), exact=exact, **feed)


LINEAR_CASES = [case_of(SplitQLinearSpec, point) for point in sample({**LINEAR_AXES, **FEED_AXES}, 144, seed=1)]
# P1 with several blocks.
BLOCKS = {"K_m": [96, 160, 576, 768], "transform_main": [True], "blocks": [2, 2, 4, 8]}
LINEAR_CASES += [
    case_of(SplitQLinearSpec, point) for point in sample({**LINEAR_AXES, **FEED_AXES, **BLOCKS}, 24, seed=5)
]
SPLIT_AXES = {**COMMON_AXES, "residual": [True, False], **FEED_AXES}
# Symmetric only: how far an asymmetric code may move depends on its zero point too.
FLOAT_AXES = {**SPLIT_AXES, "activation_symmetric": [True], "residual": [False]}
SPLIT_CASES = [case_of(ChannelSplitQuantizeSpec, point) for point in sample(SPLIT_AXES, 48, seed=2)]
SPLIT_CASES += [case_of(ChannelSplitQuantizeSpec, point) for point in sample({**SPLIT_AXES, **BLOCKS}, 16, seed=6)]
FLOAT_CASES = [case_of(ChannelSplitQuantizeSpec, point, exact=False) for point in sample(FLOAT_AXES, 36, seed=3)]
CORRECTION_AXES = {
    **RANK_AXES,
    "ranks": RANK_AXES["ranks"][1:],
    "K": [32, 40, 96, 160],
    "bits": [2, 3, 4, 6, 8],
    **FEED_AXES,
}
CORRECTION_CASES = [case_of(CrossModalCorrectionSpec, point) for point in sample(CORRECTION_AXES, 40, seed=4)]


def op_model(case: Case) -> OpModel:
    return build(case, np.random.default_rng(sum(str(case).encode())))


def check_file(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_equals_oracle(case: Case) -> None:
    built = op_model(case)
    check_file(built.model)
    terms = oracle.linear_terms(built.inputs, case.spec.attributes)
    expected = oracle.sum_terms(terms).reshape(*case.leading, case.spec.N)
    # Integers are exact, so what differs is the order of two products and of the sum: a few eps a term.
    magnitude = sum(np.abs(term) for term in terms).reshape(expected.shape)
    bound = (len(terms) + 4) * EPS * magnitude
    for name, engine in ENGINES.items():
        (y,) = engine(built.model, built.feeds)
        assert y.shape == expected.shape, name
        assert (np.abs(y - expected) <= bound).all(), f"{name}: off by {np.abs(y - expected).max()}"


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_split_quantize_equals_oracle_exactly(case: Case) -> None:
    built = op_model(case)
    check_file(built.model)
    expected = run_oracle(built.model, built.feeds)
    for name, engine in ENGINES.items():
        outputs = engine(built.model, built.feeds)
        for output, got, want in zip(case.spec.present_outputs, outputs, expected, strict=True):
            assert got.dtype == want.dtype, f"{name} {output}"
            np.testing.assert_array_equal(got, want, err_msg=f"{name} {output}")


@pytest.mark.parametrize("case", CORRECTION_CASES, ids=str)
def test_correction_equals_oracle(case: Case) -> None:
    built = op_model(case)
    check_file(built.model)
    (expected,) = run_oracle(built.model, built.feeds)
    for name, engine in ENGINES.items():
        (correction,) = engine(built.model, built.feeds)
        assert correction.shape == expected.shape, name
        difference = np.abs(correction - expected)
        assert (difference <= 4 * EPS * np.abs(expected)).all(), f"{name}: off by {difference.max()}"


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_split_quantize_of_any_floats_differs_at_rounding_boundaries_only(case: Case) -> None:
    built = op_model(case)
    spec = case.spec
    names = ["channel_order", "channel_scale"]
    names += [f"{p}_{group}" for group in ("main", "text", "vision") for p in ("p1", "p2")]
    order, scale, *factors = [built.inputs.get(name) for name in names]
    rows = built.inputs["x"].reshape(-1, spec.K)
    groups = oracle.transformed_groups(rows, spec.group_widths, order, scale, factors)
    magnitudes = oracle.transformed_groups(
        np.abs(rows),
        spec.group_widths,
        order,
        scale,
        [None if factor is None else np.abs(factor) for factor in factors],
    )
    expected = dict(zip(spec.present_outputs, run_oracle(built.model, built.feeds), strict=True))
    for name, engine in ENGINES.items():
        outputs = dict(zip(spec.present_outputs, engine(built.model, built.feeds), strict=True))
        for group in spec.groups:
            index = oracle.GROUPS.index(group)
            # Two dot products of a and b terms, at most the width together, each operation within eps / 2.
            error = spec.group_widths[index] * EPS * magnitudes[index] if spec.transforms[index] else 0.0
            got, want = ([values[f"{group}_{part}"] for part in PARTS] for values in (outputs, expected))
            check_codes(got, want, groups[index], error, f"{name} {group}")


def check_codes(
    got: list[np.ndarray], want: list[np.ndarray], a: np.ndarray, error: np.ndarray | float, where: str
) -> None:
    """Codes and scales of two implementations that see activations `error` apart.

    Args:
        got: codes [..., width] int8 and scale [..., 1] float32 to check.
        want: those of the oracle.
        a: [T, width] transformed activations of the oracle.
        error: [T, width] bound of the difference of activations.
        where: for the message.
    """
    width = a.shape[1]
    got_codes, want_codes = (codes.reshape(-1, width).astype(int) for codes, _ in (got, want))
    got_scale, want_scale = (scale.reshape(-1, 1).astype(np.float64) for _, scale in (got, want))
    largest = np.abs(a).max(axis=1, keepdims=True).astype(np.float64)
    worst = np.broadcast_to(error, a.shape).max(axis=1, keepdims=True)
    relative = 4 * EPS + worst / np.maximum(largest, 1e-30)
    assert (np.abs(got_scale - want_scale) <= relative * want_scale).all(), where
    steps = a / want_scale
    moved = np.abs(steps) * relative + error / want_scale + 4 * EPS * np.abs(steps)
    boundary = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
    assert ((boundary <= moved) | (got_codes == want_codes)).all(), where
    assert np.abs(got_codes - want_codes).max(initial=0) <= 1, where


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_weights_are_unpacked_at_load_not_at_run_time(bits: int, packed: bool, tmp_path) -> None:
    spec = SplitQLinearSpec(
        K=72,
        N=33,
        group_widths=(40, 16, 16),
        bits=bits,
        activation_bits=8,
        outlier_bits=bits,
        correction_bits=bits,
        cws_rank=4,
        mac_rank=5,
        packed=packed,
    )
    built = op_model(Case(spec))
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    run_session(built.model, built.feeds, options)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    matmul = [node for node in optimized.graph.node if node.op_type == "MatMulInteger"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in optimized.graph.initializer}
    main, outliers, u, v = (40, 33), (16, 33), (40, 5), (5, 33)
    assert sorted(shapes[node.input[1]] for node in matmul) == sorted([main, outliers, outliers, u, u, v])
    unpacking = {"Slice", "Reshape", "Transpose", "Gather", "BitShift", "BitwiseOr", "Concat", "Pad"}
    assert not unpacking & {node.op_type for node in optimized.graph.node}


def poisoned(model: onnx.ModelProto, op_type: str, offset: float = 1000.0) -> onnx.ModelProto:
    """The model with a body that is off by `offset`."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    body = next(function for function in model.functions if function.name == op_type)
    last = next(node for node in body.node if body.output[0] in node.output)
    last.output[0] = "right"
    poison = helper.make_node("Constant", [], ["poison"], value=numpy_helper.from_array(np.float32(offset)))
    body.node.extend([poison, helper.make_node("Add", ["right", "poison"], [body.output[0]])])
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", [ALL, NONE], ids=["optimized", "unoptimized"])
@pytest.mark.parametrize("native", [False, True] if WITH_NATIVE else [False])
@pytest.mark.parametrize(
    "spec_class",
    [SplitQLinearSpec, CrossModalCorrectionSpec],
    ids=["SplitQLinear", "CrossModalCorrection"],
)
def test_body_is_taken_only_without_native_kernel(spec_class, native: bool, level, packed: bool) -> None:
    sizes = {"N": 33, "cws_rank": 4, "mac_rank": 4, "packed": packed}
    if spec_class is SplitQLinearSpec:
        spec = SplitQLinearSpec(K=72, group_widths=(40, 16, 16), bits=4, activation_bits=8, bias=True, **sizes)
    else:
        spec = CrossModalCorrectionSpec(K=40, **sizes)
    built = op_model(Case(spec))
    options = session_options(level)
    if native:
        options.register_custom_ops_library(str(library_path()))
    (y,) = run_session(poisoned(built.model, spec.op_type), built.feeds, options)
    (right,) = run_oracle(built.model, built.feeds)
    scale = 1 + np.abs(right).max()
    np.testing.assert_allclose(y, right if native else right + 1000, rtol=0, atol=1e-4 * (1000 + scale))


@pytest.mark.parametrize("packed", [False, True])
def test_one_file_holds_several_variants(packed: bool) -> None:
    shapes = {"K": 72, "N": 33, "group_widths": (40, 16, 16), "activation_bits": 8, "packed": packed}
    specs = [
        SplitQLinearSpec(**shapes, bits=4, cws_rank=4, mac_rank=4),
        SplitQLinearSpec(**shapes, bits=4, cws_rank=4, mac_rank=4, bias=True, channel_order=True),
        SplitQLinearSpec(**shapes, bits=8, outlier_bits=8, cws_rank=4),
    ]
    nodes, initializers, expected, feeds = [], [], [], {}
    for index, spec in enumerate(specs):
        built = op_model(Case(spec))
        feeds = feeds or built.feeds
        inputs = {name: name if name in feeds else f"{name}{index}" for name in built.inputs}
        for tensor in built.model.graph.initializer:
            tensor.name = inputs[tensor.name]
        initializers += built.model.graph.initializer
        node = built.model.graph.node[0]
        node.input[:] = [inputs.get(name, "") for name in node.input]
        node.output[:] = [f"y{index}"]
        node.name = f"node{index}"
        nodes.append(node)
        expected.append(oracle.linear({**built.inputs, **feeds}, spec.attributes))
    graph = helper.make_graph(
        nodes,
        "variants",
        op_model(Case(specs[0])).model.graph.input,
        [helper.make_tensor_value_info(f"y{index}", onnx.TensorProto.FLOAT, [None, None, 33]) for index in range(3)],
        initializers,
    )
    functions = functions_for(itertools.chain(specs, specs))
    model = helper.make_model(graph, opset_imports=built.model.opset_import, functions=functions, ir_version=10)
    check_file(model)
    names = [function.name for function in functions]
    assert names.count("SplitQLinear") == 3
    assert sum(name.startswith("ChannelSplitQuantize") for name in names) == 3
    assert sum(name.startswith("CrossModalCorrection") for name in names) == 2
    # onnx.reference does not tell overloads apart: it needs the functions inlined.
    inlined = inline_local_functions(model)
    for name, engine in ENGINES.items():
        outputs = engine(inlined if name == "reference" else model, feeds)
        for got, want in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=name)
