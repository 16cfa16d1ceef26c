"""What one would write with PyTorch alone: eager, and under torch.compile.

    as written          log_softmax of the logits in float32, then the formula
    bfloat16 logits     the head's product in the models' dtype, as transformers computes it, then the above
    float32 logits      the head's product summed and returned in float32; the two products of its gradient in bfloat16

They return one divergence per row and none of the statistics that our ops make in the same pass.
"""

import math
from collections.abc import Callable

import torch
from ceilings import product_in_float32
from torch import Tensor

from esr_kernels.testing.inputs import LinearInputs, LogitPair
from esr_kernels.testing.oracle import Results

DivergenceOfLogits = Callable[[Tensor, Tensor], Tensor]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    p, q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    p, q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    p, q = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (q.exp() * (q - m) + p.exp() * (p - m)).sum(-1)


# By the names of esr_kernels.testing.cases.DIVERGENCES.
AS_WRITTEN: dict[str, DivergenceOfLogits] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0.5": jensen_shannon,
}


class Float32Logits(torch.autograd.Function):
    """hidden @ weight.T in float32; its gradient is rounded to the operands' dtype for the two products."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return product_in_float32(hidden, weight.T)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(hidden.dtype)
        weight_gradient = gradient.T @ hidden if ctx.needs_input_grad[1] else None
        return gradient @ weight, weight_gradient


def from_hidden(name: str, *, has_float32_logits: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(student hidden, student weight, teacher hidden, teacher weight) -> divergence per row, over full logits."""
    divergence = AS_WRITTEN[name]
    project = Float32Logits.apply if has_float32_logits else torch.nn.functional.linear

    def divergence_N(student_hidden, student_weight, teacher_hidden, teacher_weight):
        return divergence(project(student_hidden, student_weight), project(teacher_hidden, teacher_weight))

    return divergence_N


def compiled(function: Callable, backend: str) -> Callable:
    """Static shapes, one graph; more shapes than the cache holds are an error, not a silent return to eager."""
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


def run_on_logits(function: DivergenceOfLogits, inputs: LogitPair, upstream_N: Tensor | None) -> Results:
    """Value, and the gradient where an upstream gradient is given."""
    has_gradient = upstream_N is not None
    student = inputs.student_N_V.detach().requires_grad_(has_gradient)
    with torch.set_grad_enabled(has_gradient):
        divergence_N = function(student, inputs.teacher_N_V)
    results = {"divergence": divergence_N.detach()}
    if has_gradient:
        (results["grad_student_logits"],) = torch.autograd.grad(divergence_N, student, upstream_N)
    return results


def run_on_hidden(function: Callable, inputs: LinearInputs, upstream_N: Tensor, *, trains_head: bool) -> Results:
    """Value and the gradients of hidden states and, where it is trained, of the weight."""
    leaves = {"grad_student_hidden": inputs.student_hidden_N_D.detach().requires_grad_()}
    weight = inputs.student_head.weight.detach()
    if trains_head:
        leaves["grad_student_weight"] = weight.requires_grad_()
    hidden = leaves["grad_student_hidden"]
    divergence_N = function(hidden, weight, inputs.teacher_hidden_N_E, inputs.teacher_head.weight)
    gradients = torch.autograd.grad(divergence_N, list(leaves.values()), upstream_N)
    return {"divergence": divergence_N.detach(), **dict(zip(leaves, gradients, strict=True))}
