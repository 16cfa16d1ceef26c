"""Reference of `linear_prefix_logprobs`: `prefix_logprobs` whose head sees the rows of valid slots only. The specification."""

from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.prefix_logprobs.reference import scatter_slots, select_valid_slots
from esr_kernels.prefix_logprobs.result import PrefixLogprobs


def linear_prefix_logprobs_reference(
    hidden_B_T_D: Tensor,
    head: OutputHead,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    lengths_B: Tensor | None,
    temperature: float,
) -> PrefixLogprobs:
    """See `esr_kernels.linear_prefix_logprobs`."""
    mask_B_K, batch_N, row_N, token_N = select_valid_slots(token_ids_B_T, starts_B, lengths_B, horizon)
    return scatter_slots(head.logits(hidden_B_T_D[batch_N, row_N]), token_N, mask_B_K, temperature)
