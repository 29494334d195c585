"""Hidden states of the calibration samples between two blocks: in memory while a budget lasts, else on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch


class ActivationStore:
    """Keeps tensors by key.

    Args:
        folder: where tensors go that do not fit; made when first needed.
        budget: bytes that may stay in memory, None for no limit.
    """

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        self.folder = folder
        self.budget = budget
        self._used = 0
        self._in_memory: dict[str, torch.Tensor] = {}
        self._on_disk: set[str] = set()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor; one with the same key is replaced."""
        self.drop(key)
        size = tensor.numel() * tensor.element_size()
        if self.budget is None or self._used + size <= self.budget:
            self._in_memory[key] = tensor.detach().clone()
            self._used += size
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self._path(key), tensor.detach().cpu().numpy())
        self._on_disk.add(key)

    def get(self, key: str, device: torch.device | None = None) -> torch.Tensor:
        """The tensor, on `device` if given."""
        kept = self._in_memory.get(key)
        tensor = torch.from_numpy(np.load(self._path(key))) if kept is None else kept
        return tensor if device is None else tensor.to(device)

    def drop(self, key: str) -> None:
        """Forget a tensor; unknown keys are ignored."""
        if key in self._in_memory:
            tensor = self._in_memory.pop(key)
            self._used -= tensor.numel() * tensor.element_size()
        elif key in self._on_disk:
            self._on_disk.discard(key)
            os.unlink(self._path(key))

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another key; what had it is forgotten."""
        self.drop(new)
        if old in self._in_memory:
            self._in_memory[new] = self._in_memory.pop(old)
        else:
            os.replace(self._path(old), self._path(new))
            self._on_disk.discard(old)
            self._on_disk.add(new)

    def clear(self) -> None:
        """Forget everything."""
        for key in [*self._in_memory, *self._on_disk]:
            self.drop(key)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"
