"""Forward of a linear op by its schedule, and the backward that projects again where d(logits) were not kept."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.output_projection.gradients import (
    Needs,
    accumulate_hidden_gradient,
    gradients_of_chunks,
    row_weights,
)
from esr_kernels.output_projection.linear_op import LinearOp
from esr_kernels.output_projection.matrix_product import gradient_dtype
from esr_kernels.output_projection.plan import LinearPlan, Schedule, padded_vocab_size
from esr_kernels.row_gradient import RowGradient


class LinearForward(NamedTuple):
    """Outputs, and what the schedule leaves for backward; what it does not leave is empty. See `RowGradient`."""

    outputs: tuple[Tensor, ...]
    gradient_logits_N_V: Tensor  # KEEP; float16, or float32 for float32 models; padded to whole tiles
    gradient_unit_N: Tensor  # KEEP, RECOMPUTE; float32
    hidden_gradient_N_D: Tensor  # HIDDEN; float32, for an upstream gradient of 1

    @classmethod
    def allocate(cls, op: LinearOp, schedule: Schedule) -> "LinearForward":
        hidden_N_D = op.hidden_N_D
        num_rows, width = hidden_N_D.shape[0], padded_vocab_size(op.vocab_size)
        keeps, has_unit = schedule is Schedule.KEEP, schedule is not Schedule.VALUE
        dtype = gradient_dtype(hidden_N_D, op.head.weight)
        return cls(
            op.allocate_outputs(),
            hidden_N_D.new_empty((num_rows, width) if keeps else (0, 0), dtype=dtype),
            hidden_N_D.new_empty(num_rows if has_unit else 0, dtype=torch.float32),
            hidden_N_D.new_empty(hidden_N_D.shape if schedule is Schedule.HIDDEN else (0, 0), dtype=torch.float32),
        )


def run_forward(op: LinearOp, plan: LinearPlan) -> LinearForward:
    """Outputs of all rows, and by `plan.schedule` the gradient of the hidden states or d(logits).

    Memory beyond the results: the logits of `plan.chunk_rows` rows (`logit_bytes_per_row`). FLOP: 2 N V for each column of the
    hidden states that are projected, and 2 N V D more for HIDDEN.
    """
    forward = LinearForward.allocate(op, plan.schedule)
    kept = forward.gradient_logits_N_V if plan.schedule is Schedule.KEEP else None
    makes_gradient = plan.schedule in (Schedule.KEEP, Schedule.HIDDEN)
    unit_N = None if plan.schedule is Schedule.VALUE else forward.gradient_unit_N
    for rows, gradient_n_V in gradient_chunks(op, plan, forward.outputs, unit_N, kept, makes_gradient):
        if plan.schedule is Schedule.HIDDEN:
            hidden_gradient_n_D = forward.hidden_gradient_N_D[rows]
            accumulate_hidden_gradient(gradient_n_V, op.head.weight, hidden_gradient_n_D)
            hidden_gradient_n_D.mul_(unit_N[rows, None])
    return forward


def backward_by_recomputing(
    upstream_N: Tensor, gradient_unit_N: Tensor, op: LinearOp, plan: LinearPlan, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias; d(logits) of one chunk exist at a time.

    Memory beyond the results: the logits of `plan.chunk_rows` rows, (N, D) float16, the weight's gradient in float32, (n, D)
    float32. FLOP: the projection again, and 2 N V D for each of hidden states and weight.
    """
    hidden_N_D, head = op.hidden_N_D, op.head
    weight_N = row_weights(upstream_N, gradient_unit_N)
    outputs, unit_N = op.allocate_outputs(), torch.empty_like(gradient_unit_N)
    chunks = gradient_chunks(op, plan, outputs, unit_N, None, makes_gradient=True)
    return gradients_of_chunks(chunks, weight_N, hidden_N_D, head, needs)


def gradient_chunks(
    op: LinearOp,
    plan: LinearPlan,
    outputs: tuple[Tensor, ...],
    gradient_unit_N: Tensor | None,
    kept_gradient_N_V: Tensor | None,
    makes_gradient: bool,
) -> Iterator[tuple[slice, Tensor | None]]:
    """Fill `outputs` chunk by chunk; yield the rows of each and their d(logits) (n, V), valid until the next."""
    projection = op.projection(plan)
    dtype = gradient_dtype(op.hidden_N_D, op.head.weight)
    buffer = projection.gradient_buffer(dtype) if makes_gradient and kept_gradient_N_V is None else None
    num_rows = op.hidden_N_D.shape[0]
    for start in range(0, num_rows, plan.chunk_rows):
        rows = slice(start, min(start + plan.chunk_rows, num_rows))
        gradient_n_V = None
        if makes_gradient:
            gradient_n_V = buffer[: rows.stop - start] if kept_gradient_N_V is None else kept_gradient_N_V[rows]
            gradient_n_V = gradient_n_V[:, : op.vocab_size]
        unit_n = None if gradient_unit_N is None else gradient_unit_N[rows]
        outputs_n = type(outputs)(*(output_N[rows] for output_N in outputs))
        op.run_rows(rows, projection, outputs_n, RowGradient(gradient_n_V, unit_n, dtype))
        yield rows, gradient_n_V
