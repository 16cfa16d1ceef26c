"""The sampler in plain PyTorch, float64 inside: the specification of `sample_tokens`."""

import torch
from torch import Tensor

from esr_kernels.sample_tokens.random_stream import uniform
from esr_kernels.sample_tokens.state import SamplerState


@torch.no_grad()
def sample_tokens_reference(logits_B_V: Tensor, state: SamplerState) -> None:
    """See `sample_tokens`. Rows that are finished are left out of every computation; R below are the running rows."""
    rows_R = (~state.finished_B).nonzero().squeeze(1)
    slots_R = state.lengths_B[rows_R]
    logits_R_V = logits_B_V[rows_R].to(torch.float64)
    invalid_R = is_invalid(logits_R_V)
    usable_R_V = logits_R_V.masked_fill(invalid_R[:, None], 0.0)

    weights_R_V = sampling_weights(
        usable_R_V,
        state.sampling_temperature_B[rows_R],
        state.top_k_B[rows_R],
        state.top_p_B[rows_R],
        state.min_p_B[rows_R],
    )
    uniform_R = uniform(state.seed_B[rows_R], state.request_ids_B[rows_R], slots_R)
    token_R, sampling_logprob_R = draw(weights_R_V, uniform_R)
    token_R = torch.where(invalid_R, fallback_token(logits_R_V), token_R)
    logprob_R = usable_R_V.log_softmax(-1).gather(1, token_R[:, None]).squeeze(1)

    state.token_ids_B_K[rows_R, slots_R] = token_R
    state.logprobs_B_K[rows_R, slots_R] = logprob_R.masked_fill(invalid_R, torch.nan).float()
    state.sampling_logprobs_B_K[rows_R, slots_R] = sampling_logprob_R.masked_fill(invalid_R, torch.nan).float()
    state.invalid_B[rows_R] |= invalid_R
    state.lengths_B[rows_R] = slots_R + 1

    is_eos_R = torch.isin(token_R, state.eos_ids_E)
    state.stopped_by_eos_B[rows_R] = is_eos_R
    state.finished_B[rows_R] = is_eos_R | (slots_R + 1 == state.horizon)
    state.next_ids_B[rows_R] = token_R
    state.next_ids_B.masked_fill_(state.finished_B, state.pad_id)
    state.active.copy_((~state.finished_B).sum())


def is_invalid(logits_R_V: Tensor) -> Tensor:
    """Rows that hold NaN or +inf, or nothing finite."""
    broken_R = (logits_R_V.isnan() | (logits_R_V == torch.inf)).any(-1)
    return broken_R | ~logits_R_V.isfinite().any(-1)


def fallback_token(logits_R_V: Tensor) -> Tensor:
    """The lowest id of the largest entry that is not NaN; 0 where every entry is NaN."""
    is_number_R_V = ~logits_R_V.isnan()
    largest_R = logits_R_V.masked_fill(~is_number_R_V, -torch.inf).amax(-1, keepdim=True)
    return first_true(is_number_R_V & (logits_R_V == largest_R))


def sampling_weights(
    logits_R_V: Tensor, sampling_temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """w_v = exp((z_v - max z) / temperature) for the ids that the filters keep, 0 for the others; float64 (R, V).

    Filters in the order of Hugging Face's warpers: temperature, top-k, top-p on the renormalised top-k, min-p. Ids
    are ranked by (logit descending, id ascending), so equal logits at a boundary are decided for the lower id, and
    top-k keeps exactly k ids. Temperature 0 keeps rank 0 alone.
    """
    is_greedy_R = sampling_temperature_R == 0
    temperature_R = sampling_temperature_R.masked_fill(is_greedy_R, 1.0)[:, None]
    weights_R_V = ((logits_R_V - logits_R_V.amax(-1, keepdim=True)) / temperature_R).exp()
    best_R_V = torch.zeros_like(weights_R_V).scatter(1, first_argmax(logits_R_V)[:, None], 1.0)
    weights_R_V = torch.where(is_greedy_R[:, None], best_R_V, weights_R_V)

    if bool(((top_k_R > 0) | (top_p_R < 1)).any()):  # sort only when some row asks for it
        order_R_V = logits_R_V.sort(dim=-1, descending=True, stable=True).indices
        ranked_R_V = weights_R_V.gather(1, order_R_V)
        ranked_R_V = ranked_R_V * kept_ranks(ranked_R_V, top_k_R, top_p_R)
        weights_R_V = torch.zeros_like(weights_R_V).scatter(1, order_R_V, ranked_R_V)
    # the largest weight is 1, so a probability relative to the largest one is the weight itself
    return weights_R_V * (weights_R_V >= min_p_R[:, None])


def kept_ranks(weights_R_V: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Which ranks top-k and then top-p keep, given the weights in rank order; bool (R, V), rank 0 always kept.

    Top-p keeps a rank while the mass before it is below top_p: the smallest set whose mass reaches top_p.
    """
    rank_V = torch.arange(weights_R_V.shape[1], device=weights_R_V.device)
    in_top_k_R_V = (top_k_R[:, None] == 0) | (rank_V < top_k_R[:, None])
    cumulative_R_V = (weights_R_V * in_top_k_R_V).cumsum(-1)
    mass_before_R_V = torch.nn.functional.pad(cumulative_R_V, (1, -1))
    is_reached_R_V = mass_before_R_V >= top_p_R[:, None] * cumulative_R_V[:, -1:]
    in_top_p_R_V = (top_p_R[:, None] >= 1) | ~is_reached_R_V | (rank_V == 0)
    return in_top_k_R_V & in_top_p_R_V


def draw(weights_R_V: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF in id order: the first id whose cumulative weight exceeds uniform * total; also its log-prob.

    An id of weight 0 is never drawn, whatever the rounding of the sums: without an id above the target it is the last
    one of positive weight.
    """
    cumulative_R_V = weights_R_V.cumsum(-1)
    total_R_1 = cumulative_R_V[:, -1:]
    possible_R_V = weights_R_V > 0
    above_R_V = possible_R_V & (cumulative_R_V > uniform_R[:, None] * total_R_1)
    last_possible_R = weights_R_V.shape[1] - 1 - first_true(possible_R_V.flip(-1))
    token_R = torch.where(above_R_V.any(-1), first_true(above_R_V), last_possible_R)
    logprob_R_1 = weights_R_V.gather(1, token_R[:, None]).log() - total_R_1.log()
    return token_R, logprob_R_1.squeeze(1)


def first_argmax(values_R_V: Tensor) -> Tensor:
    """argmax with the lowest index among equals, which torch.argmax does not promise."""
    return first_true(values_R_V == values_R_V.amax(-1, keepdim=True))


def first_true(mask_R_V: Tensor) -> Tensor:
    """Index of the first True of each row, 0 without one."""
    index_V = torch.arange(mask_R_V.shape[1], device=mask_R_V.device)
    first_R = torch.where(mask_R_V, index_V, mask_R_V.shape[1]).amin(-1)
    return first_R % mask_R_V.shape[1]
