"""Reference of `linear_divergence`: project both sides, then `token_divergence`. The specification."""

from dataclasses import replace

from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.output_head import OutputHead
from esr_kernels.token_divergence.reference import token_divergence_reference


def linear_divergence_reference(
    student_hidden_N_D: Tensor,
    student_head: OutputHead,
    teacher_hidden_N_E: Tensor,
    teacher_head: OutputHead,
    divergence: Divergence,
    loss_temperature: float,
    token_ids_N: Tensor | None,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> DivergenceOutput:
    """See `esr_kernels.linear_divergence`. `stop_ids` are sorted; `vocab_size` is at most either side's."""
    student_logits_N_V = _first_ids(student_head, vocab_size).logits(student_hidden_N_D)
    teacher_logits_N_V = _first_ids(teacher_head, vocab_size).logits(teacher_hidden_N_E)
    return token_divergence_reference(
        student_logits_N_V, teacher_logits_N_V, divergence, loss_temperature, token_ids_N, stop_ids, vocab_size
    )


def _first_ids(head: OutputHead, vocab_size: int) -> OutputHead:
    """The head that makes only the first `vocab_size` logits; the same as cutting its logits, for less work."""
    return replace(head, weight=head.weight[:vocab_size], bias=None if head.bias is None else head.bias[:vocab_size])
