"""The processes of a run."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require


@dataclass(frozen=True)
class DevicesConfig:
    """The processes of a run, which torchrun or accelerate launch starts (docs/devices.md).

    Args:
        shard: Whose weights are divided over the processes (FSDP2), with the student's also its gradients and optimizer states;
            none gives every process all of both models.
        reshard_after_forward: Whether a sharded student gives gathered weights back between forward and backward and gathers them
            again; false keeps them meanwhile: less communication, more memory. These are the stages 3 and 2 of ZeRO.
        timeout_minutes: How long a process waits for another one before it ends with an error.
    """

    shard: Literal["none", "student", "both"] = "none"
    reshard_after_forward: bool = True
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        require(
            self.reshard_after_forward or self.shard != "none",
            "devices.reshard_after_forward",
            "true where devices.shard is none",
            False,
        )
        require(self.timeout_minutes > 0, "devices.timeout_minutes", "> 0", self.timeout_minutes)
