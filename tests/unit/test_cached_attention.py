"""CachedAttention: native kernel and body against the equations in double, buffers, refusals, and the pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import site_engines
from onnx import TensorProto, helper

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import DOMAIN, VERSION, CachedAttentionSpec, make_node
from splitq_edge.exporters.passes.cache_attention import cache_attention
from splitq_edge.runtime_ops import library_path

MICROSOFT = "com.microsoft"
PLACES = 300
SPEC = CachedAttentionSpec(num_heads=6, kv_num_heads=2, head_size=16, scale=0.25)
KINDS = {
    "last_key": TensorProto.INT32,
    "total_length": TensorProto.INT32,
    "position_ids": TensorProto.INT64,
    "new_tokens": TensorProto.INT32,
}
CACHE = ("past_key", "past_value", "present_key", "present_value")
CACHE_TYPES = [np.float32, np.float16]
Arrays = dict[str, np.ndarray]


def attention_model(spec: CachedAttentionSpec, cache: type = np.float32) -> onnx.ModelProto:
    kinds = KINDS | dict.fromkeys(CACHE, helper.np_dtype_to_tensor_dtype(np.dtype(cache)))
    feeds = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in spec.inputs]
    outputs = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in spec.outputs]
    names = {name: name for name in spec.inputs}
    node = make_node(spec, names, {name: name for name in spec.outputs}, "attention")
    graph = helper.make_graph([node], "attention", feeds, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions_for([spec]), ir_version=10)


def session(spec: CachedAttentionSpec, engine: str, cache: type = np.float32) -> ort.InferenceSession:
    model = attention_model(spec, cache)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if engine == "native":
        options.register_custom_ops_library(str(library_path()))
        del model.functions[:]  # nothing but the kernel can run it
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `padding`: tokens of the first row that its mask hides."""

    batch: int
    tokens: int
    past: int
    padding: int = 0


def feeds_of(case: Case, spec: CachedAttentionSpec, seed: int = 0, cache: type = np.float32) -> Arrays:
    rng = np.random.default_rng(seed)
    total = case.past + case.tokens
    angles = np.outer(np.arange(PLACES), 100.0 ** (-np.arange(spec.head_size // 2) / (spec.head_size // 2)))
    mask = np.ones((case.batch, total), bool)
    mask[0, : case.padding] = False
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)[:, case.past :]
    past = (case.batch, spec.kv_num_heads, case.past, spec.head_size)
    bias = np.where(mask, 0.0, -1e30)[:, None, None].repeat(case.tokens, 2)
    return {
        "qkv": rng.standard_normal((case.batch, case.tokens, spec.channels)).astype(np.float32),
        "past_key": rng.standard_normal(past).astype(cache),
        "past_value": rng.standard_normal(past).astype(cache),
        "last_key": np.full(case.batch, total - 1, np.int32),
        "total_length": np.array(total, np.int32),
        "cosine": np.cos(angles).astype(np.float32),
        "sine": np.sin(angles).astype(np.float32),
        "position_ids": positions.astype(np.int64),
        "bias": np.ascontiguousarray(bias, np.float32),
        "new_tokens": np.full(case.batch, case.tokens, np.int32),
    }


def expected(feeds: Arrays, spec: CachedAttentionSpec) -> tuple[np.ndarray, ...]:
    """y, present_key and present_value in double precision: new tokens see each other unrounded."""
    batch, tokens, _ = feeds["qkv"].shape
    rows = feeds["qkv"].astype(np.float64).reshape(batch, tokens, -1, spec.head_size).transpose(0, 2, 1, 3)
    query, key, value = np.split(rows, [spec.num_heads, spec.num_heads + spec.kv_num_heads], 1)
    cosine, sine = (feeds[name].astype(np.float64)[feeds["position_ids"]][:, None] for name in ("cosine", "sine"))

    def turned(x: np.ndarray) -> np.ndarray:
        low, high = np.split(x, 2, -1)
        return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], -1)

    keys = np.concatenate([feeds["past_key"], turned(key)], 2)
    values = np.concatenate([feeds["past_value"], value], 2)
    group = spec.num_heads // spec.kv_num_heads
    scores = turned(query) @ keys.repeat(group, 1).transpose(0, 1, 3, 2) * spec.scale + feeds["bias"]
    total = keys.shape[2]
    future = np.arange(total)[None] > np.arange(total - tokens, total)[:, None]
    scores = np.where(future, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = (weights @ values.repeat(group, 1)).transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
    return y, keys, values


CASES = {
    "step": Case(1, 1, 37),
    "first token": Case(1, 1, 0),
    "steps of a batch": Case(3, 1, 64, padding=5),
    "a few tokens": Case(2, 5, 9, padding=3),
    "prompt": Case(1, 131, 0),
    "prompts with padding": Case(2, 70, 0, padding=11),
    "prompt behind a cache": Case(2, 33, 95, padding=7),
}


@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("engine", site_engines())
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 8), (9, 3, 64), (7, 1, 10)])
def test_every_engine_computes_the_equations(name: str, engine: str, heads: tuple[int, int, int], cache: type) -> None:
    if engine == "functions" and heads[2] % 16:
        pytest.skip("ONNX Runtime's own op takes heads of a multiple of 16 channels")
    spec = CachedAttentionSpec(num_heads=heads[0], kv_num_heads=heads[1], head_size=heads[2], scale=heads[2] ** -0.5)
    feeds = feeds_of(CASES[name], spec, cache=cache)
    got = session(spec, engine, cache).run(None, feeds)
    seen = feeds["bias"][:, 0, 0, -feeds["qkv"].shape[1] :] == 0  # what padding says is of no matter
    for tensor, right in zip(got, expected(feeds, spec), strict=True):
        assert tensor.shape == right.shape
        if tensor.ndim == 3:
            np.testing.assert_allclose(tensor[seen], right[seen], rtol=2e-5, atol=2e-6)
        else:
            assert tensor.dtype == cache
            rounding = 1e-5 if cache == np.float32 else 2.0**-11  # half of float16's last place
            np.testing.assert_allclose(tensor.astype(np.float64), right, rtol=1.01 * rounding, atol=1e-6)


@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("engine", site_engines())
@pytest.mark.parametrize("tokens", [1, 40])
def test_one_buffer_for_past_and_present(engine: str, tokens: int, cache: type) -> None:
    feeds = feeds_of(Case(2, tokens, 20), SPEC, cache=cache)
    y, keys, values = session(SPEC, engine, cache).run(None, feeds)
    binding = (opened := session(SPEC, engine, cache)).io_binding()
    binding.bind_output("y")
    buffers = {}
    for name in ("key", "value"):
        whole = np.full((2, SPEC.kv_num_heads, 100, SPEC.head_size), np.nan, cache)
        whole[:, :, :20] = feeds[f"past_{name}"]
        buffers[name] = ort.OrtValue.ortvalue_from_numpy(whole)
        binding.bind_ortvalue_input(f"past_{name}", buffers[name])
        binding.bind_ortvalue_output(f"present_{name}", buffers[name])
    for name, value in feeds.items():
        if not name.startswith("past_"):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    opened.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), y)
    for name, right in (("key", keys), ("value", values)):
        whole = buffers[name].numpy()
        np.testing.assert_array_equal(whole[:, :, : 20 + tokens], right)
        if engine == "native" or cache == np.float32:  # ONNX Runtime narrows a whole buffer
            assert np.isnan(whole[:, :, 20 + tokens :]).all()  # nothing behind the tokens is touched


@pytest.mark.parametrize("engine", site_engines())
def test_what_float16_cannot_hold(engine: str) -> None:
    feeds = feeds_of(Case(1, 3, 4), SPEC, cache=np.float16)
    value = feeds["qkv"].reshape(1, 3, -1, SPEC.head_size)[:, :, -SPEC.kv_num_heads :]
    numbers = [1e-3, 6e-5, 3e-6, 2.0**-25, 1.5 * 2.0**-25, 1e-30, 0.0, -0.0, 65504.0, 65519.9, 65520.0, -1e9]
    value.reshape(3, 2, -1)[:, :, : len(numbers)] = numbers
    _, _, values = session(SPEC, engine, np.float16).run(None, feeds)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(values[0, :, -3:].transpose(1, 0, 2), value[0].astype(np.float16))


def broken(**changes: np.ndarray) -> Arrays:
    return {**feeds_of(Case(1, 2, 3), SPEC), **changes}


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        (broken(qkv=np.zeros((1, 2, 7), np.float32)), "qkv"),
        (broken(qkv=np.zeros((1, 1, 2, SPEC.channels), np.float32)), "qkv"),
        (broken(past_key=np.zeros((1, 2, 16), np.float32)), "past_key"),
        (broken(past_value=np.zeros((1, 2, 4, 16), np.float32)), "past_value"),
        (broken(total_length=np.array(6, np.int32)), "total_length"),
        (broken(total_length=np.array(1, np.int32)), "total_length"),
        (broken(total_length=np.array([5, 5], np.int32)), "total_length"),
        (broken(last_key=np.array([3], np.int32)), "last_key"),
        (broken(new_tokens=np.array([1], np.int32)), "new_tokens"),
        (broken(position_ids=np.array([[3, PLACES]])), "position_ids"),
        (broken(position_ids=np.array([[-1, 4]])), "position_ids"),
        (broken(sine=np.zeros((PLACES, 7), np.float32)), "sine"),
        (broken(bias=np.zeros((1, 1, 2, 4), np.float32)), "bias"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(feeds: Arrays, words: str) -> None:
    if "native" not in site_engines():
        pytest.skip("needs the native library")
    with pytest.raises(Exception, match=f"CachedAttention node 'attention': expected .*{words}"):
        session(SPEC, "native").run(None, feeds)


@pytest.mark.parametrize("attribute", ["num_heads", "head_size", "scale"])
def test_attributes_that_do_not_fit_are_refused(attribute: str) -> None:
    if "native" not in site_engines():
        pytest.skip("needs the native library")
    model = attention_model(SPEC)
    del model.functions[:]
    (node,) = model.graph.node
    for found in node.attribute:
        if found.name == attribute:
            found.CopyFrom(helper.make_attribute(attribute, float("nan") if attribute == "scale" else 5))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    with pytest.raises(Exception, match=attribute):
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("changes", [{"num_heads": 5}, {"head_size": 15}, {"kv_num_heads": 0}])
def test_a_spec_that_cannot_be_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(SplitQError, match="CachedAttention"):
        replace(SPEC, **changes)


def grouped(dtype: ir.DataType = ir.DataType.FLOAT, *, packed: bool = True) -> ir.Model:
    """A graph of one `GroupQueryAttention` as `fuse_attention` and `pack_attention` leave it."""
    kinds = {name: dtype for name in ("past_key", "past_value")}
    values = {
        name: ir.Value(
            name=name,
            shape=ir.Shape([1, 2, SPEC.channels]) if name == "qkv" else None,
            type=ir.TensorType(kinds.get(name, ir.DataType.FLOAT)),
        )
        for name in (*SPEC.inputs, "k", "v")
    }
    first, *rest, last = (values[name] for name in SPEC.inputs)
    pieces = [None, None] if packed else [values["k"], values["v"]]
    node = ir.node(
        "GroupQueryAttention",
        [first, *pieces, *rest, *[None] * 5, last],
        attributes={"num_heads": 6, "kv_num_heads": 2, "scale": 0.25, "do_rotary": 1},
        domain=MICROSOFT,
        num_outputs=3,
        name="attention",
    )
    for value, name in zip(node.outputs, SPEC.outputs, strict=True):
        value.name = name
    graph = ir.Graph(list(values.values()), node.outputs, nodes=[node], opset_imports={"": 21, MICROSOFT: 1})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_the_pass_writes_our_node(dtype: ir.DataType) -> None:
    model = grouped(dtype)
    assert cache_attention(model) == {SPEC}
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == (DOMAIN, "CachedAttention", "attention")
    assert tuple(value.name for value in node.inputs) == SPEC.inputs
    assert tuple(value.name for value in model.graph.outputs) == SPEC.outputs


@pytest.mark.parametrize("model", [grouped(ir.DataType.INT8), grouped(packed=False)])
def test_what_our_kernel_cannot_stays(model: ir.Model) -> None:
    assert cache_attention(model) == set()
    (node,) = model.graph
    assert node.domain == MICROSOFT
