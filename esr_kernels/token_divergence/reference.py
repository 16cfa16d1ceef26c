"""Reference of `token_divergence`: plain PyTorch, any device and float dtype, differentiable. The specification."""

import math

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_output import DivergenceOutput


def token_divergence_reference(
    student_logits_N_V: Tensor,
    teacher_logits_N_V: Tensor,
    divergence: Divergence,
    loss_temperature: float,
    token_ids_N: Tensor | None,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> DivergenceOutput:
    """See `esr_kernels.token_divergence`. `stop_ids` are sorted; `vocab_size` is at most either side's."""
    dtype = torch.promote_types(student_logits_N_V.dtype, teacher_logits_N_V.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    student_logits = student_logits_N_V[:, :vocab_size].to(dtype) / loss_temperature
    teacher_logits = teacher_logits_N_V[:, :vocab_size].to(dtype) / loss_temperature
    masked_N = is_fully_masked(student_logits) | is_fully_masked(teacher_logits)

    # Masked rows get any finite logits here; their results are filled in at the end.
    student_logprobs = torch.log_softmax(student_logits.masked_fill(masked_N[:, None], 0.0), dim=-1)
    teacher_logprobs = torch.log_softmax(teacher_logits.masked_fill(masked_N[:, None], 0.0), dim=-1)
    if len(stop_ids) > 1:
        student_logprobs = merge_stop_event(student_logprobs, stop_ids)
        teacher_logprobs = merge_stop_event(teacher_logprobs, stop_ids)

    divergence_N = divergence_of_events(divergence, student_logprobs, teacher_logprobs, masked_N)
    with torch.no_grad():
        is_top1_equal_N = student_logprobs.argmax(dim=-1) == teacher_logprobs.argmax(dim=-1)
        return DivergenceOutput(
            divergence_N=divergence_N,
            student_entropy_N=entropy_of_events(student_logprobs, masked_N),
            teacher_entropy_N=entropy_of_events(teacher_logprobs, masked_N),
            student_logprob_N=_logprob_of_tokens(student_logprobs, token_ids_N, stop_ids, masked_N),
            teacher_logprob_N=_logprob_of_tokens(teacher_logprobs, token_ids_N, stop_ids, masked_N),
            top1_agreement_N=agreement(is_top1_equal_N, divergence_N, masked_N),
        )


def is_fully_masked(logits_N_V: Tensor) -> Tensor:
    """True for rows whose logits are all -inf."""
    return (logits_N_V == -math.inf).all(dim=-1)


def merge_stop_event(logprobs_N_V: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """Put the stop ids' total probability on the lowest of them and probability 0 on the others.

    The shape stays (N, V): an event of probability 0 on both sides contributes to nothing.
    """
    stop_index = torch.tensor(stop_ids, device=logprobs_N_V.device)
    event_N_1 = logsumexp(logprobs_N_V[:, stop_index])[:, None]
    return logprobs_N_V.index_fill(-1, stop_index, -math.inf).index_copy(-1, stop_index[:1], event_N_1)


def logsumexp(logprobs_N_M: Tensor) -> Tensor:
    """torch.logsumexp over the last axis with gradient 0, not NaN, for rows that are all -inf."""
    empty_N = is_fully_masked(logprobs_N_M)
    return torch.logsumexp(logprobs_N_M.masked_fill(empty_N[:, None], 0.0), dim=-1).masked_fill(empty_N, -math.inf)


def divergence_of_events(
    divergence: Divergence, student_logprobs_N_M: Tensor, teacher_logprobs_N_M: Tensor, masked_N: Tensor
) -> Tensor:
    """The divergence of each row: 0 with gradient 0 in masked rows; gradient 0 where it is infinite."""
    divergence_N = divergence.terms(student_logprobs_N_M, teacher_logprobs_N_M).sum(dim=-1)
    divergence_N = divergence_N.masked_fill(divergence_N == math.inf, math.inf)  # cuts the gradient
    return divergence_N.masked_fill(masked_N, 0.0)


def entropy_of_events(logprobs_N_M: Tensor, masked_N: Tensor) -> Tensor:
    """-sum p log p with 0 log 0 = 0; 0 in masked rows."""
    terms = logprobs_N_M.exp() * -logprobs_N_M
    return terms.masked_fill(logprobs_N_M == -math.inf, 0.0).sum(dim=-1).masked_fill(masked_N, 0.0)


def agreement(is_equal_N: Tensor, divergence_N: Tensor, masked_N: Tensor) -> Tensor:
    """1.0 or 0.0; 0.0 in masked rows, NaN in rows poisoned by NaN."""
    agreement_N = is_equal_N.to(divergence_N.dtype).masked_fill(divergence_N.isnan(), math.nan)
    return agreement_N.masked_fill(masked_N, 0.0)


def _logprob_of_tokens(
    logprobs_N_V: Tensor, token_ids_N: Tensor | None, stop_ids: tuple[int, ...], masked_N: Tensor
) -> Tensor:
    """Log-probability of each row's token, or of the stop event it belongs to; NaN for ids outside [0, V)."""
    if token_ids_N is None:
        return logprobs_N_V.new_full((logprobs_N_V.shape[0],), math.nan)
    is_inside_N = (token_ids_N >= 0) & (token_ids_N < logprobs_N_V.shape[-1])
    token_ids_N = token_ids_N.long().masked_fill(~is_inside_N, 0)
    if len(stop_ids) > 1:
        is_stop_N = torch.isin(token_ids_N, torch.tensor(stop_ids, device=token_ids_N.device))
        token_ids_N = token_ids_N.masked_fill(is_stop_N, stop_ids[0])
    logprob_N = logprobs_N_V.gather(-1, token_ids_N[:, None]).squeeze(-1)
    return logprob_N.masked_fill(masked_N, -math.inf).masked_fill(~is_inside_N, math.nan)
