"""`linear_prefix_logprobs` under `Impl.FUSED`: rows of the prefix are compacted, the registered op runs on them."""

import torch
from torch import Tensor

from esr_kernels.linear_prefix_logprobs.registration import NAME
from esr_kernels.linear_prefix_logprobs.rows import TokenLogprobs
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.autograd import run_linear_op
from esr_kernels.prefix_logprobs.prefix_slots import PrefixSlots, prefix_mask, select_prefix_slots
from esr_kernels.prefix_logprobs.result import PrefixLogprobs


def linear_prefix_logprobs_fused(
    hidden_B_T_D: Tensor,
    head: OutputHead,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    lengths_B: Tensor | None,
    temperature: float,
    logits: LogitStorage,
    workspace_bytes: int | None,
) -> PrefixLogprobs:
    """See `esr_kernels.linear_prefix_logprobs`."""
    slots = select_prefix_slots(token_ids_B_T, starts_B, lengths_B, horizon)
    slot_N = slots_to_project(token_ids_B_T, starts_B, lengths_B, horizon)
    token_ids_N = slots.token_B_K.flatten()[slot_N]
    hidden_N_D = select_rows(hidden_B_T_D, slots, slot_N)
    arguments = hidden_N_D, head, head.vocab_size, logits, workspace_bytes, (token_ids_N, temperature)
    outputs = TokenLogprobs(*run_linear_op(NAME, *arguments, num_sides=1))

    def at_their_slots(values_N: Tensor) -> Tensor:
        values = values_N.new_zeros(slots.mask_B_K.numel()).index_copy(0, slot_N, values_N)
        return values.view(slots.mask_B_K.shape)

    # The upstream gradient of a slot outside the mask is ignored, also where it is NaN.
    logprobs_B_K = at_their_slots(outputs.logprob_N).masked_fill(~slots.mask_B_K, 0.0)
    return PrefixLogprobs(
        logprobs_B_K, at_their_slots(outputs.entropy_N), slots.mask_B_K, at_their_slots(outputs.is_top1_N)
    )


def slots_to_project(token_ids_B_T: Tensor, starts_B: Tensor, lengths_B: Tensor | None, horizon: int) -> Tensor:
    """Indices into the flattened (B, K) slots: those that hold a token where the host can count them without waiting.

    Elsewhere as many as there can be, which is a number that the host knows; those that hold no token are projected as zeros.
    """
    (batch_size, num_columns), device = token_ids_B_T.shape, token_ids_B_T.device
    if can_count_slots(starts_B):
        is_valid_B_K = prefix_mask(starts_B, lengths_B, horizon, num_columns)
        return is_valid_B_K.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
    first_slots = torch.arange(min(horizon, max(num_columns - 1, 0)), device=device)
    return (torch.arange(batch_size, device=device)[:, None] * horizon + first_slots).flatten()


def can_count_slots(starts_B: Tensor) -> bool:
    """Whether the host may look at the starts: a traced graph must not depend on them."""
    return starts_B.device.type == "cpu" and not torch.compiler.is_compiling()


def select_rows(hidden_B_T_D: Tensor, slots: PrefixSlots, slot_N: Tensor) -> Tensor:
    """Hidden states (N, D) that predict the tokens of these slots, 0 for those that hold none; differentiable."""
    batch_N, row_N, is_valid_N = (x.flatten()[slot_N] for x in (slots.batch_B_K, slots.row_B_K, slots.mask_B_K))
    return hidden_B_T_D[batch_N, row_N].masked_fill(~is_valid_N[:, None], 0.0)
