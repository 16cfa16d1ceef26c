"""`linear_divergence` under `Impl.FUSED`: plan, then the registered ops joined by autograd."""

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_kernel import choose_kernel
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.linear_divergence import registration  # noqa: F401 (defines the ops)
from esr_kernels.linear_divergence.matrix_product import gradient_dtype
from esr_kernels.linear_divergence.plan import Schedule, default_workspace_bytes, plan_linear_divergence
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.token_divergence.autograd import can_be_saved, check_no_second_derivative

# Positions in the ops' argument list (registration.py) of what may get a gradient and of what selects the plan.
STUDENT_HIDDEN, STUDENT_WEIGHT, STUDENT_BIAS, VOCAB_SIZE, SCHEDULE = 0, 1, 2, 15, 16


class LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, ...]:
        *outputs, gradient_logits, gradient_unit, hidden_gradient = torch.ops.esr_kernels.linear_divergence_forward(
            *arguments
        )
        ctx.schedule = arguments[SCHEDULE]
        kept = {
            Schedule.VALUE.value: (),
            Schedule.HIDDEN.value: (hidden_gradient,),
            Schedule.KEEP.value: (gradient_logits, gradient_unit, *arguments[: STUDENT_BIAS + 1]),
            Schedule.RECOMPUTE.value: (gradient_unit, *(a for a in arguments if can_be_saved(a))),
        }[ctx.schedule]
        ctx.save_for_backward(*kept)
        ctx.settings = tuple(None if can_be_saved(a) else a for a in arguments)
        ctx.is_saved = tuple(can_be_saved(a) for a in arguments)
        ctx.hidden_dtype = arguments[STUDENT_HIDDEN].dtype
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, upstream, *_) -> tuple[Tensor | None, ...]:
        check_no_second_derivative("linear_divergence")
        gradients = [None] * len(ctx.settings)
        if upstream is None:
            return tuple(gradients)
        needs = list(ctx.needs_input_grad[: STUDENT_BIAS + 1])
        if ctx.schedule == Schedule.HIDDEN.value:
            (hidden_gradient,) = ctx.saved_tensors
            # 0 for upstream 0, also where the row is NaN
            weighted = (hidden_gradient * upstream[:, None]).masked_fill_(upstream[:, None] == 0, 0.0)
            gradients[STUDENT_HIDDEN] = weighted.to(ctx.hidden_dtype)
            return tuple(gradients)
        if ctx.schedule == Schedule.KEEP.value:
            found = torch.ops.esr_kernels.linear_divergence_backward_of_kept(
                upstream, *ctx.saved_tensors, ctx.settings[VOCAB_SIZE], needs
            )
        else:
            unit, *tensors = ctx.saved_tensors
            tensors = iter(tensors)
            arguments = [next(tensors) if is_t else s for is_t, s in zip(ctx.is_saved, ctx.settings, strict=True)]
            found = torch.ops.esr_kernels.linear_divergence_backward_by_recomputing(upstream, unit, needs, *arguments)
        for position, (gradient, is_needed) in enumerate(zip(found, needs, strict=True)):
            gradients[position] = gradient if is_needed else None
        return tuple(gradients)


def linear_divergence_fused(
    student_hidden_N_D: Tensor,
    student_head: OutputHead,
    teacher_hidden_N_E: Tensor,
    teacher_head: OutputHead,
    divergence: Divergence,
    loss_temperature: float,
    token_ids_N: Tensor | None,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    logits: LogitStorage,
    workspace_bytes: int | None,
) -> DivergenceOutput:
    """See `esr_kernels.linear_divergence`. `stop_ids` are sorted; `vocab_size` is at most either side's."""
    has_grad = torch.is_grad_enabled()
    weight, bias = student_head.weight, student_head.bias
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(student_hidden_N_D.device)
    plan = plan_linear_divergence(
        student_hidden_N_D.shape[0],
        vocab_size,
        needs_hidden_gradient=has_grad and student_hidden_N_D.requires_grad,
        needs_head_gradient=has_grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        gradient_itemsize=gradient_dtype(student_hidden_N_D, weight).itemsize,
        storage=logits,
        workspace_bytes=workspace_bytes,
    )
    name, parameter = choose_kernel("linear_divergence", divergence)
    return DivergenceOutput(
        *LinearDivergence.apply(
            student_hidden_N_D,
            weight,
            bias,
            student_head.logit_scale,
            student_head.softcap,
            teacher_hidden_N_E,
            teacher_head.weight,
            teacher_head.bias,
            teacher_head.logit_scale,
            teacher_head.softcap,
            name,
            parameter,
            loss_temperature,
            token_ids_N,
            stop_ids,
            vocab_size,
            plan.schedule.value,
            plan.storage.value,
            plan.chunk_rows,
        )
    )
