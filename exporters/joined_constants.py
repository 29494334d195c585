"""The short constants of a `SplitQLinear` node, one behind the other in one tensor (docs/ops.md).

ONNX Runtime copies its list of initializers at every run; with one tensor in place of up to 17 a decoder's list is less
than a third as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from splitq_edge.exporters.specs import SplitQLinearSpec, joined_factor_shape

PLACE_MULTIPLE = 16  # numbers; each array begins at one, so that a cache line of the tensor is one of the array


def is_weight(name: str) -> bool:
    """Whether an input holds codes of a weight or of a factor of it."""
    return name.startswith("weight_") or name in ("u", "v")


def join_constants(spec: SplitQLinearSpec, arrays: Mapping[str, np.ndarray]) -> tuple[SplitQLinearSpec, np.ndarray]:
    """Put all constants but the weights of a node into one tensor.

    Args:
        spec: of the node with an input for each of them.
        arrays: these, float32 and the channel order int32, by the contract's names.

    Returns:
        The spec of the node with `constants`, and that input, [numbers] float32.
    """
    sizes = [arrays[name].size if name in arrays else 0 for name in spec.inputs[:-1]]
    tensor = np.zeros(joined_size(sizes), np.float32)
    for name, start, size in places(sizes):
        tensor[start : start + size] = arrays[name].reshape(-1)  # a channel is below 2^24, exact in float32
    return replace(spec, constant_sizes=tuple(sizes)), tensor


def places(sizes: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Name, first number and count of each array in `constants`."""
    start = 0
    for name, size in zip(SplitQLinearSpec.inputs, sizes, strict=False):
        if size:
            yield name, start, size
            start += -(-size // PLACE_MULTIPLE) * PLACE_MULTIPLE


def joined_size(sizes: Sequence[int]) -> int:
    """Numbers in `constants`."""
    return sum(-(-size // PLACE_MULTIPLE) * PLACE_MULTIPLE for size in sizes)


def shape_of(name: str, sizes: Sequence[int], widths: Sequence[int], block_size: int, outputs: int) -> tuple[int, ...]:
    """Shape of an array in `constants` where it has an input of its own.

    Args:
        name: of the contract.
        sizes: numbers of each input, 0 for those that `constants` lacks.
        widths: channels of the groups.
        block_size: of the main weight.
        outputs: N.
    """
    if name.startswith(("p1_", "p2_")):
        return joined_factor_shape(name, sizes, widths)
    size = sizes[SplitQLinearSpec.inputs.index(name)]
    return (size // outputs, outputs) if name == "scale_main" and block_size else (size,)


def take_apart(
    tensor: np.ndarray, sizes: Sequence[int], widths: Sequence[int], block_size: int, outputs: int
) -> dict[str, np.ndarray]:
    """Inverse of `join_constants`: the arrays by the contract's names."""
    found = {}
    for name, start, size in places(sizes):
        array = tensor[start : start + size].reshape(shape_of(name, sizes, widths, block_size, outputs))
        found[name] = array.astype(np.int32) if name == "channel_order" else array
    return found
