"""One step of on-policy distillation, read top to bottom: the walk of the data from prompts to updated weights."""

from dataclasses import replace

import torch

from esr_distill.distill_loss import normalize_divergence
from esr_distill.hidden_states import last_hidden_states
from esr_distill.metrics import StageClock, StepWatch, check_finite, step_metrics
from esr_distill.prefix_positions import select_prefix_positions
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.prompts import next_prompt_batch
from esr_distill.teacher_prompts import teacher_hidden_states
from esr_distill.score_positions import score_positions
from esr_distill.token_selection import TokenSelection
from esr_distill.training_run import TrainingRun


def train_step(run: TrainingRun, step: int, horizon: int | None = None, watch: StepWatch | None = None) -> dict:
    """Update the student once; returns the step's metrics. The same (run, step, horizon) always draws the same rollouts.

    `horizon` is rollout.horizon where it is not given; `watch` is shown what was drawn and scored.
    """
    config, clock = run.config, StageClock(run.device)
    samples = config.rollout.samples_per_prompt
    horizon = horizon or config.rollout.horizon
    prompts = next_prompt_batch(run.prompts, config.rollout.batch_size, step, config.run.seed, samples)

    prefill = None
    with clock("rollout"):
        if config.rollout.overlap_teacher:
            prefill = PromptPrefill.start(run.teacher, prompts.for_teacher, run.teacher_stream)
        with run.autocast():
            rollouts = run.rollouts.generate(run.student, prompts, replace(run.rollout_request, horizon=horizon))
    with clock("student_forward"), run.autocast():
        student_hidden_B_T_D = last_hidden_states(run.student, rollouts)
    with clock("teacher_forward"), torch.no_grad():
        teacher_hidden_B_T_E = teacher_hidden_states(run.teacher, rollouts, prompts, prefill)

    selection = TokenSelection.of(rollouts, config.selection, prompts.request_ids_B, config.run.seed)
    positions = select_prefix_positions(rollouts, config.trained_tokens, selection.candidates_B_K)
    with clock("divergence"):
        divergence = score_positions(run, student_hidden_B_T_D, teacher_hidden_B_T_E, positions)
        weights_N = selection.weights_N(positions, divergence)
        loss = normalize_divergence(
            divergence.divergence_N,
            weights_N,
            positions.row_N,
            rollouts.batch_size,
            config.loss.normalizer,
            config.loss.denominator,
        )
    with clock("backward"):
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), config.optimizer.max_grad_norm)
    check_finite(loss, grad_norm, step)
    learning_rate = run.scheduler.get_last_lr()[0]
    with clock("optimizer"):
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
    return step_metrics(
        step, loss, grad_norm, learning_rate, divergence, positions, weights_N, rollouts, horizon, clock, watch
    )
