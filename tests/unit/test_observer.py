"""What calibration keeps of a site, however the samples are cut into batches or dealt to processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLOSED_FORM, chat_batches, rng, tiny_loaded

from splitq_edge.calibration import runner
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.observer import Observer, SiteStats
from splitq_edge.calibration.runner import Calibration
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.config import PRESETS
from splitq_edge.errors import SplitQError
from splitq_edge.parallel import Processes

CHANNELS = 6
ALONE = Processes(alone=True)


def tokens(samples: int, length: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [samples, length, CHANNELS], modality and keep [samples, length]."""
    generator = rng(seed)
    x = torch.randn(samples, length, CHANNELS, generator=generator)
    modality = (torch.rand(samples, length, generator=generator) < 0.4).to(torch.int8)
    keep = torch.rand(samples, length, generator=generator) < 0.9
    return x, modality, keep


def observe(samples: int, cuts: list[int], limit: int, order: list[int] | None = None) -> SiteStats:
    observer = Observer("site", samples, max_rows=limit)
    x, modality, keep = tokens(samples)
    numbers = torch.tensor(order or range(samples))
    for part in numbers.tensor_split(cuts):
        observer.update(x[part], modality[part], keep[part], part)
    return observer.stats(ALONE)


def one_row(values: list[list[float]], modality: list[int], limit: int = 64) -> SiteStats:
    observer = Observer("site", 1, max_rows=limit)
    keep = torch.ones(1, len(modality), dtype=torch.bool)
    observer.update(torch.tensor([values]), torch.tensor([modality], dtype=torch.int8), keep, torch.tensor([0]))
    return observer.stats(ALONE)


def test_absmax_and_rows_are_kept_per_modality() -> None:
    values = [[1.0, -5.0], [-3.0, 2.0], [7.0, 0.5], [-8.0, 0.25]]
    stats = one_row(values, [0, 0, 1, 1])
    assert stats.text_absmax.tolist() == [3, 5]
    assert stats.vision_absmax.tolist() == [8, 0.5]
    assert stats.absmax.tolist() == [8, 5]
    assert (stats.text_tokens, stats.vision_tokens) == (2, 2)
    assert stats.text_rows.tolist() == values[:2]
    assert stats.vision_rows.tolist() == values[2:]
    assert stats.channels == 2


@pytest.mark.parametrize("cuts", [[1], [7, 8, 20], list(range(1, 30))])
@pytest.mark.parametrize("limit", [1, 7, 64, 4096])
def test_any_cut_into_batches_and_any_order_gives_the_same_statistics(cuts: list[int], limit: int) -> None:
    whole = observe(30, [], limit)
    for other in (
        observe(30, cuts, limit),
        observe(30, cuts, limit, order=torch.randperm(30, generator=rng()).tolist()),
    ):
        for name in ("vision_absmax", "text_absmax", "text_rows", "vision_rows"):
            assert torch.equal(getattr(whole, name), getattr(other, name)), name
        assert (whole.text_tokens, whole.vision_tokens) == (other.text_tokens, other.vision_tokens)


@pytest.mark.parametrize("limit", [1, 7, 64])
def test_kept_rows_are_bounded_and_come_from_many_samples(limit: int) -> None:
    stats = observe(30, [4, 9], limit)
    for rows in (stats.text_rows, stats.vision_rows):
        assert 0 < rows.shape[0] <= limit


def test_rows_of_a_sample_are_evenly_spaced() -> None:
    values = [[float(i), 0.0] for i in range(100)]
    assert one_row(values, [0] * 100, limit=10).text_rows[:, 0].tolist() == list(range(0, 100, 10))


def test_padding_is_left_out() -> None:
    observer = Observer("site", 1)
    keep = torch.tensor([[False, True]])
    observer.update(torch.tensor([[[99.0], [1.0]]]), torch.zeros(1, 2, dtype=torch.int8), keep, torch.tensor([0]))
    stats = observer.stats(ALONE)
    assert stats.text_absmax.tolist() == [1]
    assert stats.text_tokens == 1


def test_one_modality_alone_leaves_the_other_empty() -> None:
    stats = one_row([[1.0, 2.0]] * 3, [0] * 3)
    assert stats.vision_absmax.tolist() == [0, 0]
    assert stats.vision_rows.shape == (0, 2)
    assert stats.vision_tokens == 0


def test_kept_rows_do_not_follow_a_buffer_that_is_reused() -> None:
    x = torch.ones(1, 3, 2)
    observer = Observer("site", 1)
    observer.update(x, torch.zeros(1, 3, dtype=torch.int8), torch.ones(1, 3, dtype=torch.bool), torch.tensor([0]))
    x.zero_()
    assert observer.stats(ALONE).text_rows.min() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [0, 1])
def test_activations_that_are_not_finite_are_an_error_that_names_the_site(value: float, kind: int) -> None:
    observer = Observer("layers.3.mlp_in", 1)
    x = torch.ones(1, 3, 2)
    x[0, 1, 1] = value
    keep = torch.ones(1, 3, dtype=torch.bool)
    observer.update(x, torch.full((1, 3), kind, dtype=torch.int8), keep, torch.tensor([0]))
    with pytest.raises(SplitQError, match=r"layers\.3\.mlp_in: expected finite activations, got NaN or infinity"):
        observer.stats(ALONE)


def test_low_precision_activations_are_kept_in_float32() -> None:
    observer = Observer("site", 1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    observer.update(
        torch.ones(1, 3, 2, dtype=torch.bfloat16), torch.zeros(1, 3, dtype=torch.int8), mask, torch.tensor([0])
    )
    assert observer.stats(ALONE).text_rows.dtype == torch.float32


def calibration(folder: Path) -> Calibration:
    config = PRESETS["W4A8"].__class__.from_dict({**PRESETS["W4A8"].to_dict(), "learning": vars(CLOSED_FORM)})
    state = CalibrationState(folder / "state", {})
    return Calibration(tiny_loaded(), config, state, ActivationStore(folder / "activations"), 0, ALONE)


def test_every_language_site_is_observed_without_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = chat_batches(3)
    text = sum(int((batch["input_ids"] != 3).sum()) for batch in batches)
    vision = sum(int((batch["input_ids"] == 3).sum()) for batch in batches)
    run = calibration(tmp_path)
    seen: dict[str, SiteStats] = {}
    observe_block = runner.observe_block

    def keep(*arguments: Any) -> dict[str, SiteStats]:
        stats = observe_block(*arguments)
        seen.update(stats)
        return stats

    monkeypatch.setattr(runner, "observe_block", keep)
    run.run(batches, finished=run.state.start(resume=False))
    sites = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
    assert list(seen) == [f"layers.{block}.{site}" for block in range(2) for site in sites]
    for name, site in seen.items():
        assert (site.text_tokens, site.vision_tokens) == (text, vision), name
        assert site.channels == (160 if name.endswith("mlp_mid") else 96)
        assert site.vision_absmax.min() > 0


def test_calibration_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    run = calibration(tmp_path)
    before = {name: value.clone() for name, value in run.loaded.model.state_dict().items()}
    run.run(chat_batches(2), finished=run.state.start(resume=False))
    after = run.loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in run.loaded.model.modules())
    assert not any(run.store._in_memory)


class Group(Processes):
    """One of eight processes, told what the others say."""

    def __init__(self, rank: int, said: list[int] | None = None) -> None:
        super().__init__(alone=True)
        self.rank, self.size, self.said = rank, 8, said

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.said is None else self.said


def test_more_processes_than_samples_of_a_batch_are_an_error(tmp_path: Path) -> None:
    # However many samples there are: the last four of eight processes have none of any batch of four.
    dealt = [runner.padded_batches(chat_batches(12), 4, 0, Group(rank)) for rank in range(8)]
    shares = [sum(batch.samples.numel() for batch in batches) for batches in dealt]
    assert shares == [3] * 4 + [0] * 4
    run = calibration(tmp_path)
    run.processes = Group(0, shares)
    with pytest.raises(SplitQError, match=r"expected samples for each of 8 processes, got none for 4 with 12 samples"):
        run.run(chat_batches(12), finished=run.state.start(resume=False))


def test_calibration_without_a_sample_is_an_error(tmp_path: Path) -> None:
    run = calibration(tmp_path)
    with pytest.raises(SplitQError, match="expected at least one sample, got none"):
        run.run([], finished=0)
