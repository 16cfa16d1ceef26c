"""The same responses behind the prompts that the teacher reads, and its hidden states in the student's columns."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from esr_distill.hidden_states import last_hidden_states
from esr_distill.packed_rows import HiddenRows
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import RolloutBatch


def teacher_hidden_states(
    teacher: PreTrainedModel, rollouts: RolloutBatch, prompts: PromptBatch, prefill: PromptPrefill | None = None
) -> Tensor:
    """(B, T, hidden): `last_hidden_states` of the teacher, which reads its own prompts where `prompts` has them, in the student's
    columns. A `prefill` is one of `prompts.for_teacher`."""
    read = teacher_rollouts(rollouts, prompts)
    return in_student_columns(last_hidden_states(teacher, read, prefill), read, rollouts)


def teacher_rollouts(rollouts: RolloutBatch, prompts: PromptBatch) -> RolloutBatch:
    """The rollouts as the teacher reads them: its own left-padded prompts, then the same response ids.

    `prompts` is the batch that the rollouts were drawn for. Where the teacher reads the student's prompts, these are the
    rollouts themselves.

    Raises:
        ValueError: the rollouts are not of these prompts.
    """
    if prompts.prompt_ids_B_P.shape != (rollouts.batch_size, rollouts.prompt_width):
        raise ValueError(
            f"teacher_rollouts: rollouts must be those of the prompts, {tuple(prompts.prompt_ids_B_P.shape)}, "
            f"got {(rollouts.batch_size, rollouts.prompt_width)}"
        )
    teacher = prompts.teacher_prompts
    if teacher is None:
        return rollouts
    response_mask_B_K = rollouts.attention_mask_B_T[:, rollouts.prompt_width :]
    return replace(
        rollouts,
        token_ids_B_T=torch.cat([teacher.prompt_ids_B_P, rollouts.response_ids_B_K], dim=1),
        attention_mask_B_T=torch.cat([teacher.prompt_mask_B_P.long(), response_mask_B_K], dim=1),
        prompt_width=teacher.prompt_ids_B_P.shape[1],
    )


def in_student_columns(teacher_hidden_B_S_E: Tensor, read: RolloutBatch, rollouts: RolloutBatch) -> Tensor:
    """The teacher's hidden states of `read = teacher_rollouts(rollouts, ...)`, (B, T, E), so that the state that predicts a
    response token stands in the column where the student's does.

    Columns go or come at the front, where the prompts are: a view where the teacher's prompts are the wider ones, else a copy
    with zeros in columns that no response token is predicted from.
    """
    surplus = read.prompt_width - rollouts.prompt_width
    if surplus < 0 and isinstance(teacher_hidden_B_S_E, HiddenRows):
        return teacher_hidden_B_S_E.with_padding_before(-surplus)
    return teacher_hidden_B_S_E[:, surplus:] if surplus >= 0 else pad(teacher_hidden_B_S_E, (0, 0, -surplus, 0))
