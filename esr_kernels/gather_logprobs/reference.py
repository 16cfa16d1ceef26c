"""Reference of `gather_logprobs`: project, log-softmax, gather. The specification."""

import math

import torch
from torch import Tensor

from esr_kernels.output_head import OutputHead


def gather_logprobs_reference(
    hidden_N_D: Tensor, head: OutputHead, token_ids_N_K: Tensor, temperature: float
) -> Tensor:
    """See `esr_kernels.gather_logprobs`. R are the rows that ask for at least one id; the others are not read."""
    is_asked_N_K = token_ids_N_K != -1
    is_known_N_K = (token_ids_N_K >= 0) & (token_ids_N_K < head.vocab_size)
    rows_R = is_asked_N_K.any(-1).nonzero().squeeze(1)
    logprobs_R_V = tempered_log_softmax(head.logits(hidden_N_D[rows_R]), temperature)
    gathered_R_K = logprobs_R_V.gather(1, token_ids_N_K.long().masked_fill(~is_known_N_K, 0)[rows_R])
    gathered_R_K = gathered_R_K.masked_fill(~is_known_N_K[rows_R], math.nan).masked_fill(~is_asked_N_K[rows_R], 0.0)
    return gathered_R_K.new_zeros(token_ids_N_K.shape).index_put((rows_R,), gathered_R_K)


def tempered_log_softmax(logits_N_V: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32, float64 for float64; -inf with gradient 0 in rows that are all -inf."""
    dtype = torch.promote_types(logits_N_V.dtype, torch.float32)
    is_masked_N_1 = (logits_N_V == -math.inf).all(-1, keepdim=True)
    logits_N_V = logits_N_V.to(dtype).masked_fill(is_masked_N_1, 0.0)
    return (logits_N_V / temperature).log_softmax(-1).masked_fill(is_masked_N_1, -math.inf)
