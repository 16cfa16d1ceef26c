"""Join the processes that `torchrun` or `accelerate launch` started: both say in the environment who is who."""

import os
import sys
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import distributed

from esr_distill.config import TrainConfig
from esr_distill.devices import Devices
from esr_distill.input_error import InputError
from esr_distill.models import choose_device

NAMES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What accelerate's own config file would ask for, and what asks for it here.
NOT_READ = {
    "ACCELERATE_USE_FSDP": "devices.shard",
    "ACCELERATE_USE_DEEPSPEED": "devices.shard (ZeRO is not supported, see docs/devices.md)",
    "ACCELERATE_USE_MEGATRON_LM": "devices.shard (Megatron-LM is not supported)",
}


def join_processes(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> Devices:
    """This process among those of the run; one process where nothing launched more. Returns when all are there.

    A process that waits `devices.timeout_minutes` for another one ends with an error.

    Raises:
        InputError: fewer CUDA devices than processes on this machine, or a launcher that was told what is told to us.
    """
    check_launcher(environment)
    device = choose_device(config.model.device)
    if environment.get("ACCELERATE_USE_CPU", "false").lower() == "true" and device.type != "cpu":
        raise InputError(
            f"model.device must be cpu where accelerate was told to use the CPU, got {config.model.device!r}"
        )
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Devices(device)
    missing = [name for name in NAMES if name not in environment]
    if missing:
        raise InputError(
            f"WORLD_SIZE = {world_size} in the environment must come with {', '.join(NAMES)}, as torchrun and accelerate launch "
            f"set them, got no {' and no '.join(missing)}; unset WORLD_SIZE for a run of one process"
        )
    if device.type == "cuda":
        local_rank, count = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(
                f"the number of processes on a machine must be at most that of its CUDA devices, {count}, "
                f"got a process of local rank {local_rank}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(minutes=config.devices.timeout_minutes))
    return Devices(device, distributed.get_rank(), distributed.get_world_size())


def leave_processes(status: int) -> None:
    """The end of a run that went well: where there are several processes, this one ends here with that exit status. After an
    error there is nothing to agree on: the process just ends.

    Without what Python does at its end, since threads of gloo may still be about then and abort the process (seen with torch
    2.13, docs/log.md). Files are closed by then.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_launcher(environment: Mapping[str, str]) -> None:
    """accelerate's config file has options of its own for what ours decide; one that would be ignored is refused."""
    for name, option in NOT_READ.items():
        if environment.get(name, "false").lower() in ("true", "1"):
            raise InputError(f"accelerate's config must leave this to {option}, got {name}={environment[name]}")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise InputError(
            f"accelerate's mixed_precision must be no, since model.autocast and model.dtype decide, got {precision!r}"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise InputError(
            "accelerate's gradient_accumulation_steps must be 1, since optimizer.accumulation_steps decides, "
            f"got {steps}"
        )
