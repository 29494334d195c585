"""The key-value cache as integers: ranges, packing, and what the graph's step makes of a cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from builders import rng

from splitq_edge.exporters.parts import CacheShape
from splitq_edge.quant.kv_cache import cache_tensors, dequantize_cache, quantize_cache

SHAPE = (2, 3, 5, 16)  # batch, heads, tokens, head_dim


@pytest.mark.parametrize("bits", [8, 4])
def test_every_value_is_within_half_a_step_of_its_tokens_and_heads_scale(bits: int) -> None:
    x = torch.randn(SHAPE, generator=rng()) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale = quantize_cache(x, bits)
    assert scale.shape == (*SHAPE[:3], 1)
    torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1))
    assert bool(((dequantize_cache(codes, scale, bits) - x).abs() <= scale * 0.5001).all())


def test_eight_bits_are_int8_codes() -> None:
    codes, _ = quantize_cache(torch.tensor([[[[-2.0, 1.0, 0.5, 0.0]]]]), 8)
    assert codes.dtype == torch.int8
    assert codes.flatten().tolist() == [-127, 64, 32, 0]


def test_four_bits_lie_two_codes_a_byte_each_half_of_the_head_in_its_nibble() -> None:
    x = torch.tensor([[[[-7.0, 1.0, 3.0, 7.0]]]])
    codes, scale = quantize_cache(x, 4)
    assert codes.dtype == torch.uint8
    assert codes.flatten().tolist() == [(-7 + 8) | (3 + 8) << 4, (1 + 8) | (7 + 8) << 4]
    assert torch.equal(dequantize_cache(codes, scale, 4), x)


def test_every_pair_of_four_bit_codes_survives() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256)
    values = dequantize_cache(codes, torch.ones(1, 1, 1, 1), 4)
    low, high = values.chunk(2, -1)
    assert torch.equal(low, (codes & 15).float() - 8)
    assert torch.equal(high, (codes >> 4).float() - 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_of_zeros_and_no_tokens_are_kept(bits: int) -> None:
    codes, scale = quantize_cache(torch.zeros(SHAPE), bits)
    assert torch.equal(dequantize_cache(codes, scale, bits), torch.zeros(SHAPE))
    codes, scale = quantize_cache(torch.zeros(2, 3, 0, 16), bits)
    assert dequantize_cache(codes, scale, bits).shape == (2, 3, 0, 16)


def config(head_dim: int) -> SimpleNamespace:
    return SimpleNamespace(num_hidden_layers=1, num_key_value_heads=3, head_dim=head_dim)


@pytest.mark.parametrize(("bits", "dtype"), [(0, "float32"), (8, "int8"), (4, "uint8")])
def test_shape_names_and_types_agree_with_the_tensors(bits: int, dtype: str) -> None:
    cache = CacheShape.of(config(16), bits)
    (layer,) = cache.random(2, 5, rng())
    assert cache.names("past") == [f"past.0.{kind}" for kind in cache_tensors(bits)]
    assert len(layer) == len(cache_tensors(bits))
    assert cache.dtype == dtype == str(layer[0].dtype).removeprefix("torch.")
    assert {tuple(tensor.shape[:3]) for tensor in layer} == {(2, 3, 5)}
