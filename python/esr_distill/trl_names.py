"""Options by the names that TRL's trainers give them, where they mean the same: `--max_completion_length 100` is rollout.horizon.

They stand at the top level of the YAML file or among the flags, and become options of ours, by which the run is saved. Names that
mean something else here are refused, with what to set instead (`OTHER_MEANINGS`). Read in TRL 1.16.0 and transformers 5.23.0;
warmup_ratio is that of older transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from esr_distill.config import ModelConfig, OptimizerConfig, TrackerName
from esr_distill.input_error import InputError


@dataclass(frozen=True)
class TrlName:
    """One of TRL's options: its type, and what it becomes."""

    type: object
    options: Callable[[object], dict[str, object]]
    becomes: str  # in words, for the help


BATCH = (
    "TRL's batch is per_device_train_batch_size times gradient_accumulation_steps times the number of processes; here "
    "rollout.batch_size is that product, and optimizer.accumulation_steps only divides it into parts. Set these two instead"
)
OTHER_MEANINGS = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": BATCH}
BETAS = ("adam_beta1", "adam_beta2")


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


def both_dtypes(value: str) -> dict[str, object]:
    """TRL's scripts load student and teacher in this type."""
    return {"model.dtype": value, "model.teacher_dtype": value}


def schedule_of(lr_scheduler_type: str) -> dict[str, object]:
    """Ours has a warm-up in any case, which transformers' "constant" has not."""
    names = {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant"}
    if lr_scheduler_type not in names:
        raise InputError(f"lr_scheduler_type must be one of {', '.join(names)}, got {lr_scheduler_type!r}")
    return {"optimizer.schedule": names[lr_scheduler_type]}


def warmup_of(name: str) -> Callable[[float], dict[str, object]]:
    def options(value: float) -> dict[str, object]:
        if not 0 <= value < 1:
            raise InputError(f"{name} must be a share of the steps here, in [0, 1), got {value}")
        return {"optimizer.warmup_fraction": value}

    return options


def trackers_of(report_to: str | list[str]) -> dict[str, object]:
    names = [report_to] if isinstance(report_to, str) else report_to
    known = get_args(TrackerName)
    if names == ["none"]:
        names = []
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"report_to must be none or some of {', '.join(known)}, got {unknown[0]!r}")
    return {"monitoring.trackers": names}


def beta_of(place: int) -> TrlName:
    def options(value: float) -> dict[str, object]:
        betas = list(OptimizerConfig.betas)
        betas[place] = value
        return {"optimizer.betas": betas}

    return TrlName(float, options, f"{('first', 'second')[place]} of optimizer.betas")


TRL_NAMES: dict[str, TrlName] = {
    "model_name_or_path": same_as("model.student", str),
    "teacher_model_name_or_path": same_as("model.teacher", str),
    "trust_remote_code": same_as("model.trust_remote_code", bool),
    "dtype": TrlName(Literal["float32", "bfloat16"], both_dtypes, "model.dtype and model.teacher_dtype"),
    "attn_implementation": same_as("model.attn_implementation", get_type_hints(ModelConfig)["attn_implementation"]),
    "gradient_checkpointing": same_as("model.gradient_checkpointing", bool),
    "use_peft": same_as("model.lora.use_peft", bool),
    "lora_r": same_as("model.lora.lora_r", int),
    "lora_alpha": same_as("model.lora.lora_alpha", int),
    "lora_dropout": same_as("model.lora.lora_dropout", float),
    "lora_target_modules": same_as("model.lora.lora_target_modules", Literal["all-linear"] | list[str]),
    "load_in_4bit": same_as("model.lora.load_in_4bit", bool),
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
    "adam_beta1": beta_of(0),
    "adam_beta2": beta_of(1),
    "max_grad_norm": same_as("optimizer.max_grad_norm", float),
    "lr_scheduler_type": TrlName(str, schedule_of, "optimizer.schedule"),
    "warmup_ratio": TrlName(float, warmup_of("warmup_ratio"), "optimizer.warmup_fraction"),
    "warmup_steps": TrlName(float, warmup_of("warmup_steps"), "optimizer.warmup_fraction, below 1 alone"),
    "eval_steps": same_as("evaluation.every", int),
    "report_to": TrlName(str | list[str], trackers_of, "monitoring.trackers"),
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
        InputError: a name that means something else here; two names of one option, of which one may be ours.
    """
    options, messages = {}, []
    sources: dict[str, str] = {}
    for name, value in values.items():
        if name in OTHER_MEANINGS:
            raise InputError(f"{name} must be left out, got {value}: {OTHER_MEANINGS[name]}")
        for option, translated_value in TRL_NAMES[name].options(value).items():
            if given(option):
                raise InputError(f"{name} must not be given with {option}, which it is by TRL's name, got both")
            if option in options and name not in BETAS:
                raise InputError(f"{name} must not be given with {sources[option]}, since both are {option}, got both")
            options[option], sources[option] = translated_value, name
    if all(name in values for name in BETAS):
        options["optimizer.betas"] = [values[name] for name in BETAS]
    if "temperature" in values:
        messages.append(
            f"temperature {values['temperature']} is taken for both temperatures, as TRL does: rollout.sampling_temperature, by "
            "which rollouts are drawn, and loss.loss_temperature, of both distributions in the loss"
        )
    if values.get("load_in_4bit"):
        messages.append(
            "load_in_4bit is nf4 with nested quantisation here, TRL's use_bnb_nested_quant, which TRL has off by default"
        )
    return options, messages
