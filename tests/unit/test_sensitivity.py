"""Gradients taken block by block are those of one backward through the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import chat_batches, left_padded, prompt_ids, random_pixels, tiny_loaded
from torch import nn

from splitq_edge.calibration import sensitivity
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import BlockInputs, first_block_inputs, padded_batches
from splitq_edge.calibration.sensitivity import Sensitivity, collect_sensitivity, token_importance
from splitq_edge.loading import LoadedModel, load_model
from splitq_edge.modality import modality_of
from splitq_edge.parallel import Processes

ALONE = Processes(alone=True)


def samples(*, text_only: bool = False) -> list[dict[str, torch.Tensor]]:
    """Three chats of different lengths; the last tokens are the answer."""
    encoded = chat_batches(3)
    if text_only:
        encoded = []
        for words in ("first prompt: yes", "another: no", "x: maybe"):
            ids, mask = left_padded([prompt_ids(words)])
            encoded.append({"input_ids": ids, "attention_mask": mask})
    for number, sample in enumerate(encoded):
        answer = torch.zeros_like(sample["input_ids"], dtype=torch.bool)
        answer[:, -3 - number :] = True
        sample["answer"] = answer
    return encoded


def block_by_block(
    loaded: LoadedModel, encoded: list[dict[str, torch.Tensor]], folder: Path, size: int = 2
) -> tuple[Sensitivity, BlockInputs]:
    batches = padded_batches(encoded, size, 0, ALONE)
    with loaded.outside_blocks():
        inputs = first_block_inputs(loaded, batches, ActivationStore(folder))
    return collect_sensitivity(loaded, inputs, ALONE), inputs


def whole_model(loaded: LoadedModel, encoded: list[dict[str, torch.Tensor]]) -> Sensitivity:
    """One sample at a time, autograd through everything: mean |gradient| by modality at every site and block."""
    total = sum(int(sample["answer"][:, 1:].sum()) for sample in encoded)
    sums: dict[str, torch.Tensor] = {}
    for sample in encoded:
        kept: list[tuple[str, torch.Tensor]] = []

        def keep(name: str, kept: list[tuple[str, torch.Tensor]] = kept):
            def hook(_module: nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
                value = output[0] if isinstance(output, tuple) else output
                value.retain_grad()
                kept.append((name, value))

            return hook

        handles = []
        for index, block in enumerate(loaded.language_blocks()):
            handles.append(block.register_forward_hook(keep(f"block.{index}")))
            for site in loaded.adapter.language_block:
                name = loaded.adapter.site_name(index, site)
                handles += [block.get_submodule(p).register_forward_hook(keep(name)) for p in site.linears]
        logits = loaded.model(**{k: v for k, v in sample.items() if k != "answer"}, use_cache=False).logits
        wanted = sample["answer"][:, 1:]
        loss = nn.functional.cross_entropy(logits[:, :-1][wanted], sample["input_ids"][:, 1:][wanted], reduction="sum")
        (loss / total).backward()
        for handle in handles:
            handle.remove()
        modality = modality_of(sample["input_ids"], loaded.image_token_id)
        for name, value in kept:
            assert value.grad is not None
            entry = sums.setdefault(name, torch.zeros(2, 2))
            for kind in (0, 1):
                entry[kind, 0] += value.grad[modality == kind].abs().sum()
                entry[kind, 1] += value.grad[modality == kind].numel()
    return {
        name: tuple(float(e[kind, 0] / e[kind, 1]) if e[kind, 1] else 1.0 for kind in (0, 1))  # type: ignore[misc]
        for name, e in sums.items()
    }


def assert_same(found: Sensitivity, expected: Sensitivity) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


@pytest.fixture(scope="module")
def expected() -> Sensitivity:
    return whole_model(tiny_loaded(), samples())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_block_by_block_are_those_of_the_whole_model(
    size: int, expected: Sensitivity, tmp_path: Path
) -> None:
    found, inputs = block_by_block(tiny_loaded(), samples(), tmp_path, size)
    assert_same(found, expected)
    # Behind the last attention an image token meets nothing that the answer depends on.
    unseen = {"layers.1.mlp_in", "layers.1.mlp_mid", "layers.1.attn_out", "block.1"}
    assert {name for name, (_, vision) in found.items() if vision == 0} == unseen
    assert all(text > 0 for text, _ in found.values())
    before = first_block_inputs(tiny_loaded(), padded_batches(samples(), size, 0, ALONE), ActivationStore(tmp_path))
    for number in inputs.own:  # the stream of the calibration is as it was, and nothing else is left in the store
        assert torch.equal(inputs.get("float", number), before.get("float", number))
        for stage in range(3):
            with pytest.raises(FileNotFoundError):
                inputs.get(f"pass-{stage}", number)


def test_lazily_loaded_model_gives_the_same(expected: Sensitivity, checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_model(str(checkpoint), lazy=True)
    found, _ = block_by_block(loaded, samples(), tmp_path)
    assert_same(found, expected)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


def test_modality_that_does_not_occur_counts_one(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    found, _ = block_by_block(loaded, samples(text_only=True), tmp_path)
    assert_same(found, whole_model(loaded, samples(text_only=True)))
    assert {vision for _, vision in found.values()} == {1.0}


def test_answer_tokens_alone_make_the_loss(expected: Sensitivity, tmp_path: Path) -> None:
    without = [{k: v for k, v in sample.items() if k != "answer"} for sample in samples()]
    found, _ = block_by_block(tiny_loaded(), without, tmp_path)
    assert all(found[name] != pytest.approx(values, rel=1e-2) for name, values in expected.items())


def test_importance_of_tokens_is_half_their_gradient_and_half_the_same_for_all() -> None:
    gradient = torch.tensor([[[9.0, 9.0], [3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], [[0.0] * 2] * 4])
    keep = torch.tensor([[False, True, True, True], [True] * 4])
    importance = token_importance(gradient, keep)
    # norms 5, 0 and 1 have mean 2; a sample without gradient weighs its tokens alike
    torch.testing.assert_close(importance[0], torch.tensor([0.0, 1.75, 0.5, 0.75]))
    torch.testing.assert_close(importance[1], torch.full((4,), 0.5))


def test_importance_is_kept_for_every_block_and_batch(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    batches = padded_batches(samples(), 2, 0, ALONE)
    with loaded.outside_blocks():
        inputs = first_block_inputs(loaded, batches, ActivationStore(tmp_path))
    collect_sensitivity(loaded, inputs, ALONE, tokens=True)
    for index in range(loaded.block_count):
        for number in inputs.own:
            importance = inputs.get(f"importance-{index}", number)
            keep = inputs.batch(number).keep
            assert importance.shape == keep.shape
            assert (importance[~keep] == 0).all()
            torch.testing.assert_close(importance.sum(-1), keep.sum(-1).float())
    # the last block's output matters only where an answer is predicted
    last = inputs.get(f"importance-{loaded.block_count - 1}", 0)
    assert (last == 0.5).any()
    assert (last > 1).any()


def test_a_choice_of_batches_holds_short_and_long_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "MAX_BATCHES", 2)
    encoded = []
    for length in range(4, 24, 4):
        ids, mask = left_padded([prompt_ids("x" * length)])
        encoded.append({"input_ids": ids, "attention_mask": mask})
    loaded = tiny_loaded()
    with loaded.outside_blocks():
        inputs = first_block_inputs(loaded, padded_batches(encoded, 1, 0, ALONE), ActivationStore(tmp_path))
    looked_at: set[int] = set()
    backward = sensitivity._backward
    monkeypatch.setattr(sensitivity, "_backward", lambda *given: (looked_at.add(given[4]), backward(*given))[1])
    collect_sensitivity(loaded, inputs, ALONE)
    assert looked_at == {0, 3}


def test_without_an_answer_the_loss_is_about_text_that_something_predicts(tmp_path: Path) -> None:
    encoded = []
    for row in (prompt_ids("a", 1, "bc"), prompt_ids("d", 1, "e")):  # the second is padded by one
        ids, mask = left_padded([row])
        encoded.append({"input_ids": ids, "attention_mask": mask, "pixel_values": random_pixels(1)})
    loaded = tiny_loaded()
    with loaded.outside_blocks():
        inputs = first_block_inputs(loaded, padded_batches(encoded, 2, 0, ALONE), ActivationStore(tmp_path))
    wanted = sensitivity._answer_tokens(inputs, 0)
    ids, keep = inputs.tokens(0)["input_ids"], inputs.batch(0).keep
    text = ids != loaded.image_token_id
    for row in range(2):
        first = int(keep[row].nonzero()[0])
        expected = [place for place in range(first + 1, ids.shape[1]) if text[row, place]]
        assert wanted[row].nonzero().flatten().tolist() == [place - 1 for place in expected]
    assert not keep.all()
