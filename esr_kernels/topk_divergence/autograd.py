"""`topk_divergence` under `Impl.FUSED`: the arguments of its registered op."""

import math

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_kernel import choose_kernel
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.autograd import run_linear_op
from esr_kernels.topk_divergence.forward_kernel import Events, TopkOutputs
from esr_kernels.topk_divergence.registration import NAME


def topk_divergence_fused(
    student_hidden_N_D: Tensor,
    student_head: OutputHead,
    teacher_ids_N_K: Tensor,
    teacher_logprobs_N_K: Tensor,
    divergence: Divergence,
    tail_bucket: bool,
    renormalize: bool,
    loss_temperature: float,
    logits: LogitStorage,
    workspace_bytes: int | None,
) -> DivergenceOutput:
    """See `esr_kernels.topk_divergence`."""
    events = Events.TAIL if tail_bucket else Events.RENORMALIZED if renormalize else Events.TRUNCATED
    settings = *choose_kernel(NAME, divergence), events.value, loss_temperature
    student = student_hidden_N_D, student_head, student_head.vocab_size
    own_arguments = teacher_ids_N_K, teacher_logprobs_N_K, *settings
    outputs = TopkOutputs(*run_linear_op(NAME, *student, logits, workspace_bytes, own_arguments, num_sides=1))
    no_logprob_N = torch.full_like(outputs.student_entropy_N, math.nan)
    return DivergenceOutput(**outputs._asdict(), student_logprob_N=no_logprob_N, teacher_logprob_N=no_logprob_N.clone())
