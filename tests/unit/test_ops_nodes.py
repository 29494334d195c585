"""Specs check themselves and name their variant; nodes put every value where the contract says."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import (
    ChannelSplitQuantizeSpec,
    CrossModalCorrectionSpec,
    SplitQLinearSpec,
    make_node,
    weight_initializer,
)

LINEAR = SplitQLinearSpec(K=72, N=33, group_widths=(40, 16, 16), bits=4, activation_bits=8)
SPLIT = ChannelSplitQuantizeSpec(K=72, group_widths=(40, 16, 16), activation_bits=8)
CORRECTION = CrossModalCorrectionSpec(K=40, N=33, cws_rank=4)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (LINEAR, {"bits": 5}, "bits 2, 3, 4, 6 or 8, got 5"),
        (LINEAR, {"N": 0}, "N above 0, got 0"),
        (LINEAR, {"group_widths": (40, 16, 17)}, "the sum K = 72, got [40, 16, 17]"),
        (LINEAR, {"group_widths": (0, 40, 32)}, "K_m > 0"),
        (LINEAR, {"block_size": 24}, "block_size 0 or a multiple of 16, got 24"),
        (LINEAR, {"cws_rank": -1}, "ranks of 0 or more"),
        (LINEAR, {"mac_rank": 4, "mac_rows": "vision"}, "mac_rows text or all, got 'vision'"),
        (LINEAR, {"activation_symmetric": False}, "activation_bits below 8"),
        (SPLIT, {"group_widths": (56, 16, 0), "transforms": (True, True, True)}, "the empty vision group"),
        (SPLIT, {"residual_bits": 1}, "residual_bits 2, 3, 4, 6 or 8, got 1"),
        (CORRECTION, {"cws_rank": 0}, "a rank above 0"),
    ],
)
def test_spec_refuses_what_the_contract_does_not_allow(spec, change: dict, message: str) -> None:
    with pytest.raises(SplitQError, match=re.escape(message)) as error:
        dataclasses.replace(spec, **change)
    assert str(error.value).startswith(spec.op_type)
    assert "\n" not in str(error.value)


CHANGES = {
    "K": 73,
    "N": 34,
    "bits": 3,
    "activation_bits": 4,
    "outlier_bits": 8,
    "outlier_activation_bits": 4,
    "residual_bits": 4,
    "correction_bits": 3,
    "block_size": 32,
    "cws_rank": 3,
    "mac_rank": 5,
    "mac_rows": "all",
    "channel_order": True,
    "channel_scale": True,
    "transforms": (True, False, True),
    "activation_clip": True,
    "bias": True,
    "packed": True,
    "residual": True,
}


@pytest.mark.parametrize("spec", [LINEAR, SPLIT, CORRECTION], ids=lambda spec: spec.op_type)
def test_overload_is_readable_and_one_for_each_spec(spec) -> None:
    rng = np.random.default_rng(0)
    names = [field.name for field in dataclasses.fields(spec) if field.name in CHANGES]
    specs = set()
    for _ in range(2000):
        change = {name: CHANGES[name] for name in names if rng.random() < 0.5}
        if "K" in change and "group_widths" in spec.attributes:
            change["group_widths"] = (41, 16, 16)
        specs.add(dataclasses.replace(spec, **change))
    assert len(specs) > 100
    assert len({variant.overload for variant in specs}) == len(specs)
    assert all(re.fullmatch(r"[A-Za-z0-9._]+", variant.overload) for variant in specs)


def test_overload_of_a_whole_site() -> None:
    spec = SplitQLinearSpec(
        K=192,
        N=576,
        group_widths=(160, 16, 16),
        bits=4,
        activation_bits=8,
        block_size=32,
        cws_rank=4,
        mac_rank=8,
        channel_order=True,
        transforms=(True, False, False),
        bias=True,
    )
    assert spec.overload == "w4b32a8_160.16.16_n576_cws4_mac8_order_p100_bias"


def test_inputs_lie_at_the_positions_of_the_contract() -> None:
    spec = dataclasses.replace(LINEAR, mac_rank=4, channel_scale=True)
    node = make_node(spec, {name: f"my.{name}" for name in spec.present_inputs}, "y", "site")
    inputs = dict(enumerate(node.input))
    assert inputs.pop(0) == "my.x"
    assert inputs.pop(1) == "my.modality"
    assert inputs.pop(3) == "my.channel_scale"
    assert [inputs.pop(i) for i in range(11, 21)] == [
        f"my.{name}"
        for name in (
            *("weight_main", "scale_main", "weight_text", "scale_text", "weight_vision", "scale_vision"),
            *("u", "u_scale", "v", "v_scale"),
        )
    ]
    assert inputs.pop(22) == "my.gate_mac"
    assert set(inputs.values()) == {""}
    assert max(inputs) == 21


def test_node_carries_every_attribute() -> None:
    node = make_node(LINEAR, {name: name for name in LINEAR.present_inputs}, "y", "site")
    assert {attribute.name for attribute in node.attribute} == {
        *("K", "N", "group_widths", "bits", "activation_bits", "outlier_bits", "outlier_activation_bits"),
        *("activation_symmetric", "residual_bits", "correction_bits", "block_size", "cws_rank", "mac_rank"),
        "mac_rows",
    }


@pytest.mark.parametrize("change", [{"bias": "b"}, {"x": None}], ids=["too_many", "too_few"])
def test_node_takes_exactly_the_inputs_of_its_spec(change: dict) -> None:
    inputs = {**{name: name for name in LINEAR.present_inputs}, **change}
    inputs = {name: value for name, value in inputs.items() if value}
    with pytest.raises(SplitQError, match=r"site: expected the values x, weight_main"):
        make_node(LINEAR, inputs, "y", "site")


def test_sites_of_one_recipe_share_the_nested_functions() -> None:
    sites = [
        dataclasses.replace(
            LINEAR,
            K=width + 32,
            group_widths=(width, 16, 16),
            N=n,
            cws_rank=4,
            mac_rank=4,
            bits=bits,
            correction_bits=bits,
            packed=packed,
        )
        for width in (40, 64)
        for n in (33, 48)
        for bits in (2, 4)
        for packed in (False, True)
    ]
    names = [function.name for function in functions_for([*sites, *sites])]
    assert names == ["ChannelSplitQuantize", "CrossModalCorrection"] + ["SplitQLinear"] * len(sites)


def test_standalone_nodes_have_bodies_of_their_own() -> None:
    functions = functions_for([dataclasses.replace(LINEAR, cws_rank=4), SPLIT, CORRECTION])
    keys = [(function.name, function.overload) for function in functions]
    assert keys[:2] == [("ChannelSplitQuantize", ""), ("CrossModalCorrection", "")]
    assert (SPLIT.op_type, SPLIT.overload) in keys
    assert (CORRECTION.op_type, CORRECTION.overload) in keys
    assert len(set(keys)) == len(keys) == 5


def test_int4_initializer_of_an_odd_count_of_codes() -> None:
    q = np.array([[-8, 7, 1], [0, -1, 3], [5, -4, 2]], np.int8)
    tensor = weight_initializer("w", q, 4, packed=False)
    assert tensor.data_type == TensorProto.INT4
    assert tensor.raw_data[:1] == b"\x78"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), q)


def test_weight_outside_its_bits_is_refused() -> None:
    with pytest.raises(SplitQError, match=r"w: expected a \[K, N\] matrix of integers in -2 .. 1"):
        weight_initializer("w", np.array([[2]], np.int8), 2, packed=False)
