"""All parts of a run, loaded and checked, before the first step."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.config import OptimizerConfig, TrainConfig
from esr_distill.devices import Devices
from esr_distill.devices.check_devices import check_devices, check_same
from esr_distill.devices.sharding import WholeCopy, shard_model
from esr_distill.distill_loss import choose_impl, make_divergence
from esr_distill.evaluation.evaluate import Evaluation
from esr_distill.learning_rate import learning_rate_factor
from esr_distill.models import StopIds, choose_device, find_stop_ids
from esr_distill.models.discarded_mass import describe_discarded_mass
from esr_distill.models.model_pair import load_pair, student_autocast
from esr_distill.models.teacher import Teacher
from esr_distill.models.train_mode import seed_dropout
from esr_distill.progress import print_line
from esr_distill.prompts import PromptSet, PromptStream
from esr_distill.prompts.prepare_prompts import prepare_prompts
from esr_distill.prompts.prompt_encoder import PromptEncoder
from esr_distill.prompts.prompt_sources import read_prompt_file, read_prompts
from esr_distill.rollout import RolloutBackend, RolloutRequest
from esr_distill.rollout.choose_backend import make_backend
from esr_kernels import Divergence, Impl


@dataclass
class TrainingRun:
    """What `train_step` works on. Only the weights, the optimizer and the scheduler change."""

    config: TrainConfig
    device: torch.device
    student: PreTrainedModel
    teacher: PreTrainedModel | Teacher
    tokenizer: PreTrainedTokenizerBase
    stop: StopIds
    prompts: PromptSet | PromptStream
    divergence: Divergence
    divergence_impl: Impl
    rollouts: RolloutBackend
    rollout_request: RolloutRequest
    teacher_stream: torch.cuda.Stream | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    evaluation: Evaluation | None
    devices: Devices
    whole_copy: WholeCopy | None = None

    def autocast(self) -> AbstractContextManager:
        return student_autocast(self.config, self.device)

    def whole_student(self) -> AbstractContextManager[PreTrainedModel]:
        """The student with all of its weights, to draw, to evaluate, to save: itself, unless it is sharded.

        All processes enter it together."""
        return nullcontext(self.student) if self.whole_copy is None else self.whole_copy.weights()

    def with_whole_student(self, student: PreTrainedModel) -> "TrainingRun":
        """The run as one sees it that only reads the student, inside `whole_student`."""
        return self if student is self.student else replace(self, student=student)


def prepare_run(
    config: TrainConfig, console: Console, student_source: str | None = None, devices: Devices | None = None
) -> TrainingRun:
    """Load and check everything. `student_source` is a checkpoint to go on from instead of `model.student`; `devices` is this
    process among several.

    Raises:
        InputError: anything that would go wrong later and can be seen now.
    """
    divergence = make_divergence(config.loss)
    records = read_prompts(config.data)
    evaluation_records = None
    if config.evaluation.prompts is not None:
        evaluation_records = read_prompt_file(config.evaluation.prompts, "evaluation.prompts")
    devices = devices or Devices(choose_device(config.model.device))
    device = devices.device
    preflight.check_options(config, device)
    check_devices(config, devices)
    pair = load_pair(config, devices, student_source)
    student, teacher, tokenizer = pair.student, pair.teacher, pair.tokenizer
    stop = find_stop_ids(
        tokenizer,
        student,
        teacher,
        teacher_tokenizer=pair.teacher_tokenizer,
        vocab_size=config.loss.vocab_size,
    )
    # Tools that load a checkpoint must stop where the student has learnt to stop.
    student.generation_config.eos_token_id = list(stop.eos_ids)

    encoder = PromptEncoder(
        tokenizer, config.data, pad_id=stop.pad_id, device=device, teacher_tokenizer=pair.teacher_tokenizer
    )
    limit, source = preflight.prompt_limit(
        config.data.max_prompt_tokens, config.rollout.horizon, "rollout.horizon", student, teacher
    )
    prompts, dropped = prepare_prompts(records, encoder, limit=limit, limit_source=source)
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
            rollouts=make_backend(config.rollout, devices=devices),
            vocab_size=config.loss.vocab_size,
        )
    print_line(console, f"{pair.describe(config.model)}, {device.type}, attention {pair.attention}, rows {pair.rows}")
    if config.loss.vocab_size is not None:
        console.print(
            describe_discarded_mass(student, teacher, prompts, config, student_autocast(config, device)),
            highlight=False,
        )
    impl = choose_impl(device)
    why = "Triton kernels" if impl is Impl.FUSED else "plain PyTorch: the kernels need a CUDA device"
    console.print(f"divergence: {impl.value} ({why})")
    rollouts = make_backend(config.rollout, console, devices)
    print_line(console, rollouts.describe(student))
    request = RolloutRequest(
        config.rollout.horizon,
        config.rollout.sampler,
        stop.eos_ids,
        stop.pad_id,
        config.run.seed,
        config.loss.vocab_size,
    )
    if config.model.trains_in_train_mode:
        student.train()
        seed_dropout(config.run.seed, devices.rank)
    whole_copy = None
    if devices.world_size > 1:
        read = {"data.prompts": prompts.digest}
        if evaluation is not None:
            read["evaluation.prompts"] = evaluation.problems.digest
        check_same(config, student, read, devices)
        console.print(f"{devices.world_size} processes, devices.shard {config.devices.shard}")
    if config.devices.shard != "none":
        whole_copy = WholeCopy(student)
        shard_model(student, devices, "model.student", reshard_after_forward=config.devices.reshard_after_forward)
    optimizer, scheduler = make_optimizer(student, config.optimizer, config.run.steps)
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
        devices,
        whole_copy,
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
