"""`linear_divergence` as torch.library ops; see `define_linear_op`."""

from torch import Tensor

from esr_kernels.linear_divergence.rows import LinearDivergenceRows
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.registration import define_linear_op
from esr_kernels.token_divergence.row_tensors import RowOutputs

NAME = "linear_divergence"


def rows_of(hidden: Tensor, head: OutputHead, vocab_size: int, *own) -> LinearDivergenceRows:
    teacher_hidden, *teacher_head = own[:5]
    divergence, parameter, loss_temperature, token_ids, stop_ids = own[5:]
    teacher = teacher_hidden, OutputHead(*teacher_head)
    settings = (divergence, parameter), loss_temperature, token_ids, tuple(stop_ids)
    return LinearDivergenceRows(hidden, head, vocab_size, *teacher, *settings)


define_linear_op(
    NAME,
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float teacher_logit_scale, float? teacher_softcap, "
    "str divergence, float parameter, float loss_temperature, Tensor? token_ids, int[] stop_ids",
    len(RowOutputs._fields),
    rows_of,
)
