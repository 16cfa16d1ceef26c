"""`linear_divergence` under `Impl.FUSED`: the arguments of its registered op."""

from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_kernel import choose_kernel
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.linear_divergence.registration import NAME
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.autograd import run_linear_op


def linear_divergence_fused(
    student_hidden_N_D: Tensor,
    student_head: OutputHead,
    teacher_hidden_N_E: Tensor,
    teacher_head: OutputHead,
    divergence: Divergence,
    loss_temperature: float,
    token_ids_N: Tensor | None,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    logits: LogitStorage,
    workspace_bytes: int | None,
) -> DivergenceOutput:
    """See `esr_kernels.linear_divergence`. `stop_ids` are sorted; `vocab_size` is at most either side's."""
    own_arguments = (
        teacher_hidden_N_E,
        teacher_head.weight,
        teacher_head.bias,
        teacher_head.logit_scale,
        teacher_head.softcap,
        *choose_kernel(NAME, divergence),
        loss_temperature,
        token_ids_N,
        stop_ids,
    )
    student = student_hidden_N_D, student_head, vocab_size
    return DivergenceOutput(*run_linear_op(NAME, *student, logits, workspace_bytes, own_arguments, num_sides=2))
