"""Logits of every position -> logits of the last positions that the caller asks for.

Requires: an output `logits` [batch, sequence, vocabulary], computed from one value [batch, sequence, hidden] by a
MatMul with a constant or by an output projection's placeholder.
Ensures: a graph input `logits_to_keep` int64 [1] with the default 0, which keeps all positions, as in transformers; n
keeps the last n.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitq_edge.exporters.passes.walk import initializer

KEEP = "logits_to_keep"


def trim_logits(model: ir.Model) -> None:
    """Add the input in place."""
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    head = logits.producer()
    assert head is not None
    hidden = head.inputs[0]
    assert hidden is not None
    keep = initializer(model, KEEP, np.array([0], np.int64))
    model.graph.inputs.append(keep)
    end = initializer(model, "logits.end", np.array([np.iinfo(np.int64).max], np.int64))
    axis = initializer(model, "logits.axis", np.array([1], np.int64))
    start = ir.node("Neg", [keep], name="logits.start")
    cut = ir.node("Slice", [hidden, start.outputs[0], end, axis], name="logits.kept")
    start.outputs[0].name, cut.outputs[0].name = "logits.start", "logits.kept"
    start.outputs[0].type, start.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    cut.outputs[0].type = hidden.type
    if hidden.shape is not None:
        cut.outputs[0].shape = ir.Shape([hidden.shape[0], "kept", hidden.shape[-1]])
    model.graph.insert_before(head, [start, cut])
    head.replace_input_with(0, cut.outputs[0])
    if logits.shape is not None:
        logits.shape = ir.Shape([logits.shape[0], "kept", logits.shape[-1]])
