"""The processes of a run."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require


@dataclass(frozen=True)
class DevicesConfig:
    """The processes of a run, which torchrun or accelerate launch starts (docs/devices.md)..

    Args:
        shard: Whose weights are divided over the processes (FSDP2), with the student's also its gradients and optimizer states;
            none gives every process all of both models.
        timeout_minutes: How long a process waits for another one before it ends with an error.
    """

    shard: Literal["none", "student", "both"] = "none"
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        require(self.timeout_minutes > 0, "devices.timeout_minutes", "> 0", self.timeout_minutes)
