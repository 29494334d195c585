"""Embedding rows as integers: their own, those of a quantized output projection, and those out of its packed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import CLOSED_FORM, calibrated, chat_batches, no_split, random_site, rng, tiny_loaded
from torch import nn

from splitq_edge.config import QuantConfig, preset
from splitq_edge.errors import SplitQError
from splitq_edge.estimate import estimate
from splitq_edge.exporters.packed_embedding import PackedHeadEmbedding
from splitq_edge.modules.quantized_embedding import HeadEmbedding, QuantizedEmbedding, can_share


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_a_row_is_rounded_by_its_own_scale(bits: int, steps: int) -> None:
    table = torch.randn(20, 24, generator=rng()) * torch.logspace(-3, 3, 20)[:, None]
    embedding = QuantizedEmbedding(table, bits)
    ids = torch.tensor([[3, 0, 19], [19, 7, 3]])
    rows = embedding(ids)
    assert rows.shape == (2, 3, 24)
    half_step = table[ids].abs().amax(-1, keepdim=True) / steps / 2
    assert ((rows - table[ids]).abs() <= half_step * 1.001).all()
    assert embedding.codes.element_size() * embedding.codes.numel() == 20 * 24 * bits // 8


def test_nibbles_need_an_even_width() -> None:
    with pytest.raises(SplitQError, match="embedding: expected none or W8 for an odd hidden size of 23, got W4"):
        QuantizedEmbedding(torch.zeros(4, 23), 4)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("transform", ["identity", "hadamard"])
@pytest.mark.parametrize(("hidden", "tokens"), [(24, 48), (30, 37)])  # 37 and 30 fill no panel and no block
def test_rows_of_the_head_are_its_weight_brought_back(transform: str, bits: int, hidden: int, tokens: int) -> None:
    config = no_split(bits=bits, transform=transform, scale="smoothquant" if transform == "hadamard" else "none")
    head, weight = random_site(config, widths=(hidden, 0, 0), outputs=(tokens,))
    embedding = HeadEmbedding(head)
    ids = torch.tensor([[0, tokens - 1, 5], [16, 15, 17]])
    torch.testing.assert_close(embedding(ids), head.dequantized_weight().T[ids], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        embedding(ids), weight.T[ids], rtol=0, atol=float(weight.abs().max()) / {8: 60, 6: 15, 4: 3}[bits]
    )
    assert torch.equal(PackedHeadEmbedding(embedding)(ids), embedding(ids))
    assert list(embedding.children()) == []


def test_only_a_head_of_the_bits_asked_for_is_shared() -> None:
    sites = {bits: random_site(no_split(bits=bits), widths=(24, 0, 0))[0] for bits in (8, 6, 4, 3)}
    assert [bits for bits, site in sites.items() if can_share(site, 8)] == [8, 6]
    assert [bits for bits, site in sites.items() if can_share(site, 4)] == [4]
    assert not can_share(random_site(no_split(bits=8), widths=(16, 4, 4))[0], 8)
    assert not can_share(None, 8)


def recipe(**settings: str) -> QuantConfig:
    return replace(preset("W4A8"), learning=CLOSED_FORM, **settings)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("lm_head", "embedding"),
    [("W8A8", "W8"), ("W6A8", "W8"), ("W4A8", "W8"), ("W4A8", "W4"), ("none", "W4"), ("W8A8", "W4")],
)
def test_the_model_takes_its_rows_from_where_they_lie(tie: bool, lm_head: str, embedding: str, tmp_path) -> None:
    loaded, batches = tiny_loaded(), chat_batches(2)
    if tie:
        loaded.model.lm_head.weight = loaded.model.get_input_embeddings().weight
    before = loaded.model.get_input_embeddings().weight.detach().clone()
    config = recipe(lm_head=lm_head, embedding=embedding)
    size, portable = (
        estimate(loaded, config, tokens=10, samples=1, packed=packed).extra_bytes["embedding"]
        for packed in (True, False)
    )
    calibrated(loaded, config, batches, tmp_path)
    table = loaded.model.get_input_embeddings()
    shared = tie and (lm_head, embedding) in (("W8A8", "W8"), ("W6A8", "W8"), ("W4A8", "W4"))
    assert isinstance(table, HeadEmbedding if shared else QuantizedEmbedding)
    own = before.numel() * int(embedding[1]) // 8 + 4 * before.shape[0]
    assert size == (0 if shared else own)
    assert portable == (0 if shared and embedding == "W8" else own)
    rows = table(torch.arange(before.shape[0]))
    error = float((rows - before).norm() / before.norm())
    assert 0 < error < (0.2 if embedding == "W4" else 0.04 if shared and lm_head == "W6A8" else 0.02)
    with torch.inference_mode(), loaded.modality_from_inputs():
        assert torch.isfinite(loaded.model(**batches[0]).logits).all()


def test_a_family_that_scales_its_embedding_keeps_the_factor(tmp_path) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) * 3

    loaded, batches = tiny_loaded(), chat_batches(2)
    table = Scaled(272, 96)
    loaded.model.set_input_embeddings(table)
    loaded.model.lm_head.weight = table.weight
    ids = torch.arange(272)
    expected = table(ids).detach()
    calibrated(loaded, recipe(lm_head="W8A8", embedding="W8"), batches, tmp_path)
    rows = loaded.model.get_input_embeddings()(ids)
    assert float((rows - expected).norm() / expected.norm()) < 0.02


def test_float_stays_float(tmp_path) -> None:
    loaded, batches = tiny_loaded(), chat_batches(2)
    table = loaded.model.get_input_embeddings()
    calibrated(loaded, recipe(lm_head="W8A8"), batches, tmp_path)
    assert loaded.model.get_input_embeddings() is table
