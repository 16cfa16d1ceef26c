"""Do prompts and responses fit into both models' context?"""

from esr_distill import preflight
from esr_distill.checks.finding import Finding
from esr_distill.config import TrainConfig
from esr_distill.input_error import InputError
from esr_distill.training_run import TrainingRun


def context_finding(run: TrainingRun, lengths: list[int], config: TrainConfig) -> Finding:
    """Whether the horizon leaves room for the prompts. `lengths` are the tokens of all prompts that were looked at."""
    check, horizon = "context", config.rollout.horizon
    context = preflight.context_length(run.student, run.teacher)
    values = {"context": context, "horizon": horizon, "prompts": len(lengths), "longest_prompt": max(lengths)}
    try:
        limit, source = preflight.prompt_limit(
            config.data.max_prompt_tokens, horizon, "rollout.horizon", run.student, run.teacher
        )
    except InputError as error:
        return Finding(check, "error", str(error), "lower rollout.horizon", values)
    too_long = sum(length > limit for length in lengths)
    values |= {"longest_allowed": limit, "too_long": too_long}
    message = (
        f"{len(lengths)} prompts of at most {max(lengths)} tokens and a horizon of {horizon} in a context of "
        f"{context if context else 'unknown length'}"
    )
    if not too_long:
        return Finding(check, "ok", f"{message}: all fit", values=values)
    message += f": {too_long} are longer than {limit} ({source})"
    if config.data.long_prompts == "drop" and too_long < len(lengths):
        fix = "they are dropped, as data.long_prompts says; lower rollout.horizon or raise data.max_prompt_tokens to keep them"
        return Finding(check, "warning", message, fix, values)
    fix = "lower rollout.horizon, shorten the prompts, or set data.long_prompts to drop"
    return Finding(check, "error", message, fix, values)
