"""What an op that starts from hidden states is to the schedules of this folder."""

from typing import Protocol

from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.plan import LinearPlan
from esr_kernels.output_projection.projection import Projection
from esr_kernels.row_gradient import RowGradient


class LinearOp(Protocol):
    """An op with one differentiable value per row of the student's hidden states."""

    hidden_N_D: Tensor
    head: OutputHead
    vocab_size: int  # leading ids that are projected

    def allocate_outputs(self) -> tuple[Tensor, ...]:
        """A named tuple of tensors with one entry per row, the differentiable one first."""

    def projection(self, plan: LinearPlan) -> Projection:
        """The buffers of a chunk."""

    def run_rows(self, rows: slice, projection: Projection, outputs: tuple[Tensor, ...], gradient: RowGradient) -> None:
        """Project these rows and run the row kernel on them; `outputs` are those of these rows."""
