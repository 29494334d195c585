"""Calibration over several processes: samples are dealt out, sums and maxima are taken over all of them.

Started with `accelerate launch`; a process started alone is a group of one and nothing is communicated.
"""

from __future__ import annotations

from typing import Any

import torch


class Processes:
    """The group of processes that calibrate together.

    Args:
        alone: do not look for a group.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.rank, self.size = 0, 1
        if alone or not _launched():
            return
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.size = state.process_index, state.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """One value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def _launched() -> bool:
    """Whether a launcher set up a group (accelerate and torchrun both set WORLD_SIZE)."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1
