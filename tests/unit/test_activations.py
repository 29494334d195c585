"""The store of hidden states: what stays in memory, what goes to disk, renaming and clearing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitq_edge.calibration.activations import ActivationStore

SIZE = 10 * 4  # bytes of a tensor below


def tensor(value: int) -> torch.Tensor:
    return torch.full((2, 5), float(value))


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Room for two tensors in memory."""
    return ActivationStore(tmp_path / "scratch", 2 * SIZE)


def files(store: ActivationStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir()) if store.folder.exists() else []


def test_tensors_beyond_the_budget_go_to_disk_and_come_back_equal(store: ActivationStore) -> None:
    for number in range(4):
        store.put(str(number), tensor(number))
    assert files(store) == ["2.npy", "3.npy"]
    assert all(path.stat().st_size >= SIZE for path in store.folder.iterdir())
    assert all(torch.equal(store.get(str(number)), tensor(number)) for number in range(4))


def test_without_a_limit_nothing_goes_to_disk(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "scratch")
    for number in range(50):
        store.put(str(number), tensor(number))
    assert files(store) == []


def test_no_budget_puts_everything_on_disk(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path / "scratch", 0)
    store.put("a", tensor(1))
    assert files(store) == ["a.npy"]


def test_dropped_tensors_make_room(store: ActivationStore) -> None:
    for number in range(3):
        store.put(str(number), tensor(number))
    store.drop("0")
    store.put("3", tensor(3))
    assert files(store) == ["2.npy"]
    store.drop("2")
    assert files(store) == []
    store.drop("never there")


def test_replaced_tensors_are_counted_once(store: ActivationStore) -> None:
    for value in range(20):
        store.put("a", tensor(value))
        store.put("b", tensor(-value))
    assert files(store) == []
    assert torch.equal(store.get("a"), tensor(19))


def test_a_kept_tensor_does_not_change_with_its_source(tmp_path: Path) -> None:
    for budget in (None, 0):
        store = ActivationStore(tmp_path / str(budget), budget)
        source = tensor(1)
        store.put("a", source)
        source.zero_()
        assert torch.equal(store.get("a"), tensor(1))


def test_renaming_moves_tensors_in_memory_and_on_disk_over_what_was_there(store: ActivationStore) -> None:
    for key, value in (("a", 0), ("b", 1), ("c", 2), ("d", 3)):
        store.put(key, tensor(value))
    store.rename("a", "d")  # memory over disk
    store.rename("c", "b")  # disk over memory
    assert torch.equal(store.get("d"), tensor(0))
    assert torch.equal(store.get("b"), tensor(2))
    assert files(store) == ["b.npy"]
    store.put("e", tensor(4))  # b's place in memory is free again
    assert files(store) == ["b.npy"]


def test_clearing_leaves_no_file_and_frees_the_budget(store: ActivationStore) -> None:
    for number in range(4):
        store.put(str(number), tensor(number))
    store.clear()
    assert files(store) == []
    store.put("a", tensor(1))
    store.put("b", tensor(1))
    assert files(store) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_kinds_of_tensors_survive_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, 0)
    value = torch.tensor([[0, 1, 1]]).to(dtype)
    store.put("a", value)
    assert store.get("a").dtype == dtype
    assert torch.equal(store.get("a"), value)
