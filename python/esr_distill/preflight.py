"""Everything that can be known to be wrong before the first step, checked before the first step."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill.config import TrainConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.prepare_prompts import fit_prompts as fit_prompts
from esr_distill.token_selection.late_tokens import check_late_tokens
from esr_distill.token_selection.token_classes import ids_of_rule


def check_tokenizer_pair(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """The teacher scores the student's token ids, so both must mean the same by every id."""
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab == teacher_vocab:
        return
    different = sorted(set(student_vocab.items()) ^ set(teacher_vocab.items()), key=lambda item: (item[1], item[0]))
    token, token_id = different[0]
    raise InputError(
        "model.teacher must have the student's tokenizer, got one that differs in "
        f"{len({i for _, i in different})} ids, first at id {token_id} ({token!r})"
    )


def check_vocab_sizes(student: PreTrainedModel, teacher: PreTrainedModel, config: TrainConfig) -> None:
    """Equal head widths, or a `loss.vocab_size` that both heads reach."""
    widths = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    vocab_size = config.loss.vocab_size
    if vocab_size is None and widths[0] != widths[1]:
        raise InputError(
            f"model.teacher must have the student's vocabulary size {widths[0]}, got {widths[1]}; "
            f"if the surplus is padding, set loss.vocab_size to {min(widths)} or less"
        )
    if vocab_size is not None and vocab_size > min(widths):
        raise InputError(f"loss.vocab_size must be at most {min(widths)} for this pair, got {vocab_size}")


def check_token_ids(
    tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, teacher: PreTrainedModel, config: TrainConfig
) -> None:
    """Both models can embed every id of the tokenizer, a cut vocabulary still holds every one of them, and every id that a rule
    names can be drawn."""
    largest = max(tokenizer.get_vocab().values())
    for option, model in (("model.student", student), ("model.teacher", teacher)):
        width = model.get_input_embeddings().weight.shape[0]
        if largest >= width:
            raise InputError(f"{option} must embed the tokenizer's ids up to {largest}, got {width} embeddings")
    if config.loss.vocab_size is not None and config.loss.vocab_size <= largest:
        raise InputError(
            f"loss.vocab_size must be above the tokenizer's largest id {largest}, got {config.loss.vocab_size}"
        )
    for rule in config.selection.leaves:
        if rule.kind in ("token_ids", "token_classes"):
            option = "token_ids" if rule.kind == "token_ids" else "table"
            named = max(ids_of_rule(rule))
            if named > largest:
                raise InputError(
                    f"selection.rules.{option} must hold ids of the tokenizer, at most {largest}, got {named}"
                )


def context_length(*models: PreTrainedModel) -> int | None:
    """Positions that all models have been made for; None if no config says."""
    lengths = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    known = [length for length in lengths if length]
    return min(known) if known else None


def prompt_limit(
    max_prompt_tokens: int | None, response_tokens: int, response_option: str, *models: PreTrainedModel
) -> tuple[int, str]:
    """Longest prompt that still leaves room for the response, and where that number comes from."""
    context = context_length(*models)
    limits = []
    if max_prompt_tokens is not None:
        limits.append((max_prompt_tokens, "data.max_prompt_tokens"))
    if context is not None:
        limits.append((context - response_tokens, f"context {context} minus {response_option} {response_tokens}"))
    limit, source = min(limits, default=(10**9, "no limit is known"))
    if limit < 1:
        raise InputError(
            f"{response_option} must leave room for a prompt in the models' context of {context}, got {response_tokens}"
        )
    return limit, source


def check_options(config: TrainConfig, device: torch.device) -> None:
    """Options of different groups that contradict each other, files that they name, and what needs another device."""
    model, rollout, run, evaluation = config.model, config.rollout, config.run, config.evaluation
    for rule in config.selection.leaves:
        if rule.kind == "token_classes":
            ids_of_rule(rule)
    check_late_tokens(config)
    if model.teacher_offload and device.type != "cuda":
        raise InputError(f"model.teacher_offload must be false without a CUDA device, got true on {device.type}")
    if model.teacher_offload and rollout.overlap_teacher:
        raise InputError(
            "model.teacher_offload must be false with rollout.overlap_teacher, which keeps the teacher busy while rollouts "
            "are drawn, got true"
        )
    if model.lora.use_peft and rollout.backend == "vllm":
        raise InputError(
            "rollout.backend must be inprocess or hf_generate with model.lora.use_peft, since the server is sent whole "
            "weights, got 'vllm'"
        )
    if run.keep_best is not None and evaluation.prompts is None:
        raise InputError(f"run.keep_best must be unset without evaluation.prompts, got {run.keep_best!r}")
    if run.keep_best is not None and run.save_every % evaluation.every != 0:
        raise InputError(
            f"run.save_every must be a multiple of evaluation.every = {evaluation.every} with run.keep_best, "
            f"got {run.save_every}"
        )
