"""What a config's options say of the method: how far rollouts run, and which of their tokens train."""

import json
from dataclasses import MISSING, Field, fields, is_dataclass

from esr_distill.config import TrainConfig
from esr_distill.horizon_schedule import HorizonSchedule

PAPER, STAIRS_PAPER = "arXiv 2605.27028", "arXiv 2605.31490"
# The longest horizon that the paper tries as an early stop; its full rollouts have 3584 tokens.
LONGEST_EARLY_STOP = 300


def stops_early(config: TrainConfig) -> bool:
    """Whether rollouts are cut as in Early Stopping Rollout: at a short horizon, fixed or growing evenly, and shorter than the
    replies of the evaluation where there is one."""
    horizon, evaluation = config.rollout.horizon, config.evaluation
    is_whole = evaluation.prompts is not None and evaluation.max_tokens <= horizon
    return config.horizon.kind in ("fixed", "linear") and horizon <= LONGEST_EARLY_STOP and not is_whole


def method(config: TrainConfig) -> str:
    """In a line, e.g. "on-policy distillation on rollouts of at most 3584 tokens, of which the first 100 train"."""
    largest = config.rollout.horizon
    rollouts = {
        "fixed": f"of at most {largest} tokens" + f" (Early Stopping Rollout, {PAPER})" * stops_early(config),
        "linear": f"whose horizon grows evenly (the progressive run of {PAPER})",
        "stairs": f"whose horizon grows in stairs (POPD, {STAIRS_PAPER})",
        "fraction": f"cut at a share of the longest horizon (TOPD, {STAIRS_PAPER})",
        "adaptive": "whose horizon follows the agreement of the models",
    }[config.horizon.kind]
    trained = ""
    if config.selection.rules:
        trained = ", of which selected tokens train"
    elif is_prefix_cut(config):
        trained = f", of which the first {config.loss.prefix_tokens} train"
    weighted = ", token by token with weights" if config.selection.weights else ""
    return f"on-policy distillation on rollouts {rollouts}{trained}{weighted}"


def horizon(config: TrainConfig, step: int, adapted: int | None = None) -> str:
    """Response tokens of a rollout, in a run of which `step` steps are done. `adapted` is what an adaptive horizon has come to by
    then, which the options do not say."""
    schedule, largest = config.horizon, config.rollout.horizon
    if schedule.kind == "fixed":
        return f"{largest} response tokens"
    if schedule.kind == "adaptive":
        moves = f"{schedule.increment} more or fewer by the agreement of the models"
        text = f"{schedule.start} response tokens at first, {moves}, at most {largest}"
        return text if adapted is None else f"{text}; {adapted} after step {step}"
    last = HorizonSchedule(schedule, largest, config.run.steps).horizon(max(0, step - 1))
    if schedule.kind == "fraction":
        return f"{last} response tokens, {schedule.fraction:g} of {largest}"
    stairs = f"{schedule.increment} more each {schedule.every} steps, at most {largest}"
    moves = stairs if schedule.kind == "stairs" else f"growing evenly to {largest}"
    return f"{schedule.start} response tokens at first, {moves}; {last} in step {max(1, step)}"


def is_prefix_cut(config: TrainConfig) -> bool:
    """Whether `loss.prefix_tokens` leaves tokens out."""
    return config.trained_tokens < config.rollout.horizon


def trained_tokens(config: TrainConfig) -> str:
    """Which of the drawn tokens train, and how they are weighted."""
    selection = config.selection
    prefix = f"the first {config.trained_tokens} of each rollout"
    text = prefix if is_prefix_cut(config) else "all that are drawn"
    if selection.rules:
        among = f"those among {prefix}" if is_prefix_cut(config) else "those"
        rules = "; ".join(map(in_words, selection.rules))
        which = f"{selection.combine} of the rules" if len(selection.rules) > 1 else "the rule"
        text = f"{among} that {which} {'keeps' if len(selection.rules) == 1 else 'keep'}: {rules}"
    if not selection.keep_eos:
        text += "; without the end-of-sequence token"
    if selection.weights:
        text += f"; weighted by {' times '.join(map(in_words, selection.weights))}"
    return text


def in_words(rule: object) -> str:
    """A rule by its kind and the fields that are set, e.g. "window (tokens 100, start middle)"."""
    named = without_defaults(rule)
    kind = named.pop("kind")
    if len(named.get("token_ids", [])) > 8:
        named["token_ids"] = f"{len(named['token_ids'])} ids"
    told = ", ".join(f"{name} {value}" for name, value in named.items())
    return f"{kind} ({told})" if told else kind


def without_defaults(value: object) -> object:
    """As JSON values; of dataclasses the fields that are not the defaults, and the kind."""
    if is_dataclass(value):
        told = [f for f in fields(value) if f.name == "kind" or getattr(value, f.name) != default_of(f)]
        return {field.name: without_defaults(getattr(value, field.name)) for field in told}
    if isinstance(value, list | tuple):
        return [without_defaults(item) for item in value]
    if isinstance(value, dict):
        return {name: without_defaults(item) for name, item in value.items()}
    return value


def default_of(field: Field) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def as_option(value: object) -> object:
    """A value as one would write it in YAML: rules as their mappings."""
    return json.dumps(without_defaults(value)) if isinstance(value, list | tuple | dict) else value
