"""Settings of the whole suite: one thread, so that results and times do not depend on the machine's load."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
