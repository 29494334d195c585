"""Settings and folders that the whole suite shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import write_chats, write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Sums in one order on every machine, and no fight with what else runs on it.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA as a Hugging Face folder; read only."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration folder of two chats with pictures; read only."""
    return write_chats(tmp_path_factory.mktemp("calibration") / "chats")
