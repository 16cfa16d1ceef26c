"""The log of a process that is not the main one: it writes nothing."""

from pathlib import Path

from esr_distill.config import TrainConfig
from esr_distill.devices import Devices
from esr_distill.monitoring.run_log import RunLog


def open_log(config: TrainConfig, output_dir: Path, devices: Devices) -> RunLog:
    return RunLog(config, output_dir) if devices.is_main else FollowerLog(config, output_dir)


class FollowerLog(RunLog):
    """Takes what a `RunLog` takes. The folder may lie on a machine that this process does not see."""

    def __enter__(self) -> "FollowerLog":
        return self

    def start_anew(self) -> None:
        pass

    def go_on_after(self, step: int) -> None:
        pass

    def steps(self) -> list[dict]:
        return []

    def write(self, record: dict) -> None:
        pass

    def write_samples(self, rows: list[dict]) -> None:
        pass
