"""Writes nodes of domain `ai.splitq` and their weights (docs/ops.md)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.specs import (
    DOMAIN,
    VERSION,
    CachedAttentionSpec,
    ChannelSplitQuantizeSpec,
    CrossModalCorrectionSpec,
    SkipRMSNormSpec,
    Spec,
    SplitQLinearSpec,
    SwiGLUSpec,
)
from splitq_edge.runtime_ops.packing import int4_bytes, pack

__all__ = [
    "DOMAIN",
    "VERSION",
    "CachedAttentionSpec",
    "ChannelSplitQuantizeSpec",
    "CrossModalCorrectionSpec",
    "SkipRMSNormSpec",
    "Spec",
    "SplitQLinearSpec",
    "SwiGLUSpec",
    "make_node",
    "place",
    "weight_initializer",
]


def make_node(spec: Spec, inputs: Mapping[str, str], outputs: str | Mapping[str, str], name: str) -> onnx.NodeProto:
    """Writes the node of a spec; its body is the function of the same overload (`functions_for`).

    Args:
        spec: the variant.
        inputs: value of the graph for each input of `spec.present_inputs`, by the contract's input name.
        outputs: the same for `spec.present_outputs`; a plain string where there is one output.
        name: name of the node.

    Raises:
        SplitQError: an input or output is missing, or given though the spec does not take it.
    """
    outputs = {spec.present_outputs[0]: outputs} if isinstance(outputs, str) else outputs
    return helper.make_node(
        spec.op_type,
        place(name, spec.inputs, spec.present_inputs, inputs),
        place(name, spec.outputs, spec.present_outputs, outputs),
        name=name,
        domain=DOMAIN,
        overload=spec.overload,
        **spec.attributes,
    )


def place(where: str, positions: tuple[str, ...], present: tuple[str, ...], values: Mapping[str, str]) -> list[str]:
    """Values at the contract's positions, '' for absent ones, nothing after the last present one.

    Raises:
        SplitQError: `values` has other names than `present`.
    """
    if set(values) != set(present):
        raise SplitQError(
            f"{where}: expected the values {', '.join(present)}, got {', '.join(sorted(values)) or 'none'}; "
            "give exactly what the spec takes"
        )
    last = max(positions.index(name) for name in present)
    return [values.get(name, "") for name in positions[: last + 1]]


def weight_initializer(name: str, q: np.ndarray, bits: int, packed: bool, block_size: int = 0) -> TensorProto:
    """The initializer of a weight, in one of the two storage forms of docs/ops.md.

    Args:
        name: name of the initializer.
        q: [K, N] integers in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2, 3, 4, 6 or 8.
        packed: True for the packed form, False for an INT4 (bits up to 4) or INT8 tensor.
        block_size: written into the header of the packed form.

    Raises:
        SplitQError: q is no matrix of integers of this range.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if q.ndim != 2 or q.dtype.kind != "i" or (q.size and (q.min() < low or q.max() > high)):
        raise SplitQError(
            f"{name}: expected a [K, N] matrix of integers in {low} .. {high}, got {q.dtype} {list(q.shape)}"
            "; quantize the weight at these bits first"
        )
    q = q.astype(np.int8)
    if packed:
        return numpy_helper.from_array(pack(q, bits, block_size), name)
    if bits > 4:
        return numpy_helper.from_array(q, name)
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=q.shape, raw_data=int4_bytes(q))
