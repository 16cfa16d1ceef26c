"""The registered ops of a linear op joined by autograd, and the call that plans them."""

import torch
from torch import Tensor

from esr_kernels.autograd_rules import check_no_second_derivative, restore_saved, save_for_backward
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.matrix_product import gradient_dtype
from esr_kernels.output_projection.plan import LinearPlan, Schedule, default_workspace_bytes, plan_linear_op
from esr_kernels.output_projection.registration import CommonInputs


class LinearOpFunction(torch.autograd.Function):
    """Arguments: the name of the registered op, then its own, which begin with `CommonInputs`."""

    @staticmethod
    def forward(ctx, name: str, *arguments) -> tuple[Tensor, ...]:
        forward = getattr(torch.ops.esr_kernels, f"{name}_forward")
        *outputs, gradient_logits, gradient_unit, hidden_gradient = forward(*arguments)
        common = CommonInputs(*arguments[: len(CommonInputs._fields)])
        kept = {
            Schedule.VALUE.value: (),
            Schedule.HIDDEN.value: (hidden_gradient,),
            Schedule.KEEP.value: (gradient_logits, gradient_unit, *common[:3]),
            Schedule.RECOMPUTE.value: (gradient_unit, *(a for a in arguments if isinstance(a, Tensor))),
        }[common.schedule]
        save_for_backward(ctx, *kept)
        ctx.name, ctx.schedule, ctx.vocab_size = name, common.schedule, common.vocab_size
        ctx.settings = tuple(None if isinstance(a, Tensor) else a for a in arguments)
        ctx.is_tensor = tuple(isinstance(a, Tensor) for a in arguments)
        ctx.hidden_dtype = common.hidden_N_D.dtype
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, upstream, *_) -> tuple[Tensor | None, ...]:
        check_no_second_derivative(ctx.name)
        gradients = [None] * (1 + len(ctx.settings))  # the name has none
        if upstream is None:
            return tuple(gradients)
        needs = list(ctx.needs_input_grad[1:4])  # hidden states, weight, bias
        if ctx.schedule == Schedule.HIDDEN.value:
            (hidden_gradient,) = restore_saved(ctx)
            # 0 for upstream 0, also where the row is NaN
            weighted = (hidden_gradient * upstream[:, None]).masked_fill_(upstream[:, None] == 0, 0.0)
            gradients[1] = weighted.to(ctx.hidden_dtype)
            return tuple(gradients)
        if ctx.schedule == Schedule.KEEP.value:
            found = torch.ops.esr_kernels.linear_backward_of_kept(upstream, *restore_saved(ctx), ctx.vocab_size, needs)
        else:
            unit, *tensors = restore_saved(ctx)
            tensors = iter(tensors)
            arguments = [next(tensors) if is_t else s for is_t, s in zip(ctx.is_tensor, ctx.settings, strict=True)]
            backward = getattr(torch.ops.esr_kernels, f"{ctx.name}_backward_by_recomputing")
            found = backward(upstream, unit, needs, *arguments)
        for position, (gradient, is_needed) in enumerate(zip(found, needs, strict=True), start=1):
            gradients[position] = gradient if is_needed else None
        return tuple(gradients)


def run_linear_op(
    name: str,
    hidden_N_D: Tensor,
    head: OutputHead,
    vocab_size: int,
    logits: LogitStorage,
    workspace_bytes: int | None,
    own_arguments: tuple,
    *,
    num_sides: int,
) -> tuple[Tensor, ...]:
    """Plan the registered linear op `name` and run it, recorded by autograd; see `define_linear_op`.

    Args:
        num_sides: 2 where the op projects a teacher's hidden states as well, else 1.
    """
    plan = plan_for(name, hidden_N_D, head, vocab_size, logits, workspace_bytes, num_sides=num_sides)
    common = CommonInputs.of(hidden_N_D, head, vocab_size, plan)
    return LinearOpFunction.apply(name, *common, *own_arguments)


def plan_for(
    name: str,
    hidden_N_D: Tensor,
    head: OutputHead,
    vocab_size: int,
    logits: LogitStorage,
    workspace_bytes: int | None,
    *,
    num_sides: int,
    has_row_gradient: bool = True,
) -> LinearPlan:
    """`plan_linear_op` for these tensors, in the present state of autograd.

    Without a row gradient, which could be made in forward for an upstream gradient of 1, a gradient of the hidden states needs
    as much as one of the head.
    """
    has_grad = torch.is_grad_enabled()
    needs_hidden_gradient = has_grad and hidden_N_D.requires_grad
    has_trained_head = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    needs_head_gradient = has_grad and has_trained_head
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_N_D.device)
    return plan_linear_op(
        name,
        hidden_N_D.shape[0],
        vocab_size,
        num_sides=num_sides,
        needs_hidden_gradient=needs_hidden_gradient,
        needs_head_gradient=needs_head_gradient or (needs_hidden_gradient and not has_row_gradient),
        gradient_itemsize=gradient_dtype(hidden_N_D, head.weight).itemsize,
        storage=logits,
        workspace_bytes=workspace_bytes,
    )
