"""Trace a part to ONNX, with the dynamic sizes that were asked for or an error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch import nn

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.symbolic import translation_table

OPSET = 21  # first opset with 4-bit integers
IR_VERSION = 10  # first IR with function overloads
ROUNDS = 2  # a rewritten node may leave something to fold
RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.no_op_expand_rule,
    *rules.expand_before_binary_op_rules,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
)


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
            optimize=False,  # `simplify` does it, and in time that grows with the graph and not with its square
            verbose=False,
        )
        assert program is not None  # only the legacy exporter returns none
        model = program.model
        weights = list(model.graph.initializers.values())
        simplify(model)
    model.ir_version = max(model.ir_version, IR_VERSION)
    copy = model.clone()
    # onnxscript's rules are global and remember the last graph they matched: leave it no weights
    for value in (*weights, *model.graph.initializers.values()):
        value.const_value = None
    return copy


def simplify(model: ir.Model) -> None:
    """Fold constants, merge and drop nodes, as `onnxscript.optimizer.optimize` does with more rules.

    One that it has, slice_split, lists all nodes of the graph at every node, which costs minutes at thirty layers, and
    finds nothing here.

    Args:
        model: changed in place.
    """
    common_passes.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = optimizer.fold_constants(model, onnx_shape_inference=True)
        applied = rewriter.RewritePass(RULES)(model)
        common_passes.RemoveUnusedNodesPass()(model)
        if not (folded.modified or applied.modified):
            break
    ir.passes.Sequential(
        common_passes.RemoveUnusedFunctionsPass(),
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.LiftSubgraphInitializersToMainGraphPass(),
        common_passes.DeduplicateInitializersPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
        common_passes.ClearMetadataAndDocStringPass(),  # stack traces, with the paths of this machine
    )(model)


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
