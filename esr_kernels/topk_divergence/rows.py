"""`topk_divergence` as the schedules of `output_projection` run it: the student is projected, then the row kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits
from esr_kernels.output_projection.plan import LinearPlan
from esr_kernels.output_projection.projection import Projection, Side
from esr_kernels.row_gradient import RowGradient
from esr_kernels.topk_divergence.forward_kernel import Events, TopkOutputs, launch_topk_divergence


class TopkDivergenceRows(NamedTuple):
    hidden_N_D: Tensor
    head: OutputHead
    vocab_size: int
    teacher_ids_N_K: Tensor
    teacher_logprobs_N_K: Tensor
    divergence: tuple[str, float]  # Divergence.kernel()
    events: Events
    loss_temperature: float

    def allocate_outputs(self) -> TopkOutputs:
        num_rows = self.hidden_N_D.shape[0]
        return TopkOutputs(*(self.hidden_N_D.new_empty(num_rows, dtype=torch.float32) for _ in TopkOutputs._fields))

    def projection(self, plan: LinearPlan) -> Projection:
        side = Side.of(self.hidden_N_D, self.head, self.loss_temperature, self.vocab_size)
        return Projection(side, None, plan.chunk_rows, plan.storage)

    def run_rows(self, rows: slice, projection: Projection, outputs: TopkOutputs, gradient: RowGradient) -> None:
        ids_n_K = self.teacher_ids_N_K[rows].contiguous()
        picked = PickedLogits(ids_n_K, torch.empty_like(ids_n_K, dtype=torch.float32), is_excluded=True)
        logits, _ = projection.project(rows, picked)
        launch_topk_divergence(
            logits,
            picked,
            self.teacher_logprobs_N_K[rows].contiguous(),
            self.divergence,
            self.events,
            self.vocab_size,
            outputs,
            gradient,
        )
