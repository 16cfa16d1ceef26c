"""The loss of a step from the logits of whole models, written without the loop's own parts: what a step is compared with."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.rollout import RolloutBatch


def reverse_kl_of_rollouts(student: PreTrainedModel, teacher: PreTrainedModel, rollouts: RolloutBatch) -> Tensor:
    """Mean over rollouts of the mean KL(student || teacher) over their response tokens, row by row without padding."""
    means = []
    for row in range(rollouts.batch_size):
        length = int(rollouts.response_lengths_B[row])
        end = rollouts.prompt_width + length
        is_real_T = rollouts.attention_mask_B_T[row, :end].bool()
        ids_1_T = rollouts.token_ids_B_T[row, :end][is_real_T][None]
        student_T_V, teacher_T_V = (
            model(input_ids=ids_1_T, use_cache=False).logits[0, -length - 1 : -1].float().log_softmax(-1)
            for model in (student, teacher)
        )
        means.append((student_T_V.exp() * (student_T_V - teacher_T_V)).sum(-1).mean())
    return torch.stack(means).mean()
