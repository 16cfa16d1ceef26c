"""The sampler in plain PyTorch, with a sort for the filters: the specification of `sample_tokens`, bit for bit."""

import torch
from torch import Tensor

from esr_kernels.sample_tokens.fixed_point import (
    fraction_bits_for,
    fraction_of,
    least_weight_of,
    logprobs_of,
    part_of,
    scale_of_temperature,
    weights_of,
)
from esr_kernels.sample_tokens.random_stream import uniform_bits
from esr_kernels.sample_tokens.state import SamplerState


@torch.no_grad()
def sample_tokens_reference(logits_B_V: Tensor, state: SamplerState) -> None:
    """See `sample_tokens`. Rows that are finished are left out of every computation; R below are the running rows."""
    rows_R = (~state.finished_B).nonzero().squeeze(1)
    slots_R = state.lengths_B[rows_R]
    logits_R_V = logits_B_V[rows_R].float()
    invalid_R = is_invalid(logits_R_V)
    usable_R_V = logits_R_V.masked_fill(invalid_R[:, None], 0.0)
    top_logit_R = usable_R_V.amax(-1)
    fraction_bits = fraction_bits_for(logits_B_V.shape[1])

    is_greedy_R = state.sampling_temperature_B[rows_R] == 0
    temperature_R = state.sampling_temperature_B[rows_R].masked_fill(is_greedy_R, 1.0)
    weights_R_V = weights_of(usable_R_V, top_logit_R, scale_of_temperature(temperature_R), fraction_bits)
    is_kept_R_V = kept_ids(usable_R_V, weights_R_V, state.top_k_B[rows_R], state.top_p_B[rows_R])
    is_kept_R_V &= weights_R_V >= least_weight_of(state.min_p_B[rows_R], fraction_bits)[:, None]
    is_best_R_V = torch.zeros_like(is_kept_R_V).scatter(1, first_argmax(usable_R_V)[:, None], True)
    weights_R_V = weights_R_V * torch.where(is_greedy_R[:, None], is_best_R_V, is_kept_R_V)

    random_R = uniform_bits(state.seed_B[rows_R], state.request_ids_B[rows_R], slots_R)
    token_R, mass_R = draw(weights_R_V, random_R)
    drawn_logit_R = usable_R_V.gather(1, token_R[:, None]).squeeze(1)
    ones_R = torch.ones_like(temperature_R)
    raw_mass_R = weights_of(usable_R_V, top_logit_R, scale_of_temperature(ones_R), fraction_bits).sum(-1)
    logprob_R = logprobs_of(drawn_logit_R, top_logit_R, ones_R, raw_mass_R, fraction_bits)
    sampling_logprob_R = logprobs_of(drawn_logit_R, top_logit_R, temperature_R, mass_R, fraction_bits)
    token_R = torch.where(invalid_R, fallback_token(logits_R_V), token_R)

    state.token_ids_B_K[rows_R, slots_R] = token_R
    state.logprobs_B_K[rows_R, slots_R] = logprob_R.masked_fill(invalid_R, torch.nan)
    state.sampling_logprobs_B_K[rows_R, slots_R] = sampling_logprob_R.masked_fill(invalid_R, torch.nan)
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


def kept_ids(logits_R_V: Tensor, weights_R_V: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Which ids top-k and then top-p on the renormalised top-k keep; bool (R, V).

    Ids are ranked by (logit descending, id ascending), so equal logits at a boundary are decided for the lower id and top-k
    keeps exactly k ids. Top-p keeps a rank while the mass before it is below top_p of the mass of the top-k: the smallest
    set that reaches it, rank 0 at least.
    """
    if not bool(((top_k_R > 0) | (top_p_R < 1)).any()):  # sort only when some row asks for it
        return torch.ones_like(weights_R_V, dtype=torch.bool)
    order_R_V = logits_R_V.sort(dim=-1, descending=True, stable=True).indices
    ranked_R_V = weights_R_V.gather(1, order_R_V)
    rank_V = torch.arange(weights_R_V.shape[1], device=weights_R_V.device)
    in_top_k_R_V = (top_k_R[:, None] == 0) | (rank_V < top_k_R[:, None])
    mass_R_V = (ranked_R_V * in_top_k_R_V).cumsum(-1)
    need_R = part_of(mass_R_V[:, -1], fraction_of(top_p_R)).clamp(min=1)
    in_top_p_R_V = (top_p_R[:, None] >= 1) | (mass_R_V - ranked_R_V < need_R[:, None])
    return torch.zeros_like(in_top_k_R_V).scatter(1, order_R_V, in_top_k_R_V & in_top_p_R_V)


def draw(weights_R_V: Tensor, random_R: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF in id order: the first id whose cumulative weight exceeds u * total, and the total.

    All integers: an id of weight 0 is never drawn and no rounding can pass the last id. `random_R` is u as 53 bits.
    """
    cumulative_R_V = weights_R_V.cumsum(-1)
    total_R = cumulative_R_V[:, -1]
    return first_true(cumulative_R_V > part_of(total_R, random_R)[:, None]), total_R


def first_argmax(values_R_V: Tensor) -> Tensor:
    """argmax with the lowest index among equals, which torch.argmax does not promise."""
    return first_true(values_R_V == values_R_V.amax(-1, keepdim=True))


def first_true(mask_R_V: Tensor) -> Tensor:
    """Index of the first True of each row, 0 without one."""
    index_V = torch.arange(mask_R_V.shape[1], device=mask_R_V.device)
    first_R = torch.where(mask_R_V, index_V, mask_R_V.shape[1]).amin(-1)
    return first_R % mask_R_V.shape[1]
