"""A function body under construction: nodes in order, a readable name for every value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, helper, numpy_helper

from splitq_edge.exporters.specs import DOMAIN, VERSION, Spec

OPSET = 21


class Body:
    """Collects the nodes of one function and keeps its constants apart by name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: set[str] = set()

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Appends a standard op with one output and returns the output's name."""
        self._nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def split(self, value: str, sizes: str, outputs: Sequence[str], axis: int) -> None:
        """Appends a Split of `value` into `outputs`."""
        self._nodes.append(helper.make_node("Split", [value, sizes], outputs, axis=axis))

    def halves(self, value: str, outputs: Sequence[str]) -> None:
        """Appends a Split of the last axis of `value` into two equal parts."""
        self._nodes.append(helper.make_node("Split", [value], outputs, axis=-1, num_outputs=2))

    def call(self, function: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Appends a node of our domain. It has no overload: ONNX Runtime does not resolve nested ones."""
        self._nodes.append(helper.make_node(function, inputs, outputs, domain=DOMAIN, **attributes))

    def constant(self, name: str, value: np.ndarray | np.generic | Sequence[int]) -> str:
        """A constant, written once a name; a list of integers becomes int64."""
        if name not in self._constants:
            array = np.asarray(value, np.int64) if isinstance(value, (list, tuple)) else np.asarray(value)
            node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
            self._nodes.append(node)
            self._constants.add(name)
        return name

    def attribute_ints(self, name: str) -> str:
        """The node's own attribute `name` (ints) as an int64 vector of the same name."""
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(AttributeProto(name="value_ints", ref_attr_name=name, type=AttributeProto.INTS))
        self._nodes.append(node)
        return name

    def function(
        self, spec: Spec, name: str, *, overload: str, outputs: Sequence[str], explanation: str
    ) -> FunctionProto:
        """The finished function.

        Args:
            spec: the node it is the body of; gives inputs and attributes.
            name: canonical op type, or a suffixed one for a second structure of a nested function.
            overload: overload of the node; '' for a nested function.
            outputs: the values that leave, all outputs of the op that the node can give.
            explanation: one line that Netron shows.
        """
        # onnx.reference wants as many inputs as the node has, and `make_node` writes none after the last.
        last = max(spec.inputs.index(given) for given in spec.present_inputs)
        inside = getattr(spec, "joined", ())  # these names are values of the body
        return helper.make_function(
            DOMAIN,
            name,
            [f"{given}_apart" if given in inside else given for given in spec.inputs[: last + 1]],
            outputs,
            self._nodes,
            [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
            attributes=list(spec.attributes),
            doc_string=explanation,
            overload=overload,
        )
