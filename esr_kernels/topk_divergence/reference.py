"""Reference of `topk_divergence`: both sides as distributions over K + 1 events. The specification."""

import math

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.output_head import OutputHead
from esr_kernels.token_divergence.reference import (
    agreement,
    divergence_of_events,
    entropy_of_events,
    is_fully_masked,
    logsumexp,
)
from esr_kernels.topk_divergence.topk_ids import is_repeated

# Served log-probs are float32 at best: their sum cannot tell a smaller tail from none.
SMALLEST_TAIL = 2.0**-23


def topk_divergence_reference(
    student_hidden_N_D: Tensor,
    student_head: OutputHead,
    teacher_ids_N_K: Tensor,
    teacher_logprobs_N_K: Tensor,
    divergence: Divergence,
    tail_bucket: bool,
    renormalize: bool,
    loss_temperature: float,
) -> DivergenceOutput:
    """See `esr_kernels.topk_divergence`."""
    logits_N_V = student_head.logits(student_hidden_N_D) / loss_temperature
    logits_N_V = logits_N_V.to(torch.promote_types(logits_N_V.dtype, teacher_logprobs_N_K.dtype))
    # The sum of the tail is rounded once more than those of the ids: an offset common to all logits must not come into it.
    largest_N_1 = logits_N_V.detach().amax(dim=-1, keepdim=True)
    logits_N_V = logits_N_V - largest_N_1.masked_fill(largest_N_1.isinf(), 0.0)
    vocab_size = logits_N_V.shape[-1]

    is_id_N_K = (teacher_ids_N_K >= 0) & (teacher_ids_N_K < vocab_size) & ~is_repeated(teacher_ids_N_K)
    is_foreign_N = ((teacher_ids_N_K < -1) | (teacher_ids_N_K >= vocab_size)).any(dim=-1)
    # One more column, of probability 0, for the empty slots to point at.
    padded = torch.cat([logits_N_V, torch.full_like(logits_N_V[:, :1], -math.inf)], dim=-1)  # (N, V + 1)
    column_N_K = teacher_ids_N_K.long().masked_fill(~is_id_N_K, vocab_size)

    # Events by their unnormalised log-probabilities.
    student_events = padded.gather(-1, column_N_K)
    teacher_events = teacher_logprobs_N_K.to(logits_N_V.dtype).masked_fill(~is_id_N_K, -math.inf)
    is_best_N_K = teacher_events == teacher_events.amax(dim=-1, keepdim=True)
    masked_N = (teacher_ids_N_K == -1).all(dim=-1)
    if tail_bucket:
        teacher_tail_N = log1mexp(logsumexp(teacher_events).clamp(max=math.log1p(-SMALLEST_TAIL)))
        has_tail_N = is_id_N_K.sum(dim=-1) < vocab_size
        teacher_tail_N = teacher_tail_N.masked_fill(~has_tail_N, -math.inf)
        teacher_events = torch.cat([teacher_events, teacher_tail_N[:, None]], dim=-1)  # (N, K + 1)
    if tail_bucket or not renormalize:
        student_tail_N = logsumexp(padded.scatter(-1, column_N_K, -math.inf))
        student_events = torch.cat([student_events, student_tail_N[:, None]], dim=-1)
    masked_N = masked_N | is_fully_masked(student_events)
    student_events = torch.log_softmax(student_events.masked_fill(masked_N[:, None], 0.0), dim=-1)
    if renormalize:
        # Also with the tail: the served log-probs are rounded, their total may be a little off 1, or above it.
        masked_N = masked_N | is_fully_masked(teacher_events)
        teacher_events = torch.log_softmax(teacher_events.masked_fill(masked_N[:, None], 0.0), dim=-1)
    else:
        student_events = student_events[:, :-1]
    student_events = student_events.masked_fill(masked_N[:, None], 0.0)
    teacher_events = teacher_events.masked_fill(masked_N[:, None], 0.0)
    teacher_events = teacher_events.masked_fill(is_foreign_N[:, None], math.nan)

    masked_N = masked_N & ~is_foreign_N
    divergence_N = divergence_of_events(divergence, student_events, teacher_events, masked_N)
    divergence_N = divergence_N.masked_fill(is_foreign_N, math.nan)
    with torch.no_grad():
        teacher_top1_N = column_N_K.masked_fill(~is_best_N_K, vocab_size).amin(dim=-1)
        return DivergenceOutput(
            divergence_N=divergence_N,
            student_entropy_N=entropy_of_events(student_events, masked_N),
            teacher_entropy_N=entropy_of_events(teacher_events, masked_N),
            student_logprob_N=torch.full_like(divergence_N, math.nan),
            teacher_logprob_N=torch.full_like(divergence_N, math.nan),
            top1_agreement_N=agreement(logits_N_V.argmax(dim=-1) == teacher_top1_N, divergence_N, masked_N),
        )


def log1mexp(logprobs_N: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation at either end."""
    near_one = torch.log(-torch.expm1(logprobs_N))
    return torch.where(logprobs_N > -math.log(2), near_one, torch.log1p(-torch.exp(logprobs_N)))
