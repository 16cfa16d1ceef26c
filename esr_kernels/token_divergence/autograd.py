"""`token_divergence` under `Impl.FUSED`: the registered ops joined by autograd."""

import torch
from torch import Tensor

from esr_kernels.autograd_rules import check_no_second_derivative, restore_saved, save_for_backward
from esr_kernels.divergence import Divergence
from esr_kernels.divergence_kernel import choose_kernel
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.token_divergence import registration  # noqa: F401 (defines the ops)


class TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_logits, teacher_logits, divergence, parameter, loss_temperature, token_ids, stop_ids, vocab_size
    ) -> tuple[Tensor, ...]:
        *outputs, row_sums, student_top1 = torch.ops.esr_kernels.token_divergence_forward(
            student_logits, teacher_logits, divergence, parameter, loss_temperature, token_ids, stop_ids, vocab_size
        )
        save_for_backward(ctx, student_logits, teacher_logits, row_sums, student_top1)
        ctx.settings = (divergence, parameter, loss_temperature, stop_ids, vocab_size)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, upstream, *_) -> tuple[Tensor | None, ...]:
        check_no_second_derivative("token_divergence")
        gradient = None
        if upstream is not None and ctx.needs_input_grad[0]:
            gradient = torch.ops.esr_kernels.token_divergence_backward(upstream, *restore_saved(ctx), *ctx.settings)
        return (
            gradient,  # student_logits
            None,  # teacher_logits: frozen
            None,  # divergence
            None,  # parameter
            None,  # loss_temperature
            None,  # token_ids
            None,  # stop_ids
            None,  # vocab_size
        )


def token_divergence_fused(
    student_logits_N_V: Tensor,
    teacher_logits_N_V: Tensor,
    divergence: Divergence,
    loss_temperature: float,
    token_ids_N: Tensor | None,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> DivergenceOutput:
    """See `esr_kernels.token_divergence`. `stop_ids` are sorted; `vocab_size` is at most either side's."""
    name, parameter = choose_kernel("token_divergence", divergence)
    return DivergenceOutput(
        *TokenDivergence.apply(
            student_logits_N_V, teacher_logits_N_V, name, parameter, loss_temperature, token_ids_N, stop_ids, vocab_size
        )
    )
