"""Public entry of `topk_divergence`: what it computes, the checks, and the choice of implementation."""

from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_no_teacher_grad,
    check_positive,
    check_same_device,
    check_tensor,
)
from esr_kernels.divergence import Divergence, ForwardKL, check_divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.impl import Impl, require_reference
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.topk_divergence.reference import topk_divergence_reference

OP = "topk_divergence"


def topk_divergence(
    student_hidden_N_D: Tensor,
    student_head: OutputHead | Tensor,
    teacher_ids_N_K: Tensor,
    teacher_logprobs_N_K: Tensor,
    divergence: Divergence = ForwardKL(),  # noqa: B008 (a frozen value)
    *,
    tail_bucket: bool = True,
    loss_temperature: float = 1.0,
    impl: Impl = Impl.FUSED,
) -> DivergenceOutput:
    """Divergence per row against a teacher known only at K token ids, as a served teacher is.

    Equivalent, for one row without empty slots and K < V::

        p = (student_head.logits(hidden) / loss_temperature).softmax(-1)
        p = cat([p[ids], 1 - p[ids].sum()])                 # K events and everything else
        q = cat([logprobs.exp(), 1 - logprobs.exp().sum()])
        divergence = divergence.terms(p.log(), q.log()).sum()

    (computed without the cancellation in 1 - sum). Merging all other ids into one event coarsens the divergence: the
    result is a lower bound of the full one, never negative, and it sees mass that leaks out of the K ids. With K = V
    there is no tail and it is the full divergence. Gradients: for forward KL p - q at the K ids and
    p (1 - Q_tail / P_tail) elsewhere; for reverse KL p (rho - L) with rho = log(p / q) at the K ids and
    log(P_tail / Q_tail) elsewhere, L the value.

    `tail_bucket=False` compares the distributions renormalised on the K ids instead:
    p[ids] / p[ids].sum() against q / q.sum(). The gradient is then 0 outside the ids, and nothing holds mass on them.

    The teacher's tail is 1 - sum(exp(logprobs)), but at least 2**-23: log-probs are served in float32 or less, where a
    smaller tail cannot be told from none. The teacher's events are then renormalised, so that log-probs that sum to
    slightly more than 1 still give a proper divergence.

    Args:
        student_hidden_N_D: (N, D), any float dtype. N = 0 is legal.
        student_head: `OutputHead` or a bare weight (V, D).
        teacher_ids_N_K: (N, K) int32 or int64, K >= 1, in any order. Ids of one row must be distinct: values are not
            inspected, and a repeated id counts twice. -1 is an empty slot: no event on either side, its log-prob is
            not looked at. Any other id outside [0, V) makes its row NaN.
        teacher_logprobs_N_K: (N, K), any float dtype; natural logarithms, of the full vocabulary, **already at
            `loss_temperature`** (the op cannot temper a partial distribution). -inf is legal. Must not require grad.
        divergence: a value of `esr_kernels.divergence`.
        tail_bucket: whether all ids not given form one more event.
        loss_temperature: > 0; divides the student's logits.
        impl: `Impl.FUSED` or `Impl.REFERENCE`.

    Returns:
        `DivergenceOutput`: entropies are those of the compared events, log-probabilities are NaN, top-1 agreement is
        whether the student's most probable id of the full vocabulary is the most probable given id. `divergence_N` is
        differentiable with respect to the student's hidden states, weight and bias.

    Edge cases: as in `token_divergence` (infinite rows have gradient 0, NaN stays in its row). Divergence, gradient,
    entropies and agreement are 0 for a row with only empty slots, for one in which the student's logits are all -inf,
    and without tail bucket for one in which either side has no probability on the given ids.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or numbers; `tail_bucket=False` with K = 1, which is identically 0;
            `teacher_logprobs_N_K` requires grad.
        NotImplementedError: `impl` is FUSED, which this version has not built.
    """
    student_head = as_output_head(OP, "student_head", student_head)
    sizes: dict[str, int] = {}
    check_tensor(OP, "student_hidden_N_D", student_hidden_N_D, "N D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "student_head.weight", student_head.weight, "V D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "teacher_ids_N_K", teacher_ids_N_K, "N K", sizes, INTEGER_DTYPES)
    check_tensor(OP, "teacher_logprobs_N_K", teacher_logprobs_N_K, "N K", sizes, FLOAT_DTYPES)
    tensors = {
        "student_hidden_N_D": student_hidden_N_D,
        "student_head.weight": student_head.weight,
        "student_head.bias": student_head.bias,
        "teacher_ids_N_K": teacher_ids_N_K,
        "teacher_logprobs_N_K": teacher_logprobs_N_K,
    }
    check_same_device(OP, **tensors)
    check_no_teacher_grad(OP, teacher_logprobs_N_K=teacher_logprobs_N_K)
    check_divergence(OP, divergence)
    check_topk(OP, sizes["K"], tail_bucket)
    loss_temperature = check_positive(OP, "loss_temperature", loss_temperature)
    require_reference(OP, impl)
    return topk_divergence_reference(
        student_hidden_N_D,
        student_head,
        teacher_ids_N_K,
        teacher_logprobs_N_K,
        divergence,
        tail_bucket,
        loss_temperature,
    )


def check_topk(op: str, num_ids: int, tail_bucket: bool) -> None:
    """Check K and `tail_bucket` together."""
    if not isinstance(tail_bucket, bool):
        raise TypeError(f"{op}: tail_bucket must be a bool, got {type(tail_bucket).__name__}")
    if num_ids < 1:
        raise ValueError(f"{op}: teacher_ids_N_K must have K >= 1 ids per row, got 0")
    if num_ids == 1 and not tail_bucket:
        raise ValueError(
            f"{op}: tail_bucket must be True for K = 1, got False: one renormalised id has probability 1 on both "
            "sides, so the divergence would be 0 everywhere"
        )
