"""Training runs made of models in memory: what `train_step` works on, without a file, a tokenizer or an end of a rollout."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bench.bench_rollouts import DTYPES, label
from bench.floor import StepSetting
from bench.rollout_models import SHAPES, make_model
from esr_distill import preflight
from esr_distill.config import DataConfig, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, TrainConfig
from esr_distill.devices import Devices
from esr_distill.distill_loss import choose_impl, make_divergence
from esr_distill.input_error import InputError
from esr_distill.models import StopIds
from esr_distill.models.train_mode import enable_gradient_checkpointing, switch_off_dropout
from esr_distill.prompts import PromptSet
from esr_distill.rollout import RolloutRequest
from esr_distill.rollout.choose_backend import make_backend
from esr_distill.training_run import TrainingRun, make_optimizer

ARROW = "<-"
PAD_ID = 0
IN_MEMORY = "(random ids, in memory)"
# Neither warm-up nor decay: every step does the same.
OPTIMIZER = OptimizerConfig(schedule="constant", warmup_fraction=0.0)


@dataclass(frozen=True)
class Pair:
    """Student, teacher and the student's optimizer. All implementations train this one student, so they hold the same memory."""

    name: str
    dtype: str
    student: PreTrainedModel
    teacher: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def optimizer_state_dtype(self) -> str | None:
        """Type of AdamW's moments, None before the first step."""
        moments = [state["exp_avg"].dtype for state in self.optimizer.state.values()]
        return str(moments[0]).removeprefix("torch.") if moments else None


def pair_names(pair: str) -> tuple[str, str]:
    """Student and teacher of "student<-teacher", each a shape's name or a folder.

    Raises:
        ValueError: it is not of that form, or names neither a shape nor a folder.
    """
    names = [name.strip() for name in pair.split(ARROW)]
    if len(names) != 2 or not all(name in SHAPES or Path(name).is_dir() for name in names):
        raise ValueError(
            f"--pairs must be student{ARROW}teacher, each among {', '.join(SHAPES)} or a folder, got {pair!r}"
        )
    return names[0], names[1]


def pair_label(pair: str) -> str:
    return ARROW.join(label(name) for name in pair_names(pair))


def make_pair(pair: str, device: str, dtype: str, *, has_checkpoints: bool = False) -> Pair:
    """Both models with weights in `dtype`, and AdamW over the student's, whose moments have the type of the weights. With
    checkpoints the student's layers keep their inputs alone and compute the rest again in backward, for every implementation.

    Raises:
        ValueError: unknown names, or vocabularies of different sizes.
    """
    student, teacher = (make_model(name, device, DTYPES[dtype]) for name in pair_names(pair))
    teacher.requires_grad_(False)
    if has_checkpoints:
        switch_off_dropout(student)
        enable_gradient_checkpointing(student)
        student.train()
    optimizer, scheduler = make_optimizer(student, OPTIMIZER, RunConfig().steps)
    made = Pair(pair_label(pair), dtype, student, teacher, optimizer, scheduler)
    preflight.check_vocab_sizes(student, teacher, step_config(made, StepSetting(1, 1, 1)))
    return made


def step_config(pair: Pair, setting: StepSetting, *, compile_step: bool = False) -> TrainConfig:
    """The trainer's defaults at this setting: reverse KL, temperature 0.7 and top-p 0.95."""
    student, teacher = pair.name.split(ARROW)
    return TrainConfig(
        model=ModelConfig(
            student,
            teacher,
            dtype=pair.dtype,
            teacher_dtype=pair.dtype,
            attn_implementation="sdpa",
            device=pair.device.type,
        ),
        data=DataConfig(IN_MEMORY, chat_template=False),
        rollout=RolloutConfig(horizon=setting.horizon, batch_size=setting.batch_size, compile_step=compile_step),
        optimizer=OPTIMIZER,
    )


def make_run(pair: Pair, setting: StepSetting, *, compile_step: bool = False) -> TrainingRun:
    """A run whose rollouts all have the whole horizon: no id ends them.

    Raises:
        InputError: prompt and horizon need more positions than one of the models has.
    """
    check_positions(pair, setting)
    config, device = step_config(pair, setting, compile_step=compile_step), pair.device
    stop = StopIds(eos_ids=(), pad_id=PAD_ID)
    sampler, seed = config.rollout.sampler, config.run.seed
    return TrainingRun(
        config=config,
        device=device,
        student=pair.student,
        teacher=pair.teacher,
        tokenizer=None,  # a step has ids already
        devices=Devices(device),
        stop=stop,
        prompts=random_prompts(pair.student, setting),
        divergence=make_divergence(config.loss),
        divergence_impl=choose_impl(device),
        rollouts=make_backend(config.rollout),
        rollout_request=RolloutRequest(setting.horizon, sampler, stop.eos_ids, stop.pad_id, seed),
        teacher_stream=None,
        optimizer=pair.optimizer,
        scheduler=pair.scheduler,
        evaluation=None,
    )


def check_positions(pair: Pair, setting: StepSetting) -> None:
    context = preflight.context_length(pair.student, pair.teacher)
    if context is not None and setting.prompt + setting.horizon > context:
        raise InputError(
            f"prompt and horizon must be at most the models' {context} positions together, "
            f"got {setting.prompt} + {setting.horizon}"
        )


def random_prompts(student: PreTrainedModel, setting: StepSetting) -> PromptSet:
    """Two batches of different prompts, which take turns."""
    vocab_size = student.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(setting.batch_size)
    ids = torch.randint(vocab_size, (2 * setting.batch_size, setting.prompt), generator=generator)
    return PromptSet(ids.tolist(), [None] * len(ids), PAD_ID, student.device)


def with_rows(run: TrainingRun, num_rows: int) -> TrainingRun:
    """The same run on fewer rows."""
    config = replace(run.config, rollout=replace(run.config.rollout, batch_size=num_rows))
    return replace(run, config=config)
