"""Reference of `gather_logprobs`: project, log-softmax, gather. The specification."""

import math

from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.prefix_logprobs.reference import tempered_log_softmax


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
