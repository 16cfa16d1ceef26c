"""`prefix_logprobs` under `Impl.FUSED`: the registered ops joined by autograd."""

import torch
from torch import Tensor

from esr_kernels.autograd_rules import check_no_second_derivative
from esr_kernels.prefix_logprobs import registration  # noqa: F401 (defines the ops)
from esr_kernels.prefix_logprobs.prefix_slots import select_prefix_slots
from esr_kernels.prefix_logprobs.result import PrefixLogprobs


class SlotLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rows, token_ids, temperature) -> tuple[Tensor, Tensor, Tensor]:
        logprob, entropy, is_top1, sums = torch.ops.esr_kernels.prefix_logprobs_forward(
            logits, rows, token_ids, temperature
        )
        ctx.save_for_backward(logits, rows, token_ids, sums)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy, is_top1)
        ctx.set_materialize_grads(False)
        return logprob, entropy, is_top1

    @staticmethod
    def backward(ctx, upstream, *_) -> tuple[Tensor | None, ...]:
        check_no_second_derivative("prefix_logprobs")
        gradient = None
        if upstream is not None and ctx.needs_input_grad[0]:
            gradient = torch.ops.esr_kernels.prefix_logprobs_backward(upstream, *ctx.saved_tensors, ctx.temperature)
        return (
            gradient,  # logits
            None,  # rows
            None,  # token_ids
            None,  # temperature
        )


def prefix_logprobs_fused(
    logits_B_T_V: Tensor,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    lengths_B: Tensor | None,
    temperature: float,
) -> PrefixLogprobs:
    """See `esr_kernels.prefix_logprobs`."""
    slots = select_prefix_slots(token_ids_B_T, starts_B, lengths_B, horizon)
    rows_B_K = slots.batch_B_K * logits_B_T_V.shape[1] + slots.row_B_K
    outputs = SlotLogprobs.apply(logits_B_T_V, rows_B_K.flatten(), slots.token_B_K.flatten(), temperature)
    logprobs_B_K, entropy_B_K, is_top1_B_K = (output_N.view(slots.mask_B_K.shape) for output_N in outputs)
    return PrefixLogprobs(logprobs_B_K, entropy_B_K, slots.mask_B_K, is_top1_B_K)
