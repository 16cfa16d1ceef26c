"""Backward that projects again, for batches whose d(logits) do not fit in the workspace."""

import torch
from torch import Tensor

from esr_kernels.linear_divergence.backward import (
    Needs,
    accumulate_hidden_gradient,
    head_gradients,
    row_weights,
    weigh_hidden_gradient,
)
from esr_kernels.linear_divergence.forward import LinearInputs, divergence_chunks
from esr_kernels.linear_divergence.matrix_product import gradient_dtype
from esr_kernels.linear_divergence.plan import LinearPlan
from esr_kernels.token_divergence.row_tensors import RowOutputs


def backward_by_recomputing(
    upstream_N: Tensor, gradient_unit_N: Tensor, inputs: LinearInputs, plan: LinearPlan, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias; d(logits) of one chunk exist at a time.

    Memory beyond the results: the logits of `plan.chunk_rows` rows, (N, D) float16, the weight's gradient in float32, (n, D)
    float32. FLOP: 2 N V (D + E) again, and 2 N V D for each of hidden states and weight.
    """
    hidden_N_D, head = inputs.student_hidden_N_D, inputs.student_head
    weight_N = row_weights(upstream_N, gradient_unit_N)
    dtype = gradient_dtype(hidden_N_D, head.weight)
    weight, bias = head_gradients(hidden_N_D, head.weight, head.bias, weight_N, dtype, needs)
    hidden_gradient = torch.empty_like(hidden_N_D, memory_format=torch.contiguous_format) if needs.hidden else None

    outputs, unit_N = RowOutputs.allocate(hidden_N_D), torch.empty_like(gradient_unit_N)
    for rows, gradient_n_V in divergence_chunks(inputs, plan, outputs, unit_N, None, makes_gradient=True):
        if needs.hidden:
            sum_n_D = hidden_N_D.new_empty((rows.stop - rows.start, hidden_N_D.shape[1]), dtype=torch.float32)
            accumulate_hidden_gradient(gradient_n_V, head.weight, sum_n_D)
            hidden_gradient[rows] = weigh_hidden_gradient(sum_n_D, weight_N[rows], hidden_N_D.dtype)
        if weight is not None:
            weight.add(rows, gradient_n_V)
        if bias is not None:
            bias.add(rows, gradient_n_V)
    return (
        hidden_gradient,
        None if weight is None else weight.result(),
        None if bias is None else bias.result(),
    )
