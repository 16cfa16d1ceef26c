"""The launch that `check` asks about. `check` itself is one process, before there are others, so it must be told of them."""

from dataclasses import dataclass, field

import torch

from esr_distill.config import DevicesConfig, TrainConfig
from esr_distill.config.require import require
from esr_distill.devices import Devices
from esr_distill.devices.check_devices import check_devices


@dataclass(frozen=True)
class PlannedLaunch:
    """The number of processes that will be started, each with a device of its own, and what the config says of them."""

    processes: int = 1
    options: DevicesConfig = field(default_factory=DevicesConfig)

    def __post_init__(self) -> None:
        require(self.processes >= 1, "--processes", ">= 1", self.processes)

    @property
    def is_student_sharded(self) -> bool:
        return self.options.shard != "none"

    @property
    def is_teacher_sharded(self) -> bool:
        return self.options.shard == "both"

    @property
    def fix(self) -> str:
        """What to do where the options do not suit the number of processes."""
        if self.processes == 1 and self.is_student_sharded:
            return "say how many processes you will start: esr-distill check --processes N"
        return (
            f"change what the message names, or start another number of processes than {self.processes} (--processes)"
        )

    def check(self, config: TrainConfig, device: torch.device) -> None:
        """What each of these processes would refuse. Raises InputError."""
        check_devices(config, Devices(device, world_size=self.processes))

    def describe(self) -> str:
        """For whom a number is."""
        if self.processes == 1:
            return "a run of one process"
        return f"each of {self.processes} processes (devices.shard {self.options.shard})"


ONE_PROCESS = PlannedLaunch()
