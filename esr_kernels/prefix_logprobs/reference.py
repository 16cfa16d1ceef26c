"""Reference of `prefix_logprobs`: rows of the valid slots, log-softmax, and back to their slots. The specification."""

import math

import torch
from torch import Tensor

from esr_kernels.gather_logprobs.reference import tempered_log_softmax
from esr_kernels.prefix_logprobs.prefix_slots import prefix_mask
from esr_kernels.prefix_logprobs.result import PrefixLogprobs


def prefix_logprobs_reference(
    logits_B_T_V: Tensor,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    lengths_B: Tensor | None,
    temperature: float,
) -> PrefixLogprobs:
    """See `esr_kernels.prefix_logprobs`."""
    mask_B_K, batch_N, row_N, token_N = select_valid_slots(token_ids_B_T, starts_B, lengths_B, horizon)
    return scatter_slots(logits_B_T_V[batch_N, row_N], token_N, mask_B_K, temperature)


def select_valid_slots(
    token_ids_B_T: Tensor, starts_B: Tensor, lengths_B: Tensor | None, horizon: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask (B, K), and for the N valid slots the rollout, the row that predicts the token, and the token."""
    starts_B = starts_B.to(token_ids_B_T.device)
    lengths_B = None if lengths_B is None else lengths_B.to(token_ids_B_T.device)
    mask_B_K = prefix_mask(starts_B, lengths_B, horizon, token_ids_B_T.shape[1])
    batch_N, slot_N = mask_B_K.nonzero(as_tuple=True)
    column_N = starts_B[batch_N] + slot_N  # of the response token; the row that predicts it is one column earlier
    return mask_B_K, batch_N, column_N - 1, token_ids_B_T[batch_N, column_N]


def scatter_slots(logits_N_V: Tensor, token_ids_N: Tensor, mask_B_K: Tensor, temperature: float) -> PrefixLogprobs:
    """The results of each valid slot, put at its place among zeros."""
    logprobs_N_V = tempered_log_softmax(logits_N_V, temperature)
    is_known_N = (token_ids_N >= 0) & (token_ids_N < logits_N_V.shape[1])
    logprob_N = logprobs_N_V.gather(1, token_ids_N.long().masked_fill(~is_known_N, 0)[:, None]).squeeze(1)
    logprob_N = logprob_N.masked_fill(~is_known_N, math.nan)
    entropy_N = torch.special.entr(logprobs_N_V.detach().exp()).sum(-1)  # entr(0) = 0: -inf logits add nothing
    is_top1_N = (logits_N_V.argmax(-1) == token_ids_N) & logprob_N.isfinite()
    zeros_B_K, valid = logprob_N.new_zeros(mask_B_K.shape), mask_B_K.nonzero(as_tuple=True)
    return PrefixLogprobs(
        zeros_B_K.index_put(valid, logprob_N),
        zeros_B_K.index_put(valid, entropy_N),
        mask_B_K,
        torch.zeros_like(mask_B_K).index_put(valid, is_top1_N),
    )
