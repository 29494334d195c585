"""Random models of one `ai.splitq` node, for the tests of bodies and kernels.

In an *exact* model every transformed activation is exact in float32 whatever the order of summation: x is
whole numbers, channel scales are powers of two, transforms are signed permutations or Hadamard matrices.
So every implementation must give the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.joined_constants import is_weight, join_constants
from splitq_edge.exporters.nodes import (
    DOMAIN,
    ChannelSplitQuantizeSpec,
    CrossModalCorrectionSpec,
    Spec,
    SplitQLinearSpec,
    make_node,
    weight_initializer,
)

GROUPS = ("main", "text", "vision")
F32 = np.float32


@dataclass(frozen=True)
class Case:
    """One random model.

    Attributes:
        spec: the node.
        leading: leading axes of x.
        modality: "text", "vision" or "mixed" rows.
        exact: whether transformed activations are exact, see above.
        joined: whether all constants but the weights of a SplitQLinear lie in one tensor.
        blocks: matrices in p1_main.
    """

    spec: Spec
    leading: tuple[int, ...] = (2, 3)
    modality: str = "mixed"
    exact: bool = True
    joined: bool = False
    blocks: int = 1

    def __str__(self) -> str:
        joined = "_joined" if self.joined else ""
        joined += f"_blocks{self.blocks}" if self.blocks > 1 else ""
        return f"{self.spec.overload}{joined}_x{'.'.join(map(str, self.leading))}_{self.modality}"


@dataclass
class OpModel:
    """A model of one node, feeds for it, and all inputs of the node as stored, by the contract's names."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]


def build(case: Case, rng: np.random.Generator) -> OpModel:
    """A random model of the case; activations and modality are graph inputs, the rest initializers."""
    if isinstance(case.spec, CrossModalCorrectionSpec):
        feeds, initializers = _correction_inputs(case, case.spec, rng)
    else:
        feeds, initializers = _split_inputs(case, case.spec, rng)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in initializers}
    spec = case.spec
    if case.joined:
        assert isinstance(spec, SplitQLinearSpec)
        weights = [tensor for tensor in initializers if is_weight(tensor.name)]
        spec, constants = join_constants(spec, {k: v for k, v in stored.items() if not is_weight(k)})
        initializers = [*weights, numpy_helper.from_array(constants, "constants")]
    node = make_node(
        spec,
        {name: name for name in spec.present_inputs},
        {name: name for name in spec.present_outputs},
        "node",
    )
    leading = [f"axis{i}" for i in range(len(case.leading))]
    graph = helper.make_graph(
        [node],
        case.spec.op_type,
        [_value_info(name, feed.dtype, leading, feed.shape[len(leading) :]) for name, feed in feeds.items()],
        [_output_info(case.spec, name, leading) for name in case.spec.present_outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    functions = functions_for([spec])
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return OpModel(model, feeds, {**feeds, **stored})


def _split_inputs(
    case: Case, spec: SplitQLinearSpec | ChannelSplitQuantizeSpec, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[TensorProto]]:
    """Feeds and initializers of a node that starts from x."""
    feeds = {"x": _activations(case, (*case.leading, spec.K), rng)}
    if "modality" in spec.present_inputs:
        feeds["modality"] = _modality(case, rng)
    initializers = []
    for name in spec.present_inputs:
        if name in feeds:
            continue
        if name.startswith("weight_") or name in ("u", "v"):
            initializers.append(_linear_weight(spec, name, rng))
        else:
            initializers.append(numpy_helper.from_array(_float_input(case, spec, name, rng), name))
    return feeds, initializers


def _activations(case: Case, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Rows of different magnitude, a tenth of them zero."""
    if not case.exact:
        return (rng.standard_normal(shape) * np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))).astype(F32)
    limits = rng.choice([0, 1, 7, 60, 127, 127, 127, 127, 127, 127], (*shape[:-1], 1))
    return np.rint(rng.uniform(-1, 1, shape) * limits).astype(F32)


def _modality(case: Case, rng: np.random.Generator) -> np.ndarray:
    """0 for text, any other number for vision."""
    choices = {"text": [0], "vision": [1, 2, -1], "mixed": [0, 0, 1, -1]}[case.modality]
    return rng.choice(choices, case.leading).astype(np.int8)


def _linear_weight(spec: SplitQLinearSpec, name: str, rng: np.random.Generator) -> TensorProto:
    widths = dict(zip(GROUPS, spec.group_widths, strict=True))
    rank, bits = max(spec.cws_rank, spec.mac_rank), spec.correction_bits
    shapes = {"u": (widths["main"], rank), "v": (rank, spec.N)}
    if name.startswith("weight_"):
        group = name.removeprefix("weight_")
        shapes[name] = (widths[group], spec.N)
        bits = spec.bits if group == "main" else spec.outlier_bits
    block_size = spec.block_size if name == "weight_main" else 0
    return weight_initializer(name, _codes(shapes[name], bits, rng), bits, spec.packed, block_size)


def _codes(shape: tuple[int, ...], bits: int, rng: np.random.Generator) -> np.ndarray:
    """Codes of the whole range; the extremes occur even in small tensors."""
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    extremes = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1], np.int8)
    count = min(2, q.size)
    q.reshape(-1)[rng.choice(q.size, count, replace=False)] = extremes[:count]
    return q


def _float_input(
    case: Case, spec: SplitQLinearSpec | ChannelSplitQuantizeSpec, name: str, rng: np.random.Generator
) -> np.ndarray:
    if name.startswith(("p1_", "p2_")):
        blocks = case.blocks if name[3:] == "main" else 1
        a, b = _kron_sizes(spec.group_widths[GROUPS.index(name[3:])] // blocks)
        if name.startswith("p2_"):
            return _factor(b, case.exact, rng)
        return np.concatenate([_factor(a, case.exact, rng) for _ in range(blocks)])
    if name == "channel_order":
        return rng.permutation(spec.K).astype(np.int32)
    if name == "channel_scale":
        return 2.0 ** rng.integers(-2, 3, spec.K).astype(F32) if case.exact else _around_one(spec.K, rng)
    if name == "activation_clip":
        return rng.uniform(0.6, 1, 3).astype(F32)
    return _linear_float_input(spec, name, rng)


def _linear_float_input(spec: SplitQLinearSpec, name: str, rng: np.random.Generator) -> np.ndarray:
    """Gates and bias of either sign, weight scales such that every term of y is of similar magnitude."""
    if name.startswith("gate_"):
        return rng.standard_normal(getattr(spec, f"{name[5:]}_rank")).astype(F32)
    if name == "bias":
        return rng.standard_normal(spec.N).astype(F32)
    if name == "u_scale":
        return _around_one(max(spec.cws_rank, spec.mac_rank), rng) / F32(16)
    blocks = -(-spec.group_widths[0] // spec.block_size) if spec.block_size else 1
    shape = (blocks, spec.N) if name == "scale_main" and spec.block_size else (spec.N,)
    return _around_one(shape, rng) / F32(64)


def _around_one(shape: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.5, 2, shape).astype(F32)


def _kron_sizes(width: int) -> tuple[int, int]:
    """(a, b), a*b = width, a the largest divisor up to the square root."""
    a = max(d for d in range(1, int(width**0.5) + 1) if width % d == 0)
    return a, width // a


def _factor(size: int, exact: bool, rng: np.random.Generator) -> np.ndarray:
    """A transform factor [size, size]."""
    if not exact:
        return np.linalg.qr(rng.standard_normal((size, size)))[0].astype(F32)
    matrix = np.eye(size, dtype=F32)
    if size & (size - 1) == 0:
        matrix = np.ones((1, 1), F32)
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = rng.choice([-1.0, 1.0], size).astype(F32)
    return matrix[rng.permutation(size)] * signs * F32(0.5)


def _correction_inputs(
    case: Case, spec: CrossModalCorrectionSpec, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[TensorProto]]:
    """Feeds and initializers of a CrossModalCorrection node."""
    feeds: dict[str, np.ndarray] = {}
    constants = {"u_scale": _around_one(spec.rank, rng), "v_scale": _around_one(spec.N, rng)}
    for operand in ("main", "residual"):
        feeds[f"{operand}_codes"] = _codes((*case.leading, spec.K), 8, rng)
        feeds[f"{operand}_scale"] = _around_one((*case.leading, 1), rng)
    feeds["modality"] = _modality(case, rng)
    for branch in ("cws", "mac"):
        constants[f"gate_{branch}"] = rng.standard_normal(getattr(spec, f"{branch}_rank")).astype(F32)
    initializers = [
        weight_initializer("u", _codes((spec.K, spec.rank), spec.bits, rng), spec.bits, spec.packed),
        weight_initializer("v", _codes((spec.rank, spec.N), spec.bits, rng), spec.bits, spec.packed),
    ]
    present = spec.present_inputs
    given = {name: array for name, array in constants.items() if name in present}
    initializers += [numpy_helper.from_array(array, name) for name, array in given.items()]
    return {name: feed for name, feed in feeds.items() if name in present}, initializers


def _output_info(spec: Spec, name: str, leading: list[str]) -> onnx.ValueInfoProto:
    if not isinstance(spec, ChannelSplitQuantizeSpec):
        return _value_info(name, np.dtype(F32), leading, (spec.N,))
    group, part = name.split("_")
    if part == "scale":
        return _value_info(name, np.dtype(F32), leading, (1,))
    width = spec.group_widths[0 if group == "residual" else GROUPS.index(group)]
    return _value_info(name, np.dtype(np.int8), leading, (width,))


def _value_info(name: str, dtype: np.dtype, leading: list[str], rest: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [*leading, *rest])
