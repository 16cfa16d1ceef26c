"""What one would write with PyTorch alone: eager, and under torch.compile.

    as written          log_softmax of the logits in float32, then the formula
    bfloat16 logits     the head's product in the models' dtype, as transformers computes it, then the above
    float32 logits      the head's product summed and returned in float32; the two products of its gradient in bfloat16
    whole sequences     log-probs of every column, of which those of the response are then taken

They return one value per row and none of the statistics that our ops make in the same pass.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.ceilings import product_in_float32
from esr_kernels import OutputHead
from esr_kernels.testing.inputs import LinearInputs, LogitPair
from esr_kernels.testing.logprob_inputs import PrefixInputs, TopkInputs
from esr_kernels.testing.oracle import Results

DivergenceOfLogits = Callable[[Tensor, Tensor], Tensor]
# (hidden (N, D), weight, tokens (N)) -> log-prob of each token
LogprobsOfRows = Callable[[Tensor, Tensor, Tensor], Tensor]
# (hidden (B, T, D), weight, token ids (B, T)) -> log-probs of the response tokens (B, K)
LogprobsOfRollouts = Callable[[Tensor, Tensor, Tensor], Tensor]
# (hidden (N, D), weight, the teacher's ids (N, K) and their log-probs) -> divergence of each row
DivergenceOfIds = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
    project = Float32Logits.apply if has_float32_logits else linear

    def divergence_N(student_hidden, student_weight, teacher_hidden, teacher_weight):
        return divergence(project(student_hidden, student_weight), project(teacher_hidden, teacher_weight))

    return divergence_N


def compiled(function: Callable, backend: str) -> Callable:
    """Static shapes, one graph; more shapes than the cache holds are an error, not a silent return to eager."""
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


def logprobs_of_logits(logits: Tensor, token_ids: Tensor) -> Tensor:
    """(..., V) logits and the token of each row -> (...)."""
    return logits.float().log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)


def logprobs_of_rows(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    return logprobs_of_logits(linear(hidden_N_D, weight_V_D), tokens_N)


def of_response_rows(logprobs: LogprobsOfRows, start: int, horizon: int) -> LogprobsOfRollouts:
    """The rows that predict the first `horizon` columns from `start` on are gathered, and only they are projected."""

    def logprobs_B_K(hidden_B_T_D, weight_V_D, token_ids_B_T):
        tokens_B_K = token_ids_B_T[:, start : start + horizon]
        hidden_B_K_D = hidden_B_T_D[:, start - 1 : start - 1 + horizon]
        return logprobs(hidden_B_K_D.flatten(0, 1), weight_V_D, tokens_B_K.flatten()).view(tokens_B_K.shape)

    return logprobs_B_K


def of_whole_sequences(start: int, horizon: int) -> LogprobsOfRollouts:
    """Logits of every column, as a model returns them; the log-probs of the response are then cut out."""

    def logprobs_B_K(hidden_B_T_D, weight_V_D, token_ids_B_T):
        logits_B_T_V = linear(hidden_B_T_D, weight_V_D)
        logprobs_B_T = logprobs_of_logits(logits_B_T_V[:, :-1], token_ids_B_T[:, 1:])
        return logprobs_B_T[:, start - 1 : start - 1 + horizon]

    return logprobs_B_K


def forward_kl_with_tail(
    hidden_N_D: Tensor, weight_V_D: Tensor, teacher_ids_N_K: Tensor, teacher_logprobs_N_K: Tensor
) -> Tensor:
    """KL(teacher || student) over the K ids and everything else, over full logits."""
    student_N_K = linear(hidden_N_D, weight_V_D).float().log_softmax(-1).gather(-1, teacher_ids_N_K)
    student_tail_N, teacher_tail_N = log_of_the_rest(student_N_K), log_of_the_rest(teacher_logprobs_N_K)
    of_ids_N = (teacher_logprobs_N_K.exp() * (teacher_logprobs_N_K - student_N_K)).sum(-1)
    return of_ids_N + teacher_tail_N.exp() * (teacher_tail_N - student_tail_N)


def log_of_the_rest(logprobs_N_K: Tensor) -> Tensor:
    """log(1 - sum of the probabilities), at least log 2^-23."""
    total_N = logprobs_N_K.logsumexp(-1).clamp(max=-(2.0**-23))
    return torch.log(-torch.expm1(total_N))


def results_of(name: str, value: Tensor, leaves: dict[str, Tensor], upstream: Tensor | None) -> Results:
    """The value under its name, and the gradient of each leaf."""
    results = {name: value.detach()}
    if leaves:
        gradients = torch.autograd.grad(value, list(leaves.values()), upstream)
        results |= {f"grad_{leaf}": gradient for leaf, gradient in zip(leaves, gradients, strict=True)}
    return results


def run_on_logits(function: DivergenceOfLogits, inputs: LogitPair, upstream_N: Tensor | None) -> Results:
    """Value, and the gradient where an upstream gradient is given."""
    has_gradient = upstream_N is not None
    student = inputs.student_N_V.detach().requires_grad_(has_gradient)
    with torch.set_grad_enabled(has_gradient):
        divergence_N = function(student, inputs.teacher_N_V)
    return results_of("divergence", divergence_N, {"student_logits": student} if has_gradient else {}, upstream_N)


def run_on_hidden(function: Callable, inputs: LinearInputs, upstream_N: Tensor, *, trains_head: bool) -> Results:
    """Value and the gradients of hidden states and, where it is trained, of the weight."""
    hidden, weight, leaves = student_leaves(inputs, trains_head=trains_head)
    divergence_N = function(hidden, weight, inputs.teacher_hidden_N_E, inputs.teacher_head.weight)
    return results_of("divergence", divergence_N, leaves, upstream_N)


def gradient_of_rows(value: Tensor, leaves: dict[str, Tensor], upstream_N: Tensor, num_rows: int) -> Results:
    """Gradient of the student's hidden states as if each row had its own upstream gradient, from a loss of all rows: the mean
    over `num_rows`, or with 1 the sum. That of the weight is made as well, but cannot be given so.
    """
    gradient_N_D, *_ = torch.autograd.grad(value, list(leaves.values()))
    return {"grad_student_hidden": gradient_N_D.float() * (num_rows * upstream_N[:, None])}


def run_on_rollouts(
    function: LogprobsOfRollouts, inputs: PrefixInputs, upstream_B_K: Tensor | None, *, trained: tuple[str, ...]
) -> Results:
    """Log-probs and the gradients of those of hidden states and weight that are trained."""
    hidden, weight, leaves = leaves_of(inputs.hidden_B_T_D, inputs.head, trained)
    with torch.set_grad_enabled(bool(leaves)):
        logprobs_B_K = function(hidden, weight, inputs.token_ids_B_T)
    return results_of("logprobs", logprobs_B_K, leaves, upstream_B_K)


def run_on_topk(
    function: DivergenceOfIds, inputs: TopkInputs, upstream_N: Tensor, *, trained: tuple[str, ...]
) -> Results:
    """Divergence and the gradients of those of hidden states and weight that are trained."""
    hidden, weight, leaves = leaves_of(inputs.student_hidden_N_D, inputs.student_head, trained)
    divergence_N = function(hidden, weight, inputs.teacher_ids_N_K, inputs.teacher_logprobs_N_K)
    return results_of("divergence", divergence_N, leaves, upstream_N)


def leaves_of(hidden: Tensor, head: OutputHead, trained: tuple[str, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states and weight as leaves of a graph of their own, and those that are trained by name."""
    tensors = {"hidden": hidden, "weight": head.weight}
    tensors = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in tensors.items()}
    return *tensors.values(), {name: tensor for name, tensor in tensors.items() if name in trained}


def student_leaves(inputs: LinearInputs, *, trains_head: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`leaves_of` the student, by the names of `linear_divergence`."""
    trained = ("hidden", "weight") if trains_head else ("hidden",)
    hidden, weight, leaves = leaves_of(inputs.student_hidden_N_D, inputs.student_head, trained)
    return hidden, weight, {f"student_{name}": leaf for name, leaf in leaves.items()}
