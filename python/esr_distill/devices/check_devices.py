"""What cannot be done in several parts or processes, refused before the first step."""

from dataclasses import asdict

from torch import nn

from esr_distill.config import TrainConfig
from esr_distill.devices import Devices
from esr_distill.input_error import InputError


def check_devices(config: TrainConfig, devices: Devices) -> None:
    """Raises InputError for options that contradict the number of processes, of parts, or the shards."""
    rollout, parts, processes = config.rollout, config.optimizer.accumulation_steps, devices.world_size
    samples = rollout.samples_per_prompt
    if rollout.batch_size % (samples * parts * processes):
        raise InputError(
            f"rollout.batch_size must be a multiple of rollout.samples_per_prompt = {samples} times "
            f"optimizer.accumulation_steps = {parts} times the number of processes = {processes}, got {rollout.batch_size}"
        )
    if parts > 1 and rollout.overlap_teacher:
        raise InputError(
            f"rollout.overlap_teacher must be false with optimizer.accumulation_steps = {parts}, since the teacher reads "
            "all prompts at once, got true"
        )
    if config.devices.shard != "none":
        check_shards(config, devices)


def check_shards(config: TrainConfig, devices: Devices) -> None:
    shard = config.devices.shard
    if devices.world_size == 1:
        raise InputError(f"devices.shard must be none in a run of one process, got {shard!r} (docs/devices.md)")
    if config.model.lora.use_peft:
        raise InputError(f"devices.shard must be none with model.lora.use_peft, got {shard!r}")
    if shard == "both" and config.model.teacher_offload:
        raise InputError("devices.shard must be none or student with model.teacher_offload, got 'both'")
    if shard == "both" and config.model.trust_remote_code:
        raise InputError(
            "devices.shard must be none or student with model.trust_remote_code, since processes are sent the structure of a "
            "sharded teacher by the names of its classes, got 'both'"
        )
    if devices.device.type == "cuda" and config.rollout.cuda_graphs:
        raise InputError(
            "rollout.cuda_graphs must be false with devices.shard, since the gathered weights lie elsewhere in every step, "
            "got true"
        )


def check_same(config: TrainConfig, student: nn.Module, prompts: dict[str, str], devices: Devices) -> None:
    """All processes must have the same options, weights and prompts: they start as one model and stay one by equal steps, each
    with its part of the same rollouts.

    Args:
        prompts: a digest of the prompts of each option.

    Raises:
        InputError: they have not. Every process raises it.
    """
    sums = [(name, p.detach().double().sum().item()) for name, p in student.named_parameters()]
    others = devices.gathered((asdict(config), sums, prompts))
    for rank, (their_config, their_sums, their_prompts) in enumerate(others):
        if their_config != others[0][0]:
            names = [name for name, value in their_config.items() if value != others[0][0][name]]
            raise InputError(f"all processes must have the same options, got others for {names[0]} in process {rank}")
        if their_sums != others[0][1]:
            raise InputError(f"all processes must load the same student, got other weights in process {rank}")
        for option, digest in their_prompts.items():
            if digest != others[0][2][option]:
                raise InputError(f"all processes must read the same {option}, got other prompts in process {rank}")
