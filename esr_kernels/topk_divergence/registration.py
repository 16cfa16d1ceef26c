"""`topk_divergence` as torch.library ops; see `define_linear_op`."""

from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.registration import define_linear_op
from esr_kernels.topk_divergence.forward_kernel import Events, TopkOutputs
from esr_kernels.topk_divergence.rows import TopkDivergenceRows

NAME = "topk_divergence"


def rows_of(
    hidden: Tensor, head: OutputHead, vocab_size: int,
    teacher_ids, teacher_logprobs, divergence, parameter, events, loss_temperature,
) -> TopkDivergenceRows:  # fmt: skip
    settings = (divergence, parameter), Events(events), loss_temperature
    return TopkDivergenceRows(hidden, head, vocab_size, teacher_ids, teacher_logprobs, *settings)


define_linear_op(
    NAME,
    "Tensor teacher_ids, Tensor teacher_logprobs, str divergence, float parameter, str events, float loss_temperature",
    len(TopkOutputs._fields),
    rows_of,
)
