"""Tracing a quantized model: each linear of a site becomes one placeholder node that a pass expands later.

The placeholder carries names only. The integers and scales go from the quantized modules straight into the graph, so
torch's tracer never sees an int4 tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from torch import nn

from splitq_edge.convert import QuantizedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import SitePart

DOMAIN = "ai.splitq"
PLACEHOLDER = "SitePart"


@torch.library.custom_op("splitq_edge::site_part", mutates_args=())
def site_part(x: torch.Tensor, modality: torch.Tensor | None, site: str, part: str, width: int) -> torch.Tensor:
    """Stand-in of one linear while tracing; x [..., K] -> [..., width]. It has a shape but no value."""
    return x.new_zeros(*x.shape[:-1], width)


@site_part.register_fake
def _(x: torch.Tensor, modality: torch.Tensor | None, site: str, part: str, width: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], width)


class TracedPart(nn.Module):
    """Takes the place of a `SitePart` while a graph is traced."""

    def __init__(self, part: SitePart, context: ModalityContext, *, with_modality: bool) -> None:
        super().__init__()
        self._call = (part.site.name, part.part, part.width)
        self._context = context
        self._with_modality = with_modality

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] -> [..., width]."""
        modality = self._context.mask if self._with_modality else None
        return site_part(x, modality, *self._call)


def reads_modality(quantized: QuantizedModel) -> bool:
    """Whether any site of the language blocks needs the modality mask as a graph input."""
    return any(
        site.correction is not None and site.correction.gate_mac.numel() > 0 and site.correction.mac_rows == "text"
        for site in quantized.sites.values()
    )


@contextmanager
def placeholders(quantized: QuantizedModel) -> Iterator[None]:
    """Within the block the model's quantized linears trace to placeholder nodes."""
    reading = quantized.sites if reads_modality(quantized) else {}
    model, context = quantized.loaded.model, quantized.loaded.context
    parts = {path: module for path, module in model.named_modules() if isinstance(module, SitePart)}
    try:
        for path, part in parts.items():
            model.set_submodule(path, TracedPart(part, context, with_modality=part.site.name in reading))
        yield
    finally:
        for path, part in parts.items():
            model.set_submodule(path, part)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` for torch.onnx.export."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    placeholder = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        PLACEHOLDER,
        schema(
            PLACEHOLDER,
            DOMAIN,
            1,
            inputs=[
                schema.FormalParameter("x", "T"),
                schema.FormalParameter("modality", "M", param_option=option.Optional),
            ],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int8)"], "")],
            attributes=[
                schema.Attribute("site", schema.AttrType.STRING, ""),
                schema.Attribute("part", schema.AttrType.STRING, ""),
                schema.Attribute("width", schema.AttrType.INT, ""),
            ],
        ),
    )

    def translate(x: Any, modality: Any, site: str, part: str, width: int) -> Any:
        return placeholder(x, modality, site=site, part=part, width=width)

    return {torch.ops.splitq_edge.site_part.default: translate}
