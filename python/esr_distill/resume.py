"""What a run that goes on must find as it was: the options of the method. Which options may be others, and why."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from esr_distill.config import TrainConfig
from esr_distill.input_error import InputError

# A group or an option, and why the run is the same run with another value. Every other option would make the steps to come those
# of another run than the steps that are done.
MAY_CHANGE = {
    "run.steps": "where it ends; a schedule over the whole run is from then on that of the new length",
    "run.output_dir": "where it lies",
    "run.save_every": "what is kept of it",
    "run.keep_checkpoints": "what is kept of it",
    "run.keep_best": "what is kept of it",
    "evaluation": "what is measured, with a random stream of its own",
    "monitoring": "what is shown and recorded",
    "devices": "who computes it; sums are rounded differently (docs/devices.md)",
    "data.prompts": "where the prompts lie; they themselves are compared",
    "model.device": "where it is computed",
    "model.trust_remote_code": "a permission",
    "model.attn_implementation": "the same numbers, rounded differently",
    "model.packing": "the same numbers, rounded differently",
    "model.gradient_checkpointing": "the same numbers in less memory",
    "model.teacher_offload": "the same numbers in less memory",
    "optimizer.accumulation_steps": "the same numbers in less memory",
    "rollout.cuda_graphs": "the same rollouts at another speed",
    "rollout.overlap_teacher": "the same rollouts at another speed",
    "rollout.compile_step": "the same rollouts at another speed",
    "rollout.vllm_url": "where the server is",
    "rollout.vllm_weights_folder": "where the server is",
    "rollout.vllm_weights_folder_on_server": "where the server is",
}


def lasting_options(config: TrainConfig) -> dict[str, object]:
    """The options that must stay as they are, by their whole names, as JSON values."""
    return {name: value for name, value, _ in _options(config) if not _may_change(name)}


def check_options(config: TrainConfig, recorded: dict[str, object], checkpoint: Path) -> None:
    """The options of the run that `checkpoint` is of, as `lasting_options` gave them then, are those of `config`.

    Raises:
        InputError: some are not. An option that was not there yet must have its default.
    """
    differences = [
        f"{name} must be {wanted!r}, got {value!r}"
        for name, value, default in _options(config)
        if not _may_change(name) and value != (wanted := recorded.get(name, default))
    ]
    if differences:
        raise InputError(
            f"{'; '.join(differences)}: {checkpoint} was trained so, and a run that goes on keeps its options "
            "(but for steps, checkpoints, evaluation, monitoring and what only decides where and how fast it computes)"
        )


def check_steps(config: TrainConfig, done: int, checkpoint: Path) -> None:
    """Raises InputError where the run would have to end before the steps that it has `done`."""
    if config.run.steps < done:
        raise InputError(f"run.steps must be at least {done}, the steps of {checkpoint}, got {config.run.steps}")


def _may_change(name: str) -> bool:
    return name in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE


def _options(config: object, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Name, value and default of every option, as JSON values; those of groups inside groups by their whole names."""
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from _options(value, f"{name}.")
        else:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            yield name, _json_value(value), _json_value(default)


def _json_value(value: object) -> object:
    # a template's argument may be a date, of YAML
    return json.loads(json.dumps(value, default=lambda item: asdict(item) if is_dataclass(item) else str(item)))
