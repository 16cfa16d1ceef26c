"""The teacher's rank of tokens: 1 is its likeliest. It takes the logits of both models, so only a probe's answers are ranked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esr_kernels import OutputHead

LOGITS_AT_A_TIME = 2**24  # of each model: 64 MiB in float32
NEAR_TOP = 5


@dataclass(frozen=True)
class TeacherRanks:
    """The teacher's rank, (N,) int64, of the token that was drawn and of the token that the student holds likeliest."""

    drawn_N: Tensor
    student_top_N: Tensor


@torch.no_grad()
def teacher_ranks(
    student_hidden_N_D: Tensor,
    student_head: OutputHead,
    teacher_hidden_N_E: Tensor,
    teacher_head: OutputHead,
    token_ids_N: Tensor,
    *,
    stop_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
) -> TeacherRanks:
    """One more than the number of tokens that the teacher holds likelier than this one. Equally likely ones do not count.

    A few rows of logits at a time. With `stop_ids`, ascending, these are one token, as in the divergence; `vocab_size` cuts both
    heads. A rank knows of no temperature. Of a row with NaN it means nothing.
    """
    rows = max(1, LOGITS_AT_A_TIME // max(student_head.vocab_size, teacher_head.vocab_size))
    drawn, student_top = [], []
    for first in range(0, len(token_ids_N), rows):
        part = slice(first, first + rows)
        student_M_V, teacher_M_V = (
            merged(head.logits(hidden_N_D[part])[:, :vocab_size], stop_ids)
            for head, hidden_N_D in ((student_head, student_hidden_N_D), (teacher_head, teacher_hidden_N_E))
        )
        token_ids_M = token_ids_N[part]
        if len(stop_ids) > 1:
            is_stop_M = torch.isin(token_ids_M, torch.tensor(stop_ids, device=token_ids_M.device))
            token_ids_M = token_ids_M.masked_fill(is_stop_M, stop_ids[0])
        drawn.append(rank_of(token_ids_M, teacher_M_V))
        student_top.append(rank_of(student_M_V.argmax(-1), teacher_M_V))
    return TeacherRanks(torch.cat(drawn), torch.cat(student_top))


def merged(logits_M_V: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """The stop ids' whole probability on the first of them."""
    if len(stop_ids) < 2:
        return logits_M_V
    index = torch.tensor(stop_ids, device=logits_M_V.device)
    whole_M_1 = logits_M_V[:, index].logsumexp(-1, keepdim=True)
    return logits_M_V.index_fill(-1, index, -torch.inf).index_copy(-1, index[:1], whole_M_1)


def rank_of(token_ids_M: Tensor, logits_M_V: Tensor) -> Tensor:
    return (logits_M_V > logits_M_V.gather(-1, token_ids_M[:, None])).sum(-1) + 1


def rank_summary(rank_N: Tensor) -> dict[str, float]:
    """Mean rank, the share of rank 1 and that of the first five, as JSON values."""
    return {
        "mean": rank_N.double().mean().item(),
        "first": (rank_N == 1).double().mean().item(),
        f"in_first_{NEAR_TOP}": (rank_N <= NEAR_TOP).double().mean().item(),
    }
