"""The key-value cache as integers: one float32 scale a token and head, symmetric; 4-bit codes two a byte."""

from __future__ import annotations

from typing import Any

import torch

from splitq_edge.quant.affine import quantize_rows

HALF_BITS = 16  # of a cache in float16
NIBBLE_OFFSET = 8  # a stored 4-bit code is code + 8, 0 to 15


def head_dimension(config: Any) -> int:
    """Channels a head of a language model's configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def cache_tensors(bits: int) -> tuple[str, ...]:
    """What is kept of a layer, in order: the ends of the graph's input and output names.

    Args:
        bits: 0 (float32), 16 (float16), 8 or 4.
    """
    return ("key", "value") if bits in (0, HALF_BITS) else ("key", "key_scale", "value", "value_scale")


def quantize_cache(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values as they are stored.

    Args:
        x: [batch, kv_heads, tokens, head_dim] float32.
        bits: 8 or 4; with 4, head_dim is even.

    Returns:
        Codes and scale [batch, kv_heads, tokens, 1] float32. 8 bits: int8 [.., head_dim]. 4 bits: uint8
        [.., head_dim / 2]; byte j holds channel j in its bits 0-3 and channel j + head_dim / 2 in its bits 4-7.
    """
    codes, scale = quantize_rows(x, bits)
    if bits == 8:
        return codes.to(torch.int8), scale
    low, high = (codes + NIBBLE_OFFSET).chunk(2, -1)  # [.., head_dim / 2] each
    return (low + 16 * high).to(torch.uint8), scale


def dequantize_cache(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `quantize_cache`: [batch, kv_heads, tokens, head_dim] float32.

    Nibbles are taken apart in float32, where these numbers are exact: ONNX has no shift of every integer type.
    """
    stored = codes.float()
    if bits == 4:
        high = torch.floor(stored * 0.0625)
        stored = torch.cat([stored - 16 * high, high], -1) - NIBBLE_OFFSET
    return stored * scale
