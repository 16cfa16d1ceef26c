"""Options by the names that TRL's trainers give them, where they mean the same: `--max_completion_length 100` is rollout.horizon.

They stand at the top level of the YAML file or among the flags, and become options of ours, by which the run is saved. Names that
mean something else here are not taken: TRL's per_device_train_batch_size counts a device and a part of a step, rollout.batch_size
the rollouts of the whole step. Read in TRL 1.16.0.
"""

from collections.abc import Callable
from dataclasses import dataclass

from esr_distill.input_error import InputError


@dataclass(frozen=True)
class TrlName:
    """One of TRL's options: its type, and what it becomes."""

    type: object
    options: Callable[[object], dict[str, object]]
    becomes: str  # in words, for the help


def same_as(option: str, type_of_value: object) -> TrlName:
    return TrlName(type_of_value, lambda value: {option: value}, option)


def divergence_of(beta: float) -> dict[str, object]:
    """beta multiplies the teacher in the mixture, and 0 and 1 are the two KLs, as in `esr_kernels.GeneralizedJSD`."""
    if not 0 <= beta <= 1:
        raise InputError(f"beta must be in [0, 1], got {beta}")
    if beta in (0, 1):
        return {"loss.divergence": "reverse_kl" if beta else "forward_kl"}
    return {"loss.divergence": "jsd", "loss.divergence_parameter": beta}


def both_temperatures(value: float) -> dict[str, object]:
    return {"rollout.sampling_temperature": value, "loss.loss_temperature": value}


TRL_NAMES: dict[str, TrlName] = {
    "model_name_or_path": same_as("model.student", str),
    "teacher_model_name_or_path": same_as("model.teacher", str),
    "trust_remote_code": same_as("model.trust_remote_code", bool),
    "gradient_checkpointing": same_as("model.gradient_checkpointing", bool),
    "use_peft": same_as("model.lora.use_peft", bool),
    "lora_r": same_as("model.lora.lora_r", int),
    "lora_alpha": same_as("model.lora.lora_alpha", int),
    "lora_dropout": same_as("model.lora.lora_dropout", float),
    "dataset_name": same_as("data.prompts", str),
    "dataset_train_split": same_as("data.split", str),
    "chat_template_kwargs": same_as("data.chat_template_kwargs", dict),
    "max_completion_length": same_as("rollout.horizon", int),
    "top_p": same_as("rollout.top_p", float),
    "top_k": same_as("rollout.top_k", int),
    "min_p": same_as("rollout.min_p", float),
    "temperature": TrlName(float, both_temperatures, "rollout.sampling_temperature and loss.loss_temperature"),
    "beta": TrlName(float, divergence_of, "loss.divergence and loss.divergence_parameter"),
    "learning_rate": same_as("optimizer.learning_rate", float),
    "weight_decay": same_as("optimizer.weight_decay", float),
    "max_grad_norm": same_as("optimizer.max_grad_norm", float),
    "gradient_accumulation_steps": same_as("optimizer.accumulation_steps", int),
    "max_steps": same_as("run.steps", int),
    "save_steps": same_as("run.save_every", int),
    "save_total_limit": same_as("run.keep_checkpoints", int),
    "output_dir": same_as("run.output_dir", str),
    "seed": same_as("run.seed", int),
}


def translated(values: dict[str, object], given: Callable[[str], bool]) -> tuple[dict[str, object], list[str]]:
    """Our options for TRL's names with values, and what must be said of them.

    Args:
        given: whether an option of ours was given as well.

    Raises:
        InputError: both a name of TRL's and an option that it becomes were given.
    """
    options, messages = {}, []
    for name, value in values.items():
        for option, translated_value in TRL_NAMES[name].options(value).items():
            if given(option):
                raise InputError(f"{name} must not be given with {option}, which it is by TRL's name, got both")
            options[option] = translated_value
    if "temperature" in values:
        messages.append(
            f"temperature {values['temperature']} is taken for both temperatures, as TRL does: rollout.sampling_temperature, by "
            "which rollouts are drawn, and loss.loss_temperature, of both distributions in the loss"
        )
    return options, messages
