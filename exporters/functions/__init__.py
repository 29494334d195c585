"""Function bodies of the `ai.splitq` ops in standard ONNX ops: with them any ONNX Runtime runs the file.

A top-level node and its body share name and overload; ONNX Runtime tells overloads apart from 1.27 on, onnx.reference
not at all (inline the functions first, `onnx.inliner`). Functions that a body calls have no overload, because ONNX
Runtime does not resolve a nested one ("not a registered function/op"); they depend on little enough that a normal model
has one of each kind, under the canonical name. A second structure in a file gets a suffixed name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from onnx import FunctionProto

from splitq_edge.exporters.functions.cached_attention import cached_attention_function
from splitq_edge.exporters.functions.correction import correction_function, correction_structure
from splitq_edge.exporters.functions.linear import linear_function, nested_correction
from splitq_edge.exporters.functions.quantize import quantize_function, quantize_structure
from splitq_edge.exporters.functions.skip_norm import skip_norm_function
from splitq_edge.exporters.functions.swiglu import swiglu_function
from splitq_edge.exporters.specs import (
    CachedAttentionSpec,
    ChannelSplitQuantizeSpec,
    CrossModalCorrectionSpec,
    SkipRMSNormSpec,
    Spec,
    SplitQLinearSpec,
    SwiGLUSpec,
)

__all__ = ["functions_for"]


def functions_for(specs: Iterable[Spec]) -> list[FunctionProto]:
    """The functions of all nodes of a model, each once, called ones before their callers.

    Args:
        specs: the specs of the model's top-level nodes, in any number and order; the nested functions of the
            first one get the canonical names.
    """
    nested = _Nested()
    callers: dict[Spec, FunctionProto] = {}
    for spec in specs:
        if spec not in callers:
            callers[spec] = _top_level(spec, nested)
    return [*nested.functions.values(), *callers.values()]


@dataclass
class _Nested:
    """The functions that bodies call, by structure."""

    functions: dict[tuple[str, str], FunctionProto] = field(default_factory=dict)

    def quantize(self, spec: ChannelSplitQuantizeSpec) -> str:
        """Name of the ChannelSplitQuantize function of this structure, made at the first call."""
        key = (spec.op_type, quantize_structure(spec))
        if key not in self.functions:
            self.functions[key] = quantize_function(spec, self._free_name(*key), overload="")
        return self.functions[key].name

    def correction(self, spec: CrossModalCorrectionSpec) -> str:
        """Name of the CrossModalCorrection function of this structure, made at the first call."""
        key = (spec.op_type, correction_structure(spec))
        if key not in self.functions:
            self.functions[key] = correction_function(spec, self._free_name(*key), overload="")
        return self.functions[key].name

    def _free_name(self, op_type: str, structure: str) -> str:
        taken = any(kind == op_type for kind, _ in self.functions)
        return f"{op_type}_{structure}" if taken else op_type


def _top_level(spec: Spec, nested: _Nested) -> FunctionProto:
    if isinstance(spec, SplitQLinearSpec):
        correction = nested_correction(spec)
        return linear_function(
            spec,
            quantize_name=nested.quantize(spec.quantize),
            correction_name=nested.correction(correction) if correction else "",
        )
    if isinstance(spec, SwiGLUSpec):
        return swiglu_function(spec)
    if isinstance(spec, SkipRMSNormSpec):
        return skip_norm_function(spec)
    if isinstance(spec, CachedAttentionSpec):
        return cached_attention_function(spec)
    if isinstance(spec, ChannelSplitQuantizeSpec):
        return quantize_function(spec, spec.op_type, overload=spec.overload)
    return correction_function(spec, spec.op_type, overload=spec.overload)
