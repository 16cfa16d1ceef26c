"""README.md of a checkpoint: what was done to which model with what, as the config and the machine say it."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml

from esr_distill import method_in_words
from esr_distill.config import LossConfig, RolloutConfig, TrainConfig
from esr_distill.machine import machine_record

GROUPS = ("rollout", "horizon", "selection", "loss", "optimizer")  # of what makes the student what it is
OF_THE_MACHINE = ("vllm_",)  # options that name its addresses and folders


def model_card(config: TrainConfig, step: int, evaluation: dict | None, horizon: int | None = None) -> str:
    """The card of the student after `step` steps; `evaluation` is what was measured then, if anything was; `horizon` what an
    adaptive one has come to."""
    model, lora = config.model, config.model.lora
    machine = machine_record()
    rows = {
        "Method": method_in_words.method(config),
        "Student": f"{named(model.student)}, {'4 bits' if lora.load_in_4bit else model.dtype}",
        "Teacher": "the student without its adapter"
        if model.is_teacher_base
        else f"{named(model.teacher)}, {model.teacher_dtype}",
        "Trained": adapter_row(config) if lora.use_peft else "all weights",
        "Horizon": method_in_words.horizon(config, step, horizon),
        "Trained tokens": method_in_words.trained_tokens(config),
        "Divergence": divergence_row(config.loss),
        "Sampling": sampling_row(config.rollout),
        "Steps": f"{step} of {config.run.steps}, {config.rollout.batch_size} rollouts each, seed {config.run.seed}",
    }
    if evaluation is not None:
        error = evaluation["standard_error"]  # None with one question
        spread = "" if error is None else f" +- {error:.4f} (standard error)"
        rows["Accuracy"] = (
            f"{evaluation['accuracy']:.4f}{spread} on {evaluation['count']} problems, {config.evaluation.scorer}, at most "
            f"{config.evaluation.max_tokens} tokens"
        )
    rows |= {
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        "Source": f"commit {machine['commit'] or 'unknown'}",
        "Machine": machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores",
    }
    changed = changed_options(config)
    text = f"---\n{front_matter(config)}---\n\n# A student after {step} steps of on-policy distillation\n\n| | |\n|---|---|\n"
    text += "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    if changed:
        text += "\nOptions that are not the defaults:\n\n" + "".join(
            f"- `{name}: {value}`\n" for name, value in changed.items()
        )
    return text


def is_folder(source: str) -> bool:
    """Whether it is a folder, be it there now or not. The ids of the hub are NAME or OWNER/NAME."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def named(source: str) -> str:
    """A hub id as it is; of a folder its last name, since the others are those of this machine."""
    return f"`{Path(source).resolve().name}` (a local folder)" if is_folder(source) else f"`{source}`"


def front_matter(config: TrainConfig) -> str:
    """What the hub reads. A folder of this machine is no base model that others could find."""
    library = "peft" if config.model.lora.use_peft else "transformers"
    tags = ["on-policy-distillation"] + ["early-stopping-rollout"] * method_in_words.stops_early(config)
    head = {"library_name": library, "tags": tags}
    if not is_folder(config.model.student):
        head["base_model"] = config.model.student
    return yaml.safe_dump(head, sort_keys=False)


def divergence_row(loss: LossConfig) -> str:
    parameter = "" if loss.divergence_parameter is None else f" ({loss.divergence_parameter})"
    text = f"{loss.divergence}{parameter}"
    if loss.gated_divergence is not None:
        text += f", plus {loss.gate_coefficient:g} {loss.gated_divergence} where the teacher's entropy is above "
        text += f"{loss.gate_entropy:g} nats"
    return f"{text}, normaliser {loss.normalizer}"


def sampling_row(rollout: RolloutConfig) -> str:
    text = f"temperature {rollout.sampling_temperature}, top-p {rollout.top_p}"
    text += f", top-k {rollout.top_k}" if rollout.top_k else ""
    return text + (f", min-p {rollout.min_p}" if rollout.min_p else "")


def adapter_row(config: TrainConfig) -> str:
    lora = config.model.lora
    names = lora.lora_target_modules
    layers = names if names == "all-linear" else ", ".join(names)
    start = "" if lora.start_from is None else f", from {named(lora.start_from)} on"
    return f"a LoRA adapter, rank {lora.lora_r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {layers}{start}"


def changed_options(config: TrainConfig) -> dict[str, object]:
    """Options of the method's groups with another value than the default, by their whole names."""
    changed = {}
    for name in GROUPS:
        group = getattr(config, name, None)
        if is_dataclass(group):
            default = type(group)()
            for field in fields(group):
                value = getattr(group, field.name)
                if value != getattr(default, field.name) and not field.name.startswith(OF_THE_MACHINE):
                    changed[f"{name}.{field.name}"] = method_in_words.as_option(value)
    return changed
