"""The processes of a run: which one this is, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import distributed

from esr_distill.input_error import InputError

__all__ = ["Devices"]


@dataclass(frozen=True)
class Devices:
    """This process among those of the run, each with a device of its own. One process without a launcher is rank 0 of 1.

    With more than one, every method is a meeting of all processes: each calls it, in the same order. Values travel through the
    CPU's memory, gradients and sharded weights do not (`gradients.py`, `sharding.py`).
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def console(self, console: Console) -> Console:
        """The console of the main process; the others print nothing."""
        return console if self.is_main else Console(quiet=True)

    def sum(self, value: float) -> float:
        """The sum over all processes, in float64."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.item()

    def any(self, value: bool) -> bool:
        """Whether it is true in one process or more."""
        return self.sum(float(value)) > 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(0.0)

    def gathered(self, value: object) -> list:
        """The value of every process, by rank. Tensors must be on the CPU."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: object) -> object:
        """The main process's value."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def done_by_main(self, work: Callable[[], object]) -> object:
        """What `work` gives in the main process, which alone does it. Tensors must be on the CPU.

        Raises:
            InputError, FloatingPointError: as `work` did, in every process, so that none waits for what does not come.
        """
        found = error = None
        if self.is_main:
            try:
                found = work()
            except (InputError, FloatingPointError) as raised:
                error = raised
        found, error = self.from_main((found, error))
        if error is not None:
            raise error
        return found
