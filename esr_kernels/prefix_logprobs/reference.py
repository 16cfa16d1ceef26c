"""Prefix log-probs in plain PyTorch: the specification of the three ops of this folder."""

import torch
from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.prefix_logprobs.result import PrefixLogprobs


def prefix_logprobs_reference(
    logits_B_T_V: Tensor,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    lengths_B: Tensor | None,
    temperature: float,
) -> PrefixLogprobs:
    """See `prefix_logprobs`. N are the valid slots, flattened."""
    mask_B_K = prefix_mask(starts_B, lengths_B, horizon, token_ids_B_T.shape[1])
    batch_N, slot_N = mask_B_K.nonzero(as_tuple=True)
    column_N = starts_B[batch_N] + slot_N  # of the response token; the row that predicts it is one column earlier
    return scatter_slots(logits_B_T_V[batch_N, column_N - 1], token_ids_B_T[batch_N, column_N], mask_B_K, temperature)


def linear_prefix_logprobs_reference(
    hidden_B_T_D: Tensor,
    head: OutputHead,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    lengths_B: Tensor | None,
    temperature: float,
) -> PrefixLogprobs:
    """See `linear_prefix_logprobs`: the same, and only the rows of valid slots reach the output head."""
    mask_B_K = prefix_mask(starts_B, lengths_B, horizon, token_ids_B_T.shape[1])
    batch_N, slot_N = mask_B_K.nonzero(as_tuple=True)
    column_N = starts_B[batch_N] + slot_N
    logits_N_V = head.logits(hidden_B_T_D[batch_N, column_N - 1])
    return scatter_slots(logits_N_V, token_ids_B_T[batch_N, column_N], mask_B_K, temperature)


def gather_logprobs_reference(
    hidden_N_D: Tensor, head: OutputHead, token_ids_N_K: Tensor, temperature: float
) -> Tensor:
    """See `gather_logprobs`. R are the rows that ask for at least one id; the others are not read."""
    is_asked_N_K = token_ids_N_K >= 0
    rows_R = is_asked_N_K.any(-1).nonzero().squeeze(1)
    logprobs_R_V = log_softmax(head.logits(hidden_N_D[rows_R]), temperature)
    gathered_R_K = logprobs_R_V.gather(1, token_ids_N_K[rows_R].clamp(min=0).long())
    gathered_R_K = gathered_R_K.masked_fill(~is_asked_N_K[rows_R], 0.0)
    return gathered_R_K.new_zeros(token_ids_N_K.shape).index_put((rows_R,), gathered_R_K)


def prefix_mask(starts_B: Tensor, lengths_B: Tensor | None, horizon: int, num_columns: int) -> Tensor:
    """Slot t is valid iff t < min(horizon, length), start + t < T and start >= 1; bool (B, horizon)."""
    slot_K = torch.arange(horizon, device=starts_B.device)
    in_tensor_B_K = (starts_B[:, None] >= 1) & (starts_B[:, None] + slot_K < num_columns)
    return in_tensor_B_K if lengths_B is None else in_tensor_B_K & (slot_K < lengths_B[:, None])


def scatter_slots(logits_N_V: Tensor, token_ids_N: Tensor, mask_B_K: Tensor, temperature: float) -> PrefixLogprobs:
    """Log-prob and entropy of each valid slot, put at its place among zeros."""
    logprobs_N_V = log_softmax(logits_N_V, temperature)
    logprob_N = logprobs_N_V.gather(1, token_ids_N[:, None].long()).squeeze(1)
    entropy_N = torch.special.entr(logprobs_N_V.detach().exp()).sum(-1)  # entr(0) = 0: -inf logits add nothing
    zeros_B_K = logprob_N.new_zeros(mask_B_K.shape)
    valid = mask_B_K.nonzero(as_tuple=True)
    return PrefixLogprobs(zeros_B_K.index_put(valid, logprob_N), zeros_B_K.index_put(valid, entropy_N), mask_B_K)


def log_softmax(logits_N_V: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32, float64 for float64."""
    dtype = torch.promote_types(logits_N_V.dtype, torch.float32)
    return (logits_N_V.to(dtype) / temperature).log_softmax(-1)
