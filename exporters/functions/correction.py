"""The body of `CrossModalCorrection`: CWS and MAC through shared low-rank factors."""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto, TensorProto

from splitq_edge.exporters.functions.arithmetic import (
    code_sums,
    offset_codes,
    product_operand,
    rescale,
    symmetric_codes,
    weight_integers,
)
from splitq_edge.exporters.functions.body import Body
from splitq_edge.exporters.specs import CrossModalCorrectionSpec

EXPLANATION = "correction = Q(gate_cws * (codes u) + [row takes MAC] gate_mac * (residual u)) v, in integers."
LATENT_BITS = 8


def correction_function(spec: CrossModalCorrectionSpec, name: str, overload: str) -> FunctionProto:
    """The function of a node of this spec.

    With int8 factors (bits 8, not packed) it depends on `correction_structure(spec)` only, not on sizes.
    """
    body = Body()
    u, v = (
        product_operand(body, weight_integers(body, name, spec.bits, spec.packed, shape), spec.bits)
        for name, shape in (("u", (spec.K, spec.rank)), ("v", (spec.rank, spec.N)))
    )
    latent = ""
    if spec.cws_rank:
        latent = _branch(body, "cws", "main", u, spec)
    if spec.mac_rank:
        mac = _branch(body, "mac", "residual", u, spec)
        latent = body.op("Add", [latent, mac], "latent") if latent else mac
    codes, scale = symmetric_codes(body, "z", latent, LATENT_BITS)
    offset = body.constant("code_offset", np.float32(128))
    shifted = body.op("Add", [codes, offset], "z_shifted_codes")
    unsigned = body.op("Cast", [shifted], "z_codes_plus_128", to=TensorProto.UINT8)
    sums = code_sums(body, "z_v", unsigned, v, spec.bits)
    per_row = body.op("Mul", [sums, scale], "z_v_row_scaled")
    body.op("Mul", [per_row, "v_scale"], "correction")
    return body.function(spec, name, overload=overload, outputs=spec.outputs, explanation=EXPLANATION)


def correction_structure(spec: CrossModalCorrectionSpec) -> str:
    """What the body of unpacked int8 factors depends on: specs of one structure share a nested function."""
    used = [branch for branch, rank in (("cws", spec.cws_rank), ("mac", spec.mac_rank)) if rank]
    short = [f"short_{branch}" for branch in used if _is_short(spec, branch)]
    rows = ["all"] if spec.mac_rank and not spec.masked else []
    return "_".join([*used, *rows, *short])


def _branch(body: Body, branch: str, operand: str, u: str, spec: CrossModalCorrectionSpec) -> str:
    """Appends gate ∘ (scale u_scale ∘ codes u), [..., R]; 0 in columns and rows the branch does not serve."""
    codes = offset_codes(body, f"{operand}_codes", f"{operand}_codes")
    sums = code_sums(body, f"{branch}_u", codes, u, spec.bits)
    product = rescale(body, f"{branch}_u", sums, f"{operand}_scale", "u_scale")
    gated = body.op("Mul", [product, _full_gate(body, branch, spec)], f"{branch}_latent")
    if branch == "cws" or not spec.masked:
        return gated
    last_axis, zero = body.constant("last_axis", [-1]), body.constant("zero", np.float32(0))
    is_vision = body.op("Cast", ["modality"], "is_vision", to=TensorProto.BOOL)
    vision_rows = body.op("Unsqueeze", [is_vision, last_axis], "vision_rows")
    return body.op("Where", [vision_rows, zero, gated], "mac_text_latent")


def _full_gate(body: Body, branch: str, spec: CrossModalCorrectionSpec) -> str:
    """The gate [R]: a branch of fewer columns gets zeros, which leave the rest of z zero."""
    gate = f"gate_{branch}"
    if not _is_short(spec, branch):
        return gate
    rank = body.op("Shape", ["u_scale"], f"{branch}_rank")
    given = body.op("Shape", [gate], f"{gate}_given")
    missing = body.op("Sub", [rank, given], f"{gate}_missing")
    pads = body.op("Concat", [body.constant("no_pad", [0]), missing], f"{gate}_pads", axis=0)
    return body.op("Pad", [gate, pads], f"{gate}_padded")


def _is_short(spec: CrossModalCorrectionSpec, branch: str) -> bool:
    return (spec.cws_rank if branch == "cws" else spec.mac_rank) < spec.rank
