"""All parts of a run, loaded and checked, before the first step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.config import OptimizerConfig, TrainConfig
from esr_distill.distill_loss import choose_impl, make_divergence
from esr_distill.evaluate import Evaluation
from esr_distill.hidden_states import check_output_head
from esr_distill.learning_rate import learning_rate_factor
from esr_distill.models import StopIds, choose_attention, choose_device, find_stop_ids, load_model, load_tokenizer
from esr_distill.prompts import PromptSet, read_prompt_file, tokenize_prompts
from esr_distill.rollout import RolloutBackend, RolloutRequest
from esr_distill.rollout.choose_backend import make_backend
from esr_kernels import Divergence, Impl


@dataclass
class TrainingRun:
    """What `train_step` works on. Only the weights, the optimizer and the scheduler change."""

    config: TrainConfig
    device: torch.device
    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop: StopIds
    prompts: PromptSet
    divergence: Divergence
    divergence_impl: Impl
    rollouts: RolloutBackend
    rollout_request: RolloutRequest
    teacher_stream: torch.cuda.Stream | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    evaluation: Evaluation | None

    def autocast(self) -> AbstractContextManager:
        return student_autocast(self.config, self.device)


def student_autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """Where the student runs: under bfloat16 autocast if `model.autocast` asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.model.autocast)


def prepare_run(config: TrainConfig, console: Console, student_source: str | None = None) -> TrainingRun:
    """Load and check everything. `student_source` is a checkpoint to go on from instead of `model.student`.

    Raises:
        InputError: anything that would go wrong later and can be seen now.
    """
    divergence = make_divergence(config.loss)
    records = read_prompt_file(config.data.prompts, "data.prompts")
    evaluation_records = None
    if config.evaluation.prompts is not None:
        evaluation_records = read_prompt_file(config.evaluation.prompts, "evaluation.prompts")
    device = choose_device(config.model.device)
    tokenizer = load_tokenizer(config.model.student, "model.student")
    preflight.check_tokenizer_pair(tokenizer, load_tokenizer(config.model.teacher, "model.teacher"))

    attention = choose_attention(config.model.attn_implementation, device, is_in_16_bits=config.model.is_in_16_bits)
    student = load_model(
        student_source or config.model.student,
        "model.student",
        dtype=config.model.dtype,
        attn_implementation=attention,
        device=device,
    )
    teacher = load_model(
        config.model.teacher,
        "model.teacher",
        dtype=config.model.teacher_dtype,
        attn_implementation=attention,
        device=device,
    )
    teacher.requires_grad_(False)
    preflight.check_vocab_sizes(student, teacher, config)
    preflight.check_token_ids(tokenizer, student, teacher, config)
    with student_autocast(config, device):
        check_output_head(student, "model.student")
    check_output_head(teacher, "model.teacher")
    stop = find_stop_ids(tokenizer, student, teacher, vocab_size=config.loss.vocab_size)
    # Tools that load a checkpoint must stop where the student has learnt to stop.
    student.generation_config.eos_token_id = list(stop.eos_ids)

    prompts = tokenize_prompts(records, tokenizer, config.data, pad_id=stop.pad_id, device=device)
    limit, source = preflight.prompt_limit(
        config.data.max_prompt_tokens, config.rollout.horizon, "rollout.horizon", student, teacher
    )
    prompts, dropped = preflight.fit_prompts(
        prompts, limit=limit, limit_source=source, long_prompts=config.data.long_prompts, option="data.prompts"
    )
    if dropped:
        console.print(
            f"data.prompts: {dropped} of {len(records)} prompts dropped, longer than {limit} tokens ({source})"
        )
    evaluation = None
    if evaluation_records is not None:
        evaluation = Evaluation.prepare(
            evaluation_records,
            tokenizer,
            config.data,
            config.evaluation,
            stop=stop,
            model=student,
            device=device,
            rollouts=make_backend(config.rollout),
        )
    optimizer, scheduler = make_optimizer(student, config.optimizer, config.run.steps)
    console.print(
        f"student {config.model.student} ({_millions(student)} M parameters, {config.model.dtype}), "
        f"teacher {config.model.teacher} ({_millions(teacher)} M, {config.model.teacher_dtype}), "
        f"{device.type}, attention {attention}"
    )
    impl = choose_impl(device)
    why = "Triton kernels" if impl is Impl.FUSED else "plain PyTorch: the kernels need a CUDA device"
    console.print(f"divergence: {impl.value} ({why})")
    rollouts = make_backend(config.rollout, console)
    console.print(rollouts.describe(student))
    request = RolloutRequest(
        config.rollout.horizon,
        config.rollout.sampler,
        stop.eos_ids,
        stop.pad_id,
        config.run.seed,
        config.loss.vocab_size,
    )
    return TrainingRun(
        config,
        device,
        student,
        teacher,
        tokenizer,
        stop,
        prompts,
        divergence,
        impl,
        rollouts,
        request,
        torch.cuda.Stream(device) if config.rollout.overlap_teacher and device.type == "cuda" else None,
        optimizer,
        scheduler,
        evaluation,
    )


def make_optimizer(student: PreTrainedModel, config: OptimizerConfig, steps: int):
    """AdamW over the trainable weights, and its learning-rate schedule over `steps` steps."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=tuple(config.betas), weight_decay=config.weight_decay
    )
    warmup_steps = round(config.warmup_fraction * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, warmup_steps, config.schedule)
    )
    return optimizer, scheduler


def _millions(model: PreTrainedModel) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"
