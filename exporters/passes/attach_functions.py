"""Give every `ai.splitq` node of a graph its function body, so that any ONNX Runtime can run the file.

Requires: nodes written by `make_node`; their specs.
Ensures: the model holds a function for each overload in use, inner functions first.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from splitq_edge.exporters.functions import functions_for
from splitq_edge.exporters.nodes import DOMAIN, Spec


def attach_functions(model: ir.Model, specs: Iterable[Spec]) -> int:
    """Add the bodies of the given node variants; returns how many functions were added."""
    functions = functions_for(specs)
    for proto in functions:
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    if functions:
        model.opset_imports[DOMAIN] = 1
    return len(functions)
