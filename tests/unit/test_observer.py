"""What calibration keeps of a site, however the tokens are cut into batches."""

from __future__ import annotations

import pytest
import torch
from builders import chat_batches, rng, tiny_loaded

from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.calibration.runner import collect_stats
from splitq_edge.errors import SplitQError

CHANNELS = 6


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = rng(seed)
    x = torch.randn(count, CHANNELS, generator=generator)
    return x, (torch.rand(count, generator=generator) < 0.4).to(torch.int8)


def observe(x: torch.Tensor, modality: torch.Tensor, cuts: list[int], limit: int = 4096) -> SiteStats:
    observer = Observer("site", CHANNELS, max_text_rows=limit)
    for rows, kinds in zip(x.tensor_split(cuts), modality.tensor_split(cuts), strict=True):
        observer.update(rows, kinds)
    return observer.stats()


def test_absmax_is_kept_per_modality() -> None:
    x = torch.tensor([[1.0, -5.0], [-3.0, 2.0], [7.0, 0.5], [-8.0, 0.25]])
    observer = Observer("site", 2)
    observer.update(x, torch.tensor([0, 0, 1, 1], dtype=torch.int8))
    stats = observer.stats()
    assert stats.text_absmax.tolist() == [3, 5]
    assert stats.vision_absmax.tolist() == [8, 0.5]
    assert (stats.text_tokens, stats.vision_tokens) == (2, 2)
    assert torch.equal(stats.text_rows, x[:2])
    assert stats.channels == 2


@pytest.mark.parametrize("cuts", [[], [1], [17, 18, 300], list(range(50, 1000, 50)), list(range(1, 1000))])
@pytest.mark.parametrize("limit", [1, 7, 64, 4096])
def test_any_cut_into_batches_gives_the_same_statistics(cuts: list[int], limit: int) -> None:
    x, modality = tokens(1000)
    whole, cut = observe(x, modality, [], limit), observe(x, modality, cuts, limit)
    for name in ("vision_absmax", "text_absmax", "text_rows"):
        assert torch.equal(getattr(whole, name), getattr(cut, name)), name
    assert (whole.text_tokens, whole.vision_tokens) == (cut.text_tokens, cut.vision_tokens)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_text_sample_is_bounded_and_evenly_spaced(count: int) -> None:
    x = torch.arange(count, dtype=torch.float32)[:, None].expand(count, CHANNELS)
    rows = observe(x, torch.zeros(count, dtype=torch.int8), list(range(0, count, 10)), limit=64).text_rows[:, 0]
    assert rows.numel() == min(count, rows.numel())
    assert rows.numel() <= 64
    assert rows.numel() > 32 or count <= 32
    stride = 1
    while -(-count // stride) > 64:
        stride *= 2
    assert rows.tolist() == list(range(0, count, stride))


def test_one_modality_alone_leaves_the_other_empty() -> None:
    x, _ = tokens(10)
    text = observe(x, torch.zeros(10, dtype=torch.int8), [4])
    vision = observe(x, torch.ones(10, dtype=torch.int8), [4])
    assert text.vision_absmax.tolist() == [0.0] * CHANNELS
    assert text.vision_tokens == 0
    assert vision.text_rows.shape == (0, CHANNELS)
    assert vision.text_absmax.tolist() == [0.0] * CHANNELS
    assert torch.equal(vision.vision_absmax, x.abs().amax(0))


def test_kept_rows_do_not_follow_a_buffer_that_is_reused() -> None:
    x, _ = tokens(8)
    before = x.clone()
    observer = Observer("site", CHANNELS)
    observer.update(x, torch.zeros(8, dtype=torch.int8))
    x.zero_()
    assert torch.equal(observer.stats().text_rows, before)


def test_low_precision_activations_are_kept_in_float32() -> None:
    x, modality = tokens(20)
    observer = Observer("site", CHANNELS)
    observer.update(x.to(torch.bfloat16), modality)
    assert observer.stats().text_rows.dtype == torch.float32
    assert observer.stats().text_absmax.dtype == torch.float32


def test_every_language_site_of_a_model_is_observed_without_padding() -> None:
    loaded = tiny_loaded()
    batches = chat_batches(3)
    text = sum(int((batch["input_ids"] != 3).sum()) for batch in batches)
    vision = sum(int((batch["input_ids"] == 3).sum()) for batch in batches)
    width = max(batch["input_ids"].shape[1] for batch in batches)
    padded = []
    for batch in batches:  # the same tokens with padding on the left must give the same counts
        missing = width - batch["input_ids"].shape[1] + 2
        ids = torch.nn.functional.pad(batch["input_ids"], (missing, 0))
        mask = torch.nn.functional.pad(batch["attention_mask"], (missing, 0))
        padded.append({**batch, "input_ids": ids, "attention_mask": mask})
    seen = []
    stats = collect_stats(loaded, padded, progress=lambda: seen.append(1))
    assert len(seen) == 3
    sites = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
    assert list(stats) == [f"layers.{block}.{site}" for block in range(2) for site in sites]
    for name, site in stats.items():
        assert (site.text_tokens, site.vision_tokens) == (text, vision), name
        assert site.channels == (160 if name.endswith("mlp_mid") else 96)
        assert site.vision_absmax.min() > 0


def test_observing_leaves_no_hook_behind() -> None:
    loaded = tiny_loaded()
    collect_stats(loaded, chat_batches(1))
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_calibration_without_a_batch_is_an_error() -> None:
    with pytest.raises(SplitQError, match="expected at least one sample, got none"):
        collect_stats(tiny_loaded(), [])
