"""The command that goes on with a run, for whoever stopped it."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from esr_distill.devices import Devices
from esr_distill.kept_checkpoints import find_checkpoints


def resume_command(output_dir: Path, devices: Devices, environment: Mapping[str, str] = os.environ) -> str:
    """One line to copy. Of several processes as many are started again, by torchrun, whoever launched these."""
    arguments = f"train --resume {shlex.quote(str(output_dir))}"
    if devices.world_size == 1:
        return f"esr-distill {arguments}"
    machines = int(environment.get("GROUP_WORLD_SIZE", "1"))
    if machines == 1:
        place = "--standalone"
    else:
        address = f"--master_addr {environment['MASTER_ADDR']} --master_port {environment['MASTER_PORT']}"
        place = f"--nnodes {machines} --node_rank NUMBER_OF_THIS_MACHINE {address}"
    count = devices.world_size // machines
    return f"torchrun {place} --nproc_per_node {count} -m esr_distill.command_line {arguments}"


def what_is_left(output_dir: Path, devices: Devices) -> str:
    """For the message of a run that ended too early: its newest checkpoint, and how to go on with it."""
    checkpoints = find_checkpoints(output_dir)
    if not checkpoints:
        return "there is no checkpoint yet, so begin again with the same command"
    return f"{checkpoints[-1]} is whole, go on with: {resume_command(output_dir, devices)}"
