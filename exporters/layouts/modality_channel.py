"""The modality as one more channel of the embeddings, for engines that hand a decoder nothing beside them.

Channel `hidden` of image_features is 1, that of a text token's embedding 0; whoever puts the image rows in the places
of the image tokens so writes the modality mask too, and the decoder splits it off again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitq_edge.exporters.layouts.layout import ExportParts
from splitq_edge.exporters.passes.walk import initializer


def add_modality_channel(parts: ExportParts) -> None:
    """Move the mask of the vision encoder and the decoder into the embeddings; nothing where no decoder reads it.

    The caller sees to `embed_tokens`. In the manifest `hidden_size`, the width of what passes between the parts, grows
    by one.
    """
    if not parts.manifest["modality_input"]:
        return
    hidden = parts.manifest["hidden_size"]
    append_channel(parts.graphs["vision_encoder"], "image_features", 1.0)
    _split_off(parts.graphs["decoder"])
    parts.manifest |= {"modality_input": False, "modality_channel": True, "hidden_size": hidden + 1}
    for name, value in list(parts.parity.items()):
        part, case, kind, tensor = name.split("/")
        if (part, tensor) == ("vision_encoder", "image_features"):
            parts.parity[name] = with_channel(value, 1.0)
        elif (part, kind, tensor) == ("decoder", "in", "inputs_embeds"):
            modality = parts.parity.pop(f"{part}/{case}/in/modality")
            parts.parity[name] = with_channel(value, modality)


def with_channel(values: np.ndarray, channel: np.ndarray | float) -> np.ndarray:
    """[..., hidden] -> [..., hidden + 1] float32, the last channel being `channel`, [...] or one number."""
    last = np.broadcast_to(np.asarray(channel, np.float32), values.shape[:-1])
    return np.concatenate([values, last[..., None]], -1)


def append_channel(model: ir.Model, output: str, constant: float) -> None:
    """Give an output one more channel that holds a constant."""
    graph = model.graph
    index = next(i for i, value in enumerate(graph.outputs) if value.name == output)
    narrow = graph.outputs[index]
    narrow.name = f"{output}.channels"
    assert narrow.shape is not None
    pads = initializer(model, f"{output}.pads", np.array([0] * (2 * len(narrow.shape) - 1) + [1], np.int64))
    value = initializer(model, f"{output}.constant", np.array(constant, np.float32))
    node = ir.node("Pad", [narrow, pads, value], name=f"{output}.append_channel")
    graph.append(node)
    graph.outputs[index] = widened(node.outputs[0], output, narrow)


def widened(value: ir.Value, name: str, narrow: ir.Value) -> ir.Value:
    """Name a value and give it the type of another with one more channel."""
    assert narrow.shape is not None
    value.name, value.type = name, narrow.type
    value.shape = ir.Shape([*narrow.shape[:-1], fixed(narrow, -1) + 1])
    return value


def fixed(value: ir.Value, axis: int) -> int:
    """Size of an axis that the graph fixes."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def split_channel(model: ir.Model, name: str) -> ir.Value:
    """Widen an input by one channel; what read it reads the others.

    Returns:
        The channel, [..., 1] float32.
    """
    graph = model.graph
    index = next(i for i, value in enumerate(graph.inputs) if value.name == name)
    narrow = graph.inputs[index]
    assert narrow.shape is not None
    wide = widened(ir.Value(), name, narrow)
    sizes = initializer(model, f"{name}.widths", np.array([fixed(narrow, -1), 1], np.int64))
    node = ir.Node("", "Split", [wide, sizes], [ir.AttrInt64("axis", -1)], num_outputs=2, name=f"{name}.split")
    channels, flag = node.outputs
    channels.name, channels.type, channels.shape = f"{name}.channels", narrow.type, narrow.shape
    flag.name, flag.type, flag.shape = f"{name}.modality", narrow.type, ir.Shape([*narrow.shape[:-1], 1])
    narrow.name = f"{name}.replaced"
    graph.inputs[index] = wide
    ir.convenience.replace_all_uses_with(narrow, channels)
    graph.insert_before(graph[0], node)
    return flag


def _split_off(model: ir.Model) -> None:
    graph = model.graph
    flag = split_channel(model, "inputs_embeds")
    mask = next(value for value in graph.inputs if value.name == "modality")
    axis = initializer(model, "modality.axis", np.array([-1], np.int64))
    squeeze = ir.node("Squeeze", [flag, axis], name="modality.squeeze")
    cast = ir.node("Cast", [squeeze.outputs[0]], {"to": ir.DataType.INT8}, name="modality.cast")
    squeeze.outputs[0].name = "modality.float"
    graph.inputs.remove(mask)
    mask.name = "modality.replaced"
    read = cast.outputs[0]
    read.name, read.type, read.shape = "modality", mask.type, mask.shape
    ir.convenience.replace_all_uses_with(mask, read)
    graph.insert_after(graph[0], [squeeze, cast])
