"""Stage times of a training step with the most memory of each stage, also for the clock that `train_step` makes itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import esr_distill.train_step
from esr_distill.metrics import StageClock


class MemoryClock(StageClock):
    """On a CUDA device also the most bytes that were allocated in each stage, weights and optimizer included.

    A stage inside another one ends what the outer one had seen: the outer one's figure is then that of its last part.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.begin_peak()
        with super().__call__(stage):
            yield
        self.end_peak(stage)

    def begin_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def end_peak(self, stage: str) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peak_bytes[stage] = max(self.peak_bytes.get(stage, 0), peak)


@contextmanager
def clocks_of_train_step() -> Iterator[list[MemoryClock]]:
    """Inside, each `train_step` counts with a `MemoryClock`, which is added to the list."""
    made: list[MemoryClock] = []

    def make(device: torch.device) -> MemoryClock:
        made.append(MemoryClock(device))
        return made[-1]

    before = esr_distill.train_step.StageClock
    esr_distill.train_step.StageClock = make
    try:
        yield made
    finally:
        esr_distill.train_step.StageClock = before
