"""What one training step of any implementation tells, and the face that all of them have."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepRecord:
    """One step: loss in nats, seconds and most allocated bytes by stage (None on a CPU), and how long its rollouts were."""

    loss: float
    stage_s: dict[str, float]
    stage_peak_bytes: dict[str, int] | None
    response_tokens: int
    longest_rollout: int


class Steps(Protocol):
    """Training steps, one after the other."""

    def step(self) -> StepRecord:
        """Update the student once and wait for the device."""

    def release(self) -> None:
        """Give back all memory but that of the pair."""
