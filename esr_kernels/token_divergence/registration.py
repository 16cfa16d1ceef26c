"""`token_divergence` as two torch.library ops: opaque to torch.compile, one launcher for CUDA and for the interpreter."""

import torch
from torch import Tensor

from esr_kernels.logit_rows import LogitRows
from esr_kernels.token_divergence.backward_kernel import launch_divergence_gradient
from esr_kernels.token_divergence.forward_kernel import launch_divergence_rows
from esr_kernels.token_divergence.row_tensors import RowOutputs, RowState, stop_ids_on_device

FORWARD = "esr_kernels::token_divergence_forward"
BACKWARD = "esr_kernels::token_divergence_backward"

# Results: the six fields of DivergenceOutput, then the two of RowState.
torch.library.define(
    FORWARD,
    "(Tensor student_logits, Tensor teacher_logits, str divergence, float parameter, float loss_temperature, "
    "Tensor? token_ids, int[] stop_ids, SymInt vocab_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    BACKWARD,
    "(Tensor upstream, Tensor student_logits, Tensor teacher_logits, Tensor row_sums, Tensor student_top1, "
    "str divergence, float parameter, float loss_temperature, int[] stop_ids, SymInt vocab_size) -> Tensor",
)


@torch.library.impl(FORWARD, ("CPU", "CUDA"))
def _forward(
    student_logits, teacher_logits, divergence, parameter, loss_temperature, token_ids, stop_ids, vocab_size
) -> tuple[Tensor, ...]:
    outputs, state = RowOutputs.allocate(student_logits), RowState.allocate(student_logits)
    launch_divergence_rows(
        LogitRows(student_logits, 1 / loss_temperature),
        LogitRows(teacher_logits, 1 / loss_temperature),
        (divergence, parameter),
        token_ids,
        stop_ids_on_device(stop_ids, student_logits.device),
        vocab_size,
        outputs,
        state=state,
    )
    return *outputs, *state


@torch.library.register_fake(FORWARD)
def _fake_forward(
    student_logits, teacher_logits, divergence, parameter, loss_temperature, token_ids, stop_ids, vocab_size
) -> tuple[Tensor, ...]:
    return *RowOutputs.allocate(student_logits), *RowState.allocate(student_logits)


@torch.library.impl(BACKWARD, ("CPU", "CUDA"))
def _backward(
    upstream, student_logits, teacher_logits, row_sums, student_top1, divergence, parameter, loss_temperature, stop_ids,
    vocab_size,
) -> Tensor:  # fmt: skip
    return launch_divergence_gradient(
        upstream,
        LogitRows(student_logits, 1 / loss_temperature),
        LogitRows(teacher_logits, 1 / loss_temperature),
        (divergence, parameter),
        RowState(row_sums, student_top1),
        stop_ids_on_device(stop_ids, student_logits.device),
        vocab_size,
    )


@torch.library.register_fake(BACKWARD)
def _fake_backward(
    upstream, student_logits, teacher_logits, row_sums, student_top1, divergence, parameter, loss_temperature, stop_ids,
    vocab_size,
) -> Tensor:  # fmt: skip
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)
