"""Kernels of other projects, where they are installed: TRL's chunked divergence, Liger's Jensen-Shannon losses.

The library never imports them, and a benchmark runs without them: a peer that cannot be imported is a row that says so.
Versions read: TRL 1.16, Liger 0.8.5. Both put beta on the teacher in the mixture and take 0 for forward, 1 for reverse KL.
"""

import torch
from torch import Tensor

from esr_kernels.testing.inputs import LinearInputs
from esr_kernels.testing.oracle import Results

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd_0.5": 0.5}


class NotInstalled(Exception):
    """A peer cannot be imported; the text says why."""


def run_trl(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """TRL's ChunkedDivergenceFunction: per-row values, tiles of 4096 x 32768, projects again in backward."""
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except Exception as error:  # also what its own imports raise
        raise NotInstalled(f"TRL: {error}") from error
    hidden, weight = _leaves(inputs, trains_head)
    divergence_N, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, inputs.teacher_hidden_N_E, inputs.teacher_head.weight, None, BETAS[name], 1.0
    )
    wanted = [hidden, weight] if trains_head else [hidden]
    gradients = torch.autograd.grad(divergence_N, wanted, upstream_N)
    names = ("grad_student_hidden", "grad_student_weight")
    return {"divergence": divergence_N.detach(), **dict(zip(names, gradients, strict=False))}


def run_liger_fused(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """Liger's fused_linear_jsd: a mean over rows, its gradient made in forward."""
    try:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
    except Exception as error:
        raise NotInstalled(f"Liger: {error}") from error
    hidden, weight = _leaves(inputs, trains_head)
    teacher_weight = inputs.teacher_head.weight
    arguments = (hidden, weight, inputs.teacher_hidden_N_E, teacher_weight, None, BETAS[name])
    return _of_a_mean(LigerFusedLinearJSDFunction.apply(*arguments), hidden, weight, upstream_N, trains_head)


def run_liger_chunked(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """Liger's chunked, compiled distillation loss without its cross-entropy part."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except Exception as error:
        raise NotInstalled(f"Liger: {error}") from error
    hidden, weight = _leaves(inputs, trains_head)
    labels_N = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[name])
    value = loss(hidden, weight, inputs.teacher_hidden_N_E, inputs.teacher_head.weight, labels_N)
    value = value[0] if isinstance(value, tuple) else value
    return _of_a_mean(value, hidden, weight, upstream_N, trains_head)


PEERS = {
    "TRL chunked divergence": run_trl,
    "Liger fused_linear_jsd": run_liger_fused,
    "Liger chunked JSD": run_liger_chunked,
}


def _leaves(inputs: LinearInputs, trains_head: bool) -> tuple[Tensor, Tensor]:
    hidden = inputs.student_hidden_N_D.detach().requires_grad_()
    return hidden, inputs.student_head.weight.detach().requires_grad_(trains_head)


def _of_a_mean(value: Tensor, hidden: Tensor, weight: Tensor, upstream_N: Tensor, trains_head: bool) -> Results:
    """Gradient of the hidden states as if each row had its own upstream gradient; the weight's cannot be given so."""
    gradients = torch.autograd.grad(value, [hidden, weight] if trains_head else [hidden])
    return {"grad_student_hidden": gradients[0].float() * (hidden.shape[0] * upstream_N[:, None])}
