"""One step of on-policy distillation, read top to bottom: the walk of the data from prompts to updated weights."""

from dataclasses import replace

import torch

from esr_distill.devices.gradients import finish_gradients
from esr_distill.hidden_states import last_hidden_states
from esr_distill.metrics import StageClock, StepWatch, check_finite, step_metrics
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.prompts import next_prompt_batch
from esr_distill.score_positions import score_positions
from esr_distill.step_parts import StepParts
from esr_distill.teacher_prompts import teacher_hidden_states
from esr_distill.training_run import TrainingRun


def train_step(run: TrainingRun, step: int, horizon: int | None = None, watch: StepWatch | None = None) -> dict:
    """Update the student once; returns the step's metrics. The same (run, step, horizon) always draws the same rollouts.

    `horizon` is rollout.horizon where it is not given; `watch` is shown what was drawn and scored.
    """
    config, devices, clock = run.config, run.devices, StageClock(run.device)
    horizon = horizon or config.rollout.horizon
    # batch_size is that of all processes; each draws its own part of the same batch
    prompts = next_prompt_batch(
        run.prompts,
        config.rollout.batch_size,
        step,
        config.run.seed,
        config.rollout.samples_per_prompt,
        rank=devices.rank,
        world_size=devices.world_size,
    )

    prefill = None
    with clock("rollout"):
        if config.rollout.overlap_teacher:
            prefill = PromptPrefill.start(run.teacher, prompts.for_teacher, run.teacher_stream)
        with run.autocast(), run.whole_student() as student:
            rollouts = run.rollouts.generate(student, prompts, replace(run.rollout_request, horizon=horizon))

    parts = StepParts.of(run, prompts, rollouts)
    for part in parts.parts:
        with clock("student_forward"), run.autocast():
            student_hidden_B_T_D = last_hidden_states(run.student, part.rollouts)
        with clock("teacher_forward"), torch.no_grad():
            teacher_hidden_B_T_E = teacher_hidden_states(run.teacher, part.rollouts, part.prompts, prefill)
        with clock("divergence"):
            divergence = score_positions(run, student_hidden_B_T_D, teacher_hidden_B_T_E, part.positions)
            loss = parts.loss(part, divergence, parts.weights_N(part, divergence))
        with clock("backward"):
            loss.backward()
    with clock("backward"):
        whole, factor = parts.join()
        grad_norm = finish_gradients(run.student, devices, factor, config.optimizer.max_grad_norm)
    check_finite(whole.loss, grad_norm, step)
    learning_rate = run.scheduler.get_last_lr()[0]
    with clock("optimizer"):
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
    scored = whole.divergence, whole.positions, whole.weights_N, whole.rollouts
    return devices.from_main(step_metrics(step, whole.loss, grad_norm, learning_rate, *scored, horizon, clock, watch))
