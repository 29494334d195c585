"""Trace a part to ONNX, with the dynamic sizes that were asked for or an error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.symbolic import translation_table

OPSET = 21  # first opset with 4-bit integers
IR_VERSION = 10  # first IR with function overloads


def trace(
    module: nn.Module,
    inputs: dict[str, Any],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic: dict[str, Any],
) -> ir.Model:
    """Export a module.

    Args:
        module: tensor-only signature.
        inputs: sample inputs by parameter name; sizes 0 and 1 would be taken as constants, so use larger ones.
        input_names: graph inputs, flattened in the order of the signature.
        output_names: graph outputs.
        dynamic: by parameter name, the symbolic axes in torch.export's nesting; an axis is named by a string.

    Returns:
        The graph, opset 21, placeholders still in it.

    Raises:
        SplitQError: an axis that should be dynamic came out fixed.
    """
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            args=(),
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic,
            custom_translation_table=translation_table(),
            optimize=True,
            verbose=False,
        )
    assert program is not None  # only the legacy exporter returns none
    model = program.model
    model.ir_version = max(model.ir_version, IR_VERSION)
    return model


def check_axes(model: ir.Model, axes: dict[str, dict[int, str]]) -> None:
    """Check the inputs' dynamic axes.

    Args:
        model: exported graph.
        axes: by input name, the name expected of an axis.

    Raises:
        SplitQError: an axis is fixed or has another name.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for name, expected in axes.items():
        shape = inputs[name].shape if name in inputs else None
        for axis, label in expected.items():
            got = None if shape is None else shape[axis]
            if not isinstance(got, ir.SymbolicDim) or got.value != label:
                raise SplitQError(
                    f"export: input {name}: expected axis {axis} to be dynamic '{label}', got {got}; "
                    "the model's code fixes this size"
                )


class _quiet:
    """Keeps loggers at ERROR while the exporter runs: its notes mean nothing to a user."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
