"""The training step that one writes by hand: `generate`, both models' full logits, reverse KL by log-softmax, AdamW.

Stages are those of `esr_distill.train_step`, except that here the output heads belong to the forwards: a model returns logits.
"""

import torch
from torch import Tensor

from bench.steps.clock import MemoryClock
from esr_distill.metrics import StageClock
from esr_distill.prompts import PromptBatch, next_prompt_batch
from esr_distill.rollout import RolloutBatch
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.hf_generate import generation_config, only_generation_config
from esr_distill.training_run import TrainingRun


def generated(run: TrainingRun, prompts: PromptBatch) -> RolloutBatch:
    """Rollouts by `generate` with the request's sampler settings; the logits of its steps are not kept."""
    config = generation_config(run.rollout_request)
    config.output_logits = config.output_scores = config.return_dict_in_generate = False
    with only_generation_config(run.student, config), eval_mode(run.student):
        mask_B_P = prompts.prompt_mask_B_P.long()
        ids_B_T = run.student.generate(prompts.prompt_ids_B_P, attention_mask=mask_B_P)
    return given_rollouts(prompts, ids_B_T[:, mask_B_P.shape[1] :])


def given_rollouts(prompts: PromptBatch, response_ids_B_K: Tensor) -> RolloutBatch:
    """Responses of one length, whose log-probs nobody asks for."""
    batch_size, width = response_ids_B_K.shape
    lengths_B = torch.full((batch_size,), width, device=response_ids_B_K.device)
    not_told_B_K = torch.full((batch_size, width), torch.nan, device=response_ids_B_K.device)
    return RolloutBatch.join(
        prompts,
        response_ids_B_K,
        lengths_B=lengths_B,
        stopped_by_eos_B=torch.zeros_like(lengths_B, dtype=torch.bool),
        logprobs_B_K=not_told_B_K,
        sampling_logprobs_B_K=not_told_B_K,
    )


def full_logits_loss(run: TrainingRun, rollouts: RolloutBatch, clock: StageClock) -> Tensor:
    """Reverse KL from student to teacher in nats, averaged over the response tokens. Logits are in the models' dtype."""
    inputs = {
        "input_ids": rollouts.token_ids_B_T,
        "attention_mask": rollouts.attention_mask_B_T,
        "position_ids": rollouts.position_ids_B_T,
        "use_cache": False,
    }
    with clock("student_forward"):
        student_logits_B_T_V = run.student(**inputs).logits
    with clock("teacher_forward"), torch.no_grad():
        teacher_logits_B_T_V = run.teacher(**inputs).logits
    with clock("divergence"):
        predicting = slice(rollouts.prompt_width - 1, -1)
        student_logprobs_B_K_V = student_logits_B_T_V[:, predicting].float().log_softmax(-1)
        teacher_logprobs_B_K_V = teacher_logits_B_T_V[:, predicting].float().log_softmax(-1)
        log_ratio_B_K_V = student_logprobs_B_K_V - teacher_logprobs_B_K_V
        divergence_B_K = (student_logprobs_B_K_V.exp() * log_ratio_B_K_V).sum(-1)
        mask_B_K = rollouts.attention_mask_B_T[:, rollouts.prompt_width :]
        return (divergence_B_K * mask_B_K).sum() / mask_B_K.sum()


def eager_step(run: TrainingRun, step: int, clock: MemoryClock) -> tuple[float, RolloutBatch]:
    """Update the student once; its loss and the rollouts."""
    prompts = next_prompt_batch(run.prompts, run.config.rollout.batch_size, step, run.config.run.seed)
    with clock("rollout"):
        rollouts = generated(run, prompts)
    loss = full_logits_loss(run, rollouts, clock)
    with clock("backward"):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), run.config.optimizer.max_grad_norm)
    with clock("optimizer"):
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
    return loss.item(), rollouts
