"""Forward of the fused linear divergence: chunks of rows are projected and go through the row kernel."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.linear_divergence.backward import accumulate_hidden_gradient
from esr_kernels.linear_divergence.matrix_product import gradient_dtype
from esr_kernels.linear_divergence.plan import LinearPlan, Schedule, padded_vocab_size
from esr_kernels.linear_divergence.projection import Projection, Side
from esr_kernels.output_head import OutputHead
from esr_kernels.token_divergence.forward_kernel import launch_divergence_rows
from esr_kernels.token_divergence.row_tensors import RowOutputs, stop_ids_on_device


class LinearInputs(NamedTuple):
    student_hidden_N_D: Tensor
    student_head: OutputHead
    teacher_hidden_N_E: Tensor
    teacher_head: OutputHead
    divergence: tuple[str, float]  # Divergence.kernel()
    loss_temperature: float
    token_ids_N: Tensor | None
    stop_ids: tuple[int, ...]
    vocab_size: int


class LinearForward(NamedTuple):
    """Outputs, and what the schedule leaves for backward; what it does not leave is empty.

    Row n of `gradient_logits_N_V` times `gradient_unit_N[n]` is d(divergence_N[n])/d(hidden @ weight.T + bias).
    """

    outputs: RowOutputs
    gradient_logits_N_V: Tensor  # KEEP; float16, or float32 for float32 models; padded to whole tiles
    gradient_unit_N: Tensor  # KEEP, RECOMPUTE; float32
    hidden_gradient_N_D: Tensor  # HIDDEN; float32, for an upstream gradient of 1

    @classmethod
    def allocate(cls, inputs: LinearInputs, schedule: Schedule) -> "LinearForward":
        hidden_N_D, weight_V_D = inputs.student_hidden_N_D, inputs.student_head.weight
        num_rows, width = hidden_N_D.shape[0], padded_vocab_size(inputs.vocab_size)
        keeps, has_unit = schedule is Schedule.KEEP, schedule is not Schedule.VALUE
        return cls(
            RowOutputs.allocate(hidden_N_D),
            hidden_N_D.new_empty((num_rows, width) if keeps else (0, 0), dtype=gradient_dtype(hidden_N_D, weight_V_D)),
            hidden_N_D.new_empty(num_rows if has_unit else 0, dtype=torch.float32),
            hidden_N_D.new_empty(hidden_N_D.shape if schedule is Schedule.HIDDEN else (0, 0), dtype=torch.float32),
        )


def run_forward(inputs: LinearInputs, plan: LinearPlan) -> LinearForward:
    """Outputs of all rows, and by `plan.schedule` the gradient of the hidden states or d(logits).

    Memory beyond the results: the logits of `plan.chunk_rows` rows of both sides (`logit_bytes_per_row`). FLOP: 2 N V (D + E),
    and 2 N V D more for HIDDEN.
    """
    forward = LinearForward.allocate(inputs, plan.schedule)
    kept = forward.gradient_logits_N_V if plan.schedule is Schedule.KEEP else None
    makes_gradient = plan.schedule in (Schedule.KEEP, Schedule.HIDDEN)
    unit_N = None if plan.schedule is Schedule.VALUE else forward.gradient_unit_N
    for rows, gradient_n_V in divergence_chunks(inputs, plan, forward.outputs, unit_N, kept, makes_gradient):
        if plan.schedule is Schedule.HIDDEN:
            hidden_gradient_n_D = forward.hidden_gradient_N_D[rows]
            accumulate_hidden_gradient(gradient_n_V, inputs.student_head.weight, hidden_gradient_n_D)
            hidden_gradient_n_D.mul_(unit_N[rows, None])
    return forward


def divergence_chunks(
    inputs: LinearInputs,
    plan: LinearPlan,
    outputs: RowOutputs,
    gradient_unit_N: Tensor | None,
    kept_gradient_N_V: Tensor | None,
    makes_gradient: bool,
) -> Iterator[tuple[slice, Tensor | None]]:
    """Fill `outputs` chunk by chunk; yield the rows of each and their d(logits) (n, V), valid until the next."""
    student_hidden_N_D = inputs.student_hidden_N_D
    num_rows, vocab_size = student_hidden_N_D.shape[0], inputs.vocab_size
    student_side = Side.of(student_hidden_N_D, inputs.student_head, inputs.loss_temperature, vocab_size)
    teacher_side = Side.of(inputs.teacher_hidden_N_E, inputs.teacher_head, inputs.loss_temperature, vocab_size)
    projection = Projection(student_side, teacher_side, plan.chunk_rows, plan.storage)
    stop_ids = stop_ids_on_device(inputs.stop_ids, student_hidden_N_D.device)
    dtype = gradient_dtype(student_hidden_N_D, inputs.student_head.weight)
    buffer = projection.gradient_buffer(dtype) if makes_gradient and kept_gradient_N_V is None else None
    for start in range(0, num_rows, plan.chunk_rows):
        rows = slice(start, min(start + plan.chunk_rows, num_rows))
        gradient_n_V = None
        if makes_gradient:
            gradient_n_V = buffer[: rows.stop - start] if kept_gradient_N_V is None else kept_gradient_N_V[rows]
            gradient_n_V = gradient_n_V[:, :vocab_size]
        launch_divergence_rows(
            *projection.project(rows),
            inputs.divergence,
            None if inputs.token_ids_N is None else inputs.token_ids_N[rows],
            stop_ids,
            vocab_size,
            outputs.rows(rows),
            gradient_N_V=gradient_n_V,
            gradient_unit_N=None if gradient_unit_N is None else gradient_unit_N[rows],
            gradient_dtype=dtype,
        )
        yield rows, gradient_n_V
