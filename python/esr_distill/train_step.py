"""One step of on-policy distillation, read top to bottom: the walk of the data from prompts to updated weights."""

import torch

from esr_distill.distill_loss import normalize_divergence
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.metrics import StageClock, check_finite, step_metrics
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.prompts import next_prompt_batch
from esr_distill.training_run import TrainingRun
from esr_kernels import linear_divergence


def train_step(run: TrainingRun, step: int) -> dict:
    """Update the student once; returns the step's metrics. The same (run, step) always draws the same rollouts."""
    config, clock = run.config, StageClock(run.device)
    samples = config.rollout.samples_per_prompt
    prompts = next_prompt_batch(run.prompts, config.rollout.batch_size, step, config.run.seed, samples)

    prefill = None
    with clock("rollout"):
        if config.rollout.overlap_teacher:
            prefill = PromptPrefill.start(run.teacher, prompts, run.teacher_stream)
        with run.autocast():
            rollouts = run.rollouts.generate(run.student, prompts, run.rollout_request)
    with clock("student_forward"), run.autocast():
        student_hidden_B_T_D = last_hidden_states(run.student, rollouts)
    with clock("teacher_forward"), torch.no_grad():
        teacher_hidden_B_T_E = last_hidden_states(run.teacher, rollouts, prefill)

    positions = select_prefix_positions(rollouts, config.trained_tokens)
    with clock("divergence"):
        divergence = linear_divergence(
            gather_rows(student_hidden_B_T_D, positions),
            output_head(run.student),
            gather_rows(teacher_hidden_B_T_E, positions),
            output_head(run.teacher),
            run.divergence,
            loss_temperature=config.loss.loss_temperature,
            token_ids_N=positions.token_ids_N,
            stop_ids=run.stop.eos_ids if config.loss.merge_stop_ids else (),
            vocab_size=config.loss.vocab_size,
            impl=run.divergence_impl,
        )
        loss = normalize_divergence(
            divergence.divergence_N, positions.row_N, rollouts.batch_size, config.loss.normalizer
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
    return step_metrics(step, loss, grad_norm, learning_rate, divergence, positions, rollouts, clock)
