"""`linear_divergence` as the schedules of `output_projection` run it: both sides are projected, then the row kernel."""

from typing import NamedTuple

from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.plan import LinearPlan
from esr_kernels.output_projection.projection import Projection, Side
from esr_kernels.row_gradient import RowGradient
from esr_kernels.token_divergence.forward_kernel import launch_divergence_rows
from esr_kernels.token_divergence.row_tensors import RowOutputs, stop_ids_on_device


class LinearDivergenceRows(NamedTuple):
    hidden_N_D: Tensor
    head: OutputHead
    vocab_size: int
    teacher_hidden_N_E: Tensor
    teacher_head: OutputHead
    divergence: tuple[str, float]  # Divergence.kernel()
    loss_temperature: float
    token_ids_N: Tensor | None
    stop_ids: tuple[int, ...]

    def allocate_outputs(self) -> RowOutputs:
        return RowOutputs.allocate(self.hidden_N_D)

    def projection(self, plan: LinearPlan) -> Projection:
        student = Side.of(self.hidden_N_D, self.head, self.loss_temperature, self.vocab_size)
        teacher = Side.of(self.teacher_hidden_N_E, self.teacher_head, self.loss_temperature, self.vocab_size)
        return Projection(student, teacher, plan.chunk_rows, plan.storage)

    def run_rows(self, rows: slice, projection: Projection, outputs: RowOutputs, gradient: RowGradient) -> None:
        launch_divergence_rows(
            *projection.project(rows),
            self.divergence,
            None if self.token_ids_N is None else self.token_ids_N[rows],
            stop_ids_on_device(self.stop_ids, self.hidden_N_D.device),
            self.vocab_size,
            outputs,
            gradient=gradient,
        )
