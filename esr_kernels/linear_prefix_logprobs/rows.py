"""Log-probs of one token per row as the schedules of `output_projection` run them: projection, then the row kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.gather_logprobs.forward_kernel import LogprobOutputs, launch_logprob_rows
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits
from esr_kernels.output_projection.plan import LinearPlan
from esr_kernels.output_projection.projection import Projection, Side
from esr_kernels.row_gradient import RowGradient


class TokenLogprobs(NamedTuple):
    logprob_N: Tensor  # float32
    entropy_N: Tensor  # float32
    is_top1_N: Tensor  # bool


class TokenLogprobRows(NamedTuple):
    hidden_N_D: Tensor
    head: OutputHead
    vocab_size: int
    token_ids_N: Tensor  # -1: nothing is asked of the row; its results are 0
    temperature: float

    def allocate_outputs(self) -> TokenLogprobs:
        logprob_N, entropy_N = (
            self.hidden_N_D.new_empty(self.hidden_N_D.shape[0], dtype=torch.float32) for _ in range(2)
        )
        return TokenLogprobs(logprob_N, entropy_N, torch.empty_like(logprob_N, dtype=torch.bool))

    def projection(self, plan: LinearPlan) -> Projection:
        side = Side.of(self.hidden_N_D, self.head, self.temperature, self.vocab_size)
        return Projection(side, None, plan.chunk_rows, plan.storage)

    def run_rows(self, rows: slice, projection: Projection, outputs: TokenLogprobs, gradient: RowGradient) -> None:
        ids_n_1 = self.token_ids_N[rows, None].contiguous()
        picked_n_1 = torch.empty_like(ids_n_1, dtype=torch.float32)
        logits, _ = projection.project(rows, PickedLogits(ids_n_1, picked_n_1, is_excluded=False))
        launch_logprob_rows(
            logits,
            ids_n_1,
            self.vocab_size,
            LogprobOutputs(outputs.logprob_N[:, None], outputs.entropy_N, outputs.is_top1_N),
            picked_N_K=picked_n_1,
            gradient=gradient,
        )
