"""What tracing leaves behind."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from splitq_edge.exporters.onnx_export import trace


def test_weights_go_with_the_graph_and_the_module() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    weights = [weakref.ref(parameter) for parameter in module.parameters()]
    graph = trace(
        module,
        {"input": torch.randn(3, 5, 8)},
        input_names=["input"],
        output_names=["output"],
        dynamic={"input": {0: "rows"}},
    )
    initializers = graph.graph.initializers.values()
    assert sum(value.const_value.size for value in initializers if value.const_value is not None) >= 8 * 6 + 6 * 4
    del module, graph, initializers
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4
