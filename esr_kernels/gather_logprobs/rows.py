"""Log-probs of K ids per row, chunk by chunk, and their gradient from kept or from recomputed logits.

With K upstream gradients per row there is no d(logits) for an upstream gradient of 1 that could be kept, as the other linear
ops do. Where all rows fit in one chunk their logits are kept instead, and stay as they are for a second backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.gather_logprobs.forward_kernel import LogprobOutputs, launch_logprob_rows
from esr_kernels.logit_rows import LogitRows
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.gradients import Needs, backward_of_kept, gradients_of_chunks
from esr_kernels.output_projection.matrix_product import gradient_dtype
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits
from esr_kernels.output_projection.plan import LinearPlan, Schedule
from esr_kernels.output_projection.projection import Projection, Side
from esr_kernels.row_gradient import RowGradient


class KeptLogits(NamedTuple):
    """What forward leaves for backward under KEEP, of all rows; under the other schedules empty tensors."""

    logits_N_V: Tensor
    tile_max_N_W: Tensor  # empty where the logits are float32
    picked_N_K: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> "KeptLogits":
        return cls(*(like.new_empty(0) for _ in cls._fields))


class GatherRows(NamedTuple):
    hidden_N_D: Tensor
    head: OutputHead
    token_ids_N_K: Tensor  # contiguous
    temperature: float

    def side(self) -> Side:
        return Side.of(self.hidden_N_D, self.head, self.temperature, self.head.vocab_size)

    def projected_chunks(self, projection: Projection, chunk_rows: int) -> Iterator[tuple[slice, LogitRows, Tensor]]:
        """Rows, their stored logits, valid until the next chunk, and the exact logits of their ids."""
        for start in range(0, self.hidden_N_D.shape[0], chunk_rows):
            rows = slice(start, min(start + chunk_rows, self.hidden_N_D.shape[0]))
            ids_n_K = self.token_ids_N_K[rows]
            picked_n_K = torch.empty_like(ids_n_K, dtype=torch.float32)
            logits, _ = projection.project(rows, PickedLogits(ids_n_K, picked_n_K, is_excluded=False))
            yield rows, logits, picked_n_K

    def run_rows(self, rows: slice, logits: LogitRows, picked_n_K: Tensor, **gradient) -> Tensor:
        """The row kernel on the logits of these rows; returns their log-probs."""
        logprobs_n_K = torch.empty_like(picked_n_K)
        ids_n_K, outputs = self.token_ids_N_K[rows], LogprobOutputs(logprobs_n_K)
        launch_logprob_rows(logits, ids_n_K, self.head.vocab_size, outputs, picked_N_K=picked_n_K, **gradient)
        return logprobs_n_K


def gather_forward(inputs: GatherRows, plan: LinearPlan) -> tuple[Tensor, KeptLogits]:
    """Log-probs (N, K); under KEEP, where all rows are one chunk, also their logits.

    Memory beyond the results: the logits of `plan.chunk_rows` rows. FLOP: 2 N V D.
    """
    logprobs_N_K = torch.empty_like(inputs.token_ids_N_K, dtype=torch.float32)
    kept = KeptLogits.nothing(logprobs_N_K)
    projection = Projection(inputs.side(), None, plan.chunk_rows, plan.storage)
    for rows, logits, picked_n_K in inputs.projected_chunks(projection, plan.chunk_rows):
        logprobs_N_K[rows] = inputs.run_rows(rows, logits, picked_n_K)
        if plan.schedule is Schedule.KEEP:
            tile_max_N_W = kept.tile_max_N_W if logits.tile_max is None else logits.tile_max
            kept = KeptLogits(logits.logits, tile_max_N_W, picked_n_K)
    return logprobs_N_K, kept


def gather_backward(
    upstream_N_K: Tensor, kept: KeptLogits, inputs: GatherRows, plan: LinearPlan, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias.

    Memory beyond the results: d(logits) of all rows under KEEP, else the logits of one chunk, in whose place d(logits) are made,
    and that of `gradients_of_chunks`. FLOP: 2 N V D for each of hidden states and weight, and one more to recompute.
    """
    hidden_N_D, head, side = inputs.hidden_N_D, inputs.head, inputs.side()
    dtype = gradient_dtype(hidden_N_D, head.weight)
    ids_N_K = inputs.token_ids_N_K
    is_id_N_K = (ids_N_K >= 0) & (ids_N_K < head.vocab_size)
    upstream_N_K = upstream_N_K.float().masked_fill(~is_id_N_K, 0.0).contiguous()
    unit_N = gradient_unit(upstream_N_K, side.slope, dtype)

    def gradient_of(rows: slice, logits: LogitRows, picked_n_K: Tensor, out_n_V: Tensor) -> Tensor:
        gradient = RowGradient(out_n_V[:, : head.vocab_size], unit_N[rows], dtype)
        inputs.run_rows(rows, logits, picked_n_K, upstream_N_K=upstream_N_K[rows], gradient=gradient)
        return gradient.logits_n_V

    if plan.schedule is Schedule.KEEP:
        is_float32 = kept.tile_max_N_W.numel() == 0
        bias, tile_max = (side.bias_V, None) if is_float32 else (None, kept.tile_max_N_W)
        logits = LogitRows(kept.logits_N_V, side.slope, side.softcap, bias, tile_max)
        out_N_V = torch.empty_like(kept.logits_N_V, dtype=dtype)
        gradient_N_V = gradient_of(slice(None), logits, kept.picked_N_K, out_N_V)
        student = hidden_N_D, head.weight, head.bias, head.vocab_size
        return backward_of_kept(torch.ones_like(unit_N), gradient_N_V, unit_N, *student, needs)

    projection = Projection(side, None, plan.chunk_rows, plan.storage)
    buffer = projection.gradient_buffer(dtype)
    chunks = (
        (rows, gradient_of(rows, logits, picked_n_K, buffer[: rows.stop - rows.start]))
        for rows, logits, picked_n_K in inputs.projected_chunks(projection, plan.chunk_rows)
    )
    return gradients_of_chunks(chunks, unit_N, hidden_N_D, head, needs)


def gradient_unit(upstream_N_K: Tensor, slope: float, dtype: torch.dtype) -> Tensor:
    """Unit of a row of d(logits), whose entries are at most `slope` times the sum of the upstream gradients' magnitudes.

    For float16 the power of two that brings this bound to at most 2^15, else 1. 0 for a row without upstream gradient, whose
    hidden state may hold anything.
    """
    bound_N = slope * upstream_N_K.abs().sum(1)
    unit_N = torch.ones_like(bound_N)
    if dtype == torch.float16:
        unit_N = torch.exp2((torch.ceil(torch.log2(bound_N)) - 15).clamp_min(-126))
    return unit_N.masked_fill((upstream_N_K == 0).all(1), 0.0)
