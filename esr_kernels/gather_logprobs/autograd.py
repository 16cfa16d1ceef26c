"""`gather_logprobs` under `Impl.FUSED`: plan, then the registered ops joined by autograd."""

import torch
from torch import Tensor

from esr_kernels.autograd_rules import check_no_second_derivative, restore_saved, save_for_backward
from esr_kernels.gather_logprobs import registration  # noqa: F401 (defines the ops)
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.autograd import plan_for
from esr_kernels.output_projection.plan import Schedule
from esr_kernels.output_projection.registration import CommonInputs

NAME = "gather_logprobs"


class GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *settings_and_ids) -> Tensor:
        *settings, token_ids, temperature = settings_and_ids
        logprobs, *kept = torch.ops.esr_kernels.gather_logprobs_forward(hidden, weight, bias, *settings_and_ids)
        save_for_backward(ctx, *kept, hidden, weight, bias, token_ids)
        ctx.settings, ctx.temperature = settings, temperature
        ctx.set_materialize_grads(False)
        return logprobs

    @staticmethod
    def backward(ctx, upstream) -> tuple[Tensor | None, ...]:
        check_no_second_derivative(NAME)
        gradients = [None] * (5 + len(ctx.settings))
        if upstream is None:
            return tuple(gradients)
        *kept, hidden, weight, bias, token_ids = restore_saved(ctx)
        needs = list(ctx.needs_input_grad[:3])
        found = torch.ops.esr_kernels.gather_logprobs_backward(
            upstream, needs, *kept, hidden, weight, bias, *ctx.settings, token_ids, ctx.temperature
        )
        for position, (gradient, is_needed) in enumerate(zip(found, needs, strict=True)):
            gradients[position] = gradient if is_needed else None
        return tuple(gradients)


def gather_logprobs_fused(
    hidden_N_D: Tensor,
    head: OutputHead,
    token_ids_N_K: Tensor,
    temperature: float,
    logits: LogitStorage,
    workspace_bytes: int | None,
) -> Tensor:
    """See `esr_kernels.gather_logprobs`."""
    num_rows = token_ids_N_K.shape[0]
    student = hidden_N_D, head, head.vocab_size
    plan = plan_for(NAME, *student, logits, workspace_bytes, num_sides=1, has_row_gradient=False)
    if plan.schedule is Schedule.KEEP and not 0 < num_rows <= plan.chunk_rows:  # logits are kept all or not at all
        with torch.no_grad():
            plan = plan_for(NAME, *student, logits, workspace_bytes, num_sides=1)
        plan = plan._replace(schedule=Schedule.RECOMPUTE)
    common = CommonInputs.of(*student, plan)
    return GatherLogprobs.apply(*common, token_ids_N_K, temperature)
