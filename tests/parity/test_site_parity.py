"""One quantized site: the torch module, the function body in onnx.reference and ONNX Runtime, the native kernel.

The widths have exact Hadamard factors (16 = 4 x 4, 256 = 16 x 16) and the activations are whole numbers, so every
engine sees the same transformed values to the last bit. Codes must then be equal, and outputs may differ by the
rounding of float sums alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from builders import no_split, random_site, rng, site_model
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitq_edge.config import CorrectionConfig, QuantConfig, preset
from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import DOMAIN, VERSION, ChannelSplitQuantizeSpec, make_node
from splitq_edge.modules.split_linear import GROUPS, SplitLinear
from splitq_edge.quant.affine import dequantize_weight, quantize_rows
from splitq_edge.quant.transforms import apply_transform, orthogonal_start
from splitq_edge.runtime_ops import library_path

EPS = float(np.finfo(np.float32).eps)
EXACT = (256, 16, 16)
Engine = Callable[[onnx.ModelProto, dict[str, np.ndarray]], list[np.ndarray]]


def run_reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, feeds)


def run_ort(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, native: bool = False) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if native:
        path = library_path()
        assert path is not None, "SPLITQ_EXPECT_NATIVE=1, but library_path() found no native library"
        options.register_custom_ops_library(str(path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_native(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    without_bodies = onnx.ModelProto()
    without_bodies.CopyFrom(model)
    del without_bodies.functions[:]  # nothing but the kernels can run it
    return run_ort(without_bodies, feeds, native=True)


ENGINES: dict[str, Engine] = {"reference": run_reference, "ort": run_ort}
if os.environ.get("SPLITQ_EXPECT_NATIVE") == "1" or library_path() is not None:
    ENGINES["native"] = run_native

TEXT_ROWS = CorrectionConfig(residual_bits=4, mac_rows="text")
MASKED = dataclasses.replace(preset("W4A4"), correction=TEXT_ROWS)
MASKED_W3A3 = dataclasses.replace(preset("W3A3"), correction=TEXT_ROWS)
ASYMMETRIC = dataclasses.replace(MASKED_W3A3, activation_bits=2, activation_symmetric=False)
CONFIGS: dict[str, tuple[QuantConfig, tuple[int, int, int]]] = {
    **{scheme: (preset(scheme), EXACT) for scheme in ("W4A8", "W4A4", "W3A3", "W3A2")},
    "W2A8": (dataclasses.replace(preset("W4A8"), bits=2), EXACT),
    "W8A8": (dataclasses.replace(preset("W4A8"), bits=8), EXACT),
    "blocks": (dataclasses.replace(preset("W4A4"), transform_width=16), EXACT),
    "groups": (dataclasses.replace(preset("W4A8"), group_size=64), EXACT),
    "asymmetric": (ASYMMETRIC, EXACT),
    "mac_on_text_rows": (MASKED, EXACT),
    "short_last_group": (no_split(bits=3, group_size=32), (80, 0, 0)),
    "cws_longer_than_mac": (no_split(activation_bits=4, correction=CorrectionConfig(0.3, 0.15)), (64, 8, 7)),
    "eight_bit_factors": (no_split(activation_bits=4, correction=CorrectionConfig(0.15, 0.3, bits=8)), (64, 0, 8)),
    "no_correction": (no_split(), (64, 8, 8)),
    "main_alone": (no_split(bits=8), (65, 0, 0)),
}


def whole_numbers(*shape: int) -> torch.Tensor:
    x = torch.randint(-60, 61, shape, generator=rng(1)).float()
    x.reshape(-1, shape[-1])[-1] = 0  # a token without any signal
    return x


def mixed_mask(*shape: int) -> torch.Tensor:
    return (torch.arange(int(np.prod(shape))) % 3 == 1).to(torch.int8).reshape(shape)


def group_rows(site: SplitLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Transformed activations of each group that has channels."""
    permuted = x[..., site.order.long()]
    if site.channel_scale is not None:
        permuted = permuted * site.channel_scale
    parts = dict(zip(GROUPS, permuted.split(site.widths, -1), strict=True))
    rows = {}
    for name, group in site.groups.items():
        exact = group.p1 is None or group.p2 is None
        rows[name] = parts[name] if exact else apply_transform(parts[name], group.p1, group.p2)
    return rows


def rounding_bound(site: SplitLinear, x: torch.Tensor) -> np.ndarray:
    """How far two orders of the float operations may lie apart, [..., N].

    The integers are equal, so what differs is the rounding of the scales' products and of the sum over groups, blocks,
    branches and bias: a few eps of the sum of the magnitudes of all products. A code stands for at most its
    activation plus half a step, which is at most half the row's largest magnitude.
    """
    terms = torch.zeros(*x.shape[:-1], site.out_features, dtype=torch.float64)
    for name, rows in group_rows(site, x).items():
        group = site.groups[name]
        size = site.group_size if name == "main" else 0
        values = rows.double().abs() + rows.double().abs().amax(-1, keepdim=True) / 2
        terms += values @ dequantize_weight(group.qweight, group.scale, size).double().abs()
        if name == "main" and site.correction is not None:
            c = site.correction
            gate = torch.zeros(c.u.shape[1], dtype=torch.float64)
            gate[: c.gate_cws.numel()] += c.gate_cws
            gate[: c.gate_mac.numel()] += c.gate_mac
            latent = (values @ dequantize_weight(c.u, c.u_scale).double().abs()) * gate
            terms += latent @ dequantize_weight(c.v, c.v_scale).double().abs()
    if site.bias is not None:
        terms += site.bias.abs()
    blocks = -(-site.widths[0] // site.group_size) if site.group_size else 1
    return ((10 + blocks) * EPS * terms + 1e-9).numpy()


@pytest.mark.parametrize("packed", [False, True], ids=["portable", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_engine_gives_the_output_of_the_torch_module(name: str, packed: bool) -> None:
    config, widths = CONFIGS[name]
    site, _ = random_site(config, widths=widths, outputs=(20, 13), bias=True)
    x, mask = whole_numbers(2, 5, sum(widths)), mixed_mask(2, 5)
    with site.context.using(mask):
        expected = site(x).numpy()
    bound = rounding_bound(site, x)
    model = site_model(site, packed=packed)
    onnx.checker.check_model(model, full_check=True)
    wanted = {"x": x.numpy(), "modality": mask.numpy()}
    feeds = {value.name: wanted[value.name] for value in model.graph.input}
    masked = site.correction is not None and site.correction.mac_rows == "text" and site.correction.gate_mac.numel() > 0
    assert ("modality" in feeds) == masked
    for engine, run in ENGINES.items():
        (y,) = run(model, feeds)
        worst = np.abs(y - expected).max()
        assert y.shape == expected.shape, engine
        assert (np.abs(y - expected) <= bound).all(), f"{engine}: off by {worst}, allowed {bound.max()}"


def test_the_bound_notices_one_wrong_code() -> None:
    # What the test above is worth: one main code of one token, one step off, breaks its bound.
    site, _ = random_site(preset("W4A8"), widths=EXACT, outputs=(33,))
    x = whole_numbers(2, 5, 288)
    rows = group_rows(site, x)["main"]
    step = quantize_rows(rows, 8)[1]  # [2, 5, 1]
    weight = site.groups["main"].qweight.float() * site.groups["main"].scale
    change = (step * weight.abs().amax(0)).numpy()  # of the channel that counts most
    living = x.abs().amax(-1).numpy() > 0
    assert (change[living] > 3 * rounding_bound(site, x)[living]).all()


@pytest.mark.parametrize("setting", ["clip", "channel_scale"])
@pytest.mark.parametrize("config", [MASKED, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_clip_and_channel_scale_reach_every_engine(config: QuantConfig, setting: str) -> None:
    site, _ = random_site(config, widths=EXACT)
    x, mask = whole_numbers(2, 5, 288), mixed_mask(2, 5)
    with site.context.using(mask):
        plain = site(x).numpy()
        if setting == "clip":
            clips = {"main": 0.75, "text": 0.5, "vision": 0.625}
            site.groups = {name: dataclasses.replace(group, clip=clips[name]) for name, group in site.groups.items()}
        else:
            site.channel_scale = 2.0 ** torch.randint(-2, 3, (288,), generator=rng(4)).float()
        expected = site(x).numpy()
    assert (np.abs(plain - expected).max(-1)[:, :-1] > 0.01).all()
    for engine, run in ENGINES.items():
        (y,) = run(site_model(site, packed=False), {"x": x.numpy(), "modality": mask.numpy()})
        assert (np.abs(y - expected) <= rounding_bound(site, x)).all(), engine


@pytest.mark.parametrize("packed", [False, True], ids=["portable", "packed"])
@pytest.mark.parametrize("mask", ["text", "vision"])
def test_passes_of_one_modality_agree(mask: str, packed: bool) -> None:
    site, _ = random_site(MASKED_W3A3, widths=EXACT)
    x = whole_numbers(1, 4, 288)
    modality = torch.full((1, 4), int(mask == "vision"), dtype=torch.int8)
    with site.context.using(modality):
        expected = site(x).numpy()
    for engine, run in ENGINES.items():
        (y,) = run(site_model(site, packed=packed), {"x": x.numpy(), "modality": modality.numpy()})
        assert (np.abs(y - expected) <= rounding_bound(site, x)).all(), engine


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (2, 0)])
def test_other_batches_and_lengths_agree(shape: tuple[int, int]) -> None:
    site, _ = random_site(MASKED, widths=EXACT)
    x = whole_numbers(*shape, 288) if 0 not in shape else torch.zeros(*shape, 288)
    mask = mixed_mask(*shape)
    with site.context.using(mask):
        expected = site(x).numpy()
    for engine, run in ENGINES.items():
        (y,) = run(site_model(site, packed=False), {"x": x.numpy(), "modality": mask.numpy()})
        assert y.shape == (*shape, 24), engine
        assert (np.abs(y - expected) <= rounding_bound(site, x)).all(), engine


# The integers themselves, from a node that gives them as outputs


def quantize_model(spec: ChannelSplitQuantizeSpec, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one ChannelSplitQuantize node; x is its input, the rest constant."""
    names = {name: name for name in spec.present_inputs}
    outputs = {name: name for name in spec.present_outputs}
    initializers = [numpy_helper.from_array(constants[name], name) for name in names if name != "x"]
    infos = []
    for name in outputs:
        group, part = name.split("_")
        width = spec.group_widths[0 if group == "residual" else GROUPS.index(group)]
        kind, size = (TensorProto.FLOAT, 1) if part == "scale" else (TensorProto.INT8, width)
        infos.append(helper.make_tensor_value_info(name, kind, ["tokens", size]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", spec.K])
    graph = helper.make_graph([make_node(spec, names, outputs, "node")], "codes", [x], infos, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions_for([spec]), ir_version=10)


@pytest.mark.parametrize("transform", ["identity", "hadamard"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, True), (8, True), (2, False), (4, False)])
def test_codes_and_scales_equal_those_of_torch_exactly(bits: int, symmetric: bool, transform: str) -> None:
    factors = {"main": (16, 16), "text": (4, 4), "vision": (4, 4)}
    spec = ChannelSplitQuantizeSpec(
        K=288,
        group_widths=EXACT,
        activation_bits=bits,
        activation_symmetric=symmetric,
        residual_bits=4,
        channel_order=True,
        transforms=(transform == "hadamard",) * 3,
        residual=True,
    )
    order = torch.randperm(288, generator=rng(2)).to(torch.int32)
    constants = {"channel_order": order.numpy()}
    x = whole_numbers(9, 288)
    expected: dict[str, torch.Tensor] = {}
    for (name, (a, b)), rows in zip(factors.items(), x[:, order.long()].split(EXACT, -1), strict=True):
        if transform == "hadamard":
            p1, p2 = orthogonal_start(a), orthogonal_start(b)
            constants |= {f"p1_{name}": p1.numpy(), f"p2_{name}": p2.numpy()}
            rows = apply_transform(rows, p1, p2)  # noqa: PLW2901
        main = name == "main"
        codes, scale = quantize_rows(rows, bits if main else 8, symmetric=symmetric or not main)
        expected |= {f"{name}_codes": codes, f"{name}_scale": scale}
        if main:
            residual = quantize_rows(rows - codes * scale, 4)
            expected |= {"residual_codes": residual[0], "residual_scale": residual[1]}
    model = quantize_model(spec, constants)
    for engine, run in ENGINES.items():
        outputs = dict(zip(spec.present_outputs, run(model, {"x": x.numpy()}), strict=True))
        assert outputs.keys() == expected.keys()
        for name, value in outputs.items():
            np.testing.assert_array_equal(value, expected[name].numpy(), err_msg=f"{engine} {name}")
