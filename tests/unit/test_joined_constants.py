"""The tensor that holds the short constants of a node: there and back, and what the native kernel refuses."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from op_models import Case, build

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.joined_constants import (
    PLACE_MULTIPLE,
    is_weight,
    join_constants,
    joined_size,
    places,
    take_apart,
)
from splitq_edge.exporters.nodes import SplitQLinearSpec
from splitq_edge.runtime_ops import library_path

SPEC = SplitQLinearSpec(
    K=72,
    N=33,
    group_widths=(40, 16, 16),
    bits=4,
    activation_bits=8,
    block_size=16,
    cws_rank=4,
    mac_rank=8,
    channel_order=True,
    channel_scale=True,
    transforms=(True, True, False),
    activation_clip=True,
    bias=True,
    packed=True,
)


def arrays() -> dict[str, np.ndarray]:
    built = build(Case(SPEC), np.random.default_rng(0))
    return {name: value for name, value in built.inputs.items() if name not in built.feeds and not is_weight(name)}


def test_arrays_come_back_as_they_went_in() -> None:
    wanted = arrays()
    spec, tensor = join_constants(SPEC, wanted)
    assert tensor.dtype == np.float32
    assert tensor.shape == (joined_size(spec.constant_sizes),)
    assert all(start % PLACE_MULTIPLE == 0 for _, start, _ in places(spec.constant_sizes))
    found = take_apart(tensor, spec.constant_sizes, spec.group_widths, spec.block_size, spec.N)
    assert list(found) == [name for name in SPEC.present_inputs if name in wanted]
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_the_node_has_them_nowhere_else() -> None:
    spec, _ = join_constants(SPEC, arrays())
    weights = ("weight_main", "weight_text", "weight_vision", "u", "v")
    assert spec.present_inputs == ("x", "modality", *weights, "constants")
    assert spec.meaning_inputs == SPEC.present_inputs
    assert spec.overload == SPEC.overload + "_joined.5.4.0"


@pytest.mark.parametrize("change", [lambda sizes: sizes[:-1], lambda sizes: (1, *sizes[1:]), lambda sizes: (0,) * 24])
def test_sizes_that_the_spec_does_not_have_are_refused(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    from dataclasses import replace

    spec, _ = join_constants(SPEC, arrays())
    with pytest.raises(SplitQError, match=r"constant_sizes of 24 inputs, above 0 for channel_order, .* bias, got"):
        replace(spec, constant_sizes=change(spec.constant_sizes))


def joined_model() -> onnx.ModelProto:
    return build(Case(SPEC, joined=True), np.random.default_rng(0)).model


def resize(name: str, change: int) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        sizes = next(a for a in model.graph.node[0].attribute if a.name == "constant_sizes")
        sizes.ints[SPEC.inputs.index(name)] += change

    return apply


def retyped(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "constants")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(1, -1), "constants"))


def cut(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "constants")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:-17], "constants"))


def with_order(value: float) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "constants")
        numbers = numpy_helper.to_array(tensor).copy()
        numbers[3] = value
        tensor.CopyFrom(numpy_helper.from_array(numbers, "constants"))

    return apply


def without_sizes(model: onnx.ModelProto) -> None:
    node = model.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name != "constant_sizes"]
    del node.attribute[:]
    node.attribute.extend(kept)


def fewer_sizes(model: onnx.ModelProto) -> None:
    without_sizes(model)
    model.graph.node[0].attribute.append(helper.make_attribute("constant_sizes", [1, 2]))


def twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(33, np.float32), "more"))
    model.graph.node[0].input[SPEC.inputs.index("bias")] = "more"


def computed(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[-1] = "twin"
    model.graph.node.insert(0, helper.make_node("Flatten", ["x"], ["twin"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (resize("bias", 1), "33 numbers of 'bias' in the constants, got 34"),
        (
            resize("bias", 1000),
            "'constant_sizes' with what input 'constants' of .* numbers can hold .*, got 1033 for 'bias'",
        ),
        (resize("bias", -34), "'constant_sizes' with what .*, got -1 for 'bias'"),
        (resize("x", 1), "'constant_sizes' with what .*, got 1 for 'x'"),
        (resize("modality", 1), "'constant_sizes' with what .*, got 1 for 'modality'"),
        (resize("weight_main", 1), "'constant_sizes' with what .*, got 1 for 'weight_main'"),
        (resize("p1_main", 2**62), "'constant_sizes' with what .* for 'p1_main'"),
        (resize("p1_main", 1), "5 rows of 'p1_main' in the constants, got 26 numbers"),
        (resize("p1_main", 5), r"\[B \* a, a\] and \[b, b\] with B \* a \* b = K_m = 40, got \[5, 6\] and "),
        (resize("p2_main", -1), "a square number of 'p2_main' in the constants, got 63"),
        (resize("channel_order", -1), "72 numbers of 'channel_order' in the constants, got 71"),
        (resize("gate_mac", 1), "8 numbers of 'gate_mac' in the constants, got 9"),
        (resize("scale_main", 1), "99 numbers of 'scale_main' in the constants, got 100"),
        (resize("u_scale", -8), "input 'u_scale'"),
        (cut, "'constant_sizes' with what .* for 'bias'"),
        (retyped, "input 'constants' of type float32 and one axis"),
        (with_order(0.5), "channel_order to be a permutation"),
        (with_order(-1.0), "channel_order to be a permutation"),
        (with_order(1e30), "channel_order to be a permutation"),
        (with_order(float("nan")), "channel_order to be a permutation"),
        (without_sizes, "ints attribute 'constant_sizes', got none"),
        (fewer_sizes, "attribute 'constant_sizes' of 24 numbers, got 2"),
        (twice, "'constant_sizes' with what .* no input has of its own, got 33 for 'bias'"),
        (computed, "input 'constants' to be a constant initializer"),
    ],
)
def test_the_native_kernel_refuses(change: Callable[[onnx.ModelProto], None], words: str) -> None:
    if os.environ.get("SPLITQ_EXPECT_NATIVE") != "1" and library_path() is None:
        pytest.skip("needs the native library")
    model = joined_model()
    del model.functions[:]
    change(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    with pytest.raises(Exception, match=f"SplitQLinear node 'node': expected .*{words}"):
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
