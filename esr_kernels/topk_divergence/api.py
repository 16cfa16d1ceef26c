"""Public entry of `topk_divergence`: what it computes, the checks, and the choice of implementation."""

from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_no_teacher_grad,
    check_positive,
    check_same_device,
    check_tensor,
    check_workspace_bytes,
)
from esr_kernels.divergence import Divergence, ForwardKL, check_divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.impl import Impl, check_impl, check_number_of_ids, require_kernels
from esr_kernels.logit_storage import LogitStorage, check_logit_storage
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.topk_divergence.reference import topk_divergence_reference

OP = "topk_divergence"

# By `Divergence.kernel()`: those whose sum over a part of the events has been used and is defined here.
TRUNCATED_DIVERGENCES = ("ForwardKL", "ReverseKL", "GeneralizedJSD")


def topk_divergence(
    student_hidden_N_D: Tensor,
    student_head: OutputHead | Tensor,
    teacher_ids_N_K: Tensor,
    teacher_logprobs_N_K: Tensor,
    divergence: Divergence = ForwardKL(),  # noqa: B008 (a frozen value)
    *,
    tail_bucket: bool = True,
    renormalize: bool = True,
    loss_temperature: float = 1.0,
    logits: LogitStorage = LogitStorage.AUTO,
    workspace_bytes: int | None = None,
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
    there is no tail and it is the full divergence; K = 1 is legal and not zero. Gradients: for forward KL p - q at the K ids
    and p (1 - Q_tail / P_tail) elsewhere; for reverse KL p (rho - L) with rho = log(p / q) at the K ids and
    log(P_tail / Q_tail) elsewhere, L the value. Source: the form called `loss_add_tail` in TRL, its gradients derived in
    docs/numerics.md.

    `tail_bucket=False` compares the distributions renormalised on the K ids instead:
    p[ids] / p[ids].sum() against q / q.sum(). The gradient is then 0 outside the ids, and nothing holds mass on them.

    `tail_bucket=False, renormalize=False` sums the terms of the K ids alone, with p and q of the full vocabulary, as verl's
    `forward_kl_topk` does before it clamps. This is no divergence: it can be negative, for which it is not clamped here, and
    reverse KL falls when the student moves its mass off the ids. It is offered to reproduce others' results, for
    `ForwardKL` (gradient p Q_ids - 1_ids q), `ReverseKL` (1_ids p (log(p / q) + 1) - p sum over ids of p (log(p / q) + 1)) and
    `GeneralizedJSD`.

    The teacher's tail is 1 - sum(exp(logprobs)), but at least 2**-23, float32's step at 1: log-probs are served in float32 or
    less, and the sum of K rounded ones says nothing reliable about a smaller tail. The teacher's events are then renormalised, so
    that log-probs that sum to slightly more than 1 still give a proper divergence.

    FUSED (esr_kernels/topk_divergence/forward_kernel.py) needs no teacher of size (N, V): d(logits) are softmax mass times one
    number per row, and K entries. The ids' logits are float32 in every storage. FLOP and memory are those of
    `linear_prefix_logprobs` (1, 2, 3 or 4 products of 2 N V D; s n V of logits and g N V of kept d(logits)) and 4 N K.

    Args:
        student_hidden_N_D: (N, D), any float dtype. N = 0 is legal.
        student_head: `OutputHead` or a bare weight (V, D).
        teacher_ids_N_K: (N, K) int32 or int64, K >= 1, in any order. -1 is an empty slot: no event on either side, its
            log-prob is not looked at. An id that an earlier slot of its row holds is an empty slot too. Any other id
            outside [0, V) makes its row NaN. FUSED takes at most 1024 ids a row.
        teacher_logprobs_N_K: (N, K), any float dtype; natural logarithms, of the full vocabulary, **already at
            `loss_temperature`** (the op cannot temper a partial distribution). -inf is legal. Must not require grad.
        divergence: a value of `esr_kernels.divergence`.
        tail_bucket: whether all ids not given form one more event.
        renormalize: without tail bucket, whether both sides are renormalised on the ids. With it, True.
        loss_temperature: > 0; divides the student's logits.
        logits, workspace_bytes: as `linear_prefix_logprobs`.
        impl: `Impl.FUSED` or `Impl.REFERENCE`.

    Returns:
        `DivergenceOutput`: entropies are those of the compared events (without renormalisation the sums over the ids),
        log-probabilities are NaN, top-1 agreement is whether the student's most probable id of the full vocabulary is the
        most probable given id. `divergence_N` is differentiable with respect to the student's hidden states, weight and bias.

    Edge cases: as in `token_divergence` (infinite rows have gradient 0, NaN stays in its row). Divergence, gradient,
    entropies and agreement are 0 for a row with only empty slots, whose hidden state plays no part, for one in which the
    student's logits are all -inf, and, renormalised without tail bucket, for one in which either side has no probability on the
    given ids. Renormalised, a row with one id left (the other slots empty) is 0 as well. While K < V the teacher's tail is never
    0, so forward KL is +inf against a student to which all other ids are impossible.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or numbers; `tail_bucket=False` with K = 1, which renormalised is identically 0;
            `renormalize=False` with the tail bucket or with another divergence than those named;
            `teacher_logprobs_N_K` requires grad.
        TypeError: `impl` is FUSED and an input is float64.
        ValueError: `impl` is FUSED and K > 1024, or `workspace_bytes` does not hold the logits of one row.
        NotImplementedError: `impl` is FUSED and Triton or a CUDA device is missing.
        RuntimeError: a second derivative is asked of FUSED.
    """
    student_head = as_output_head(OP, "student_head", student_head)
    sizes: dict[str, int] = {}
    check_tensor(OP, "student_hidden_N_D", student_hidden_N_D, "N D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "student_head.weight", student_head.weight, "V D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "teacher_ids_N_K", teacher_ids_N_K, "N K", sizes, INTEGER_DTYPES)
    check_tensor(OP, "teacher_logprobs_N_K", teacher_logprobs_N_K, "N K", sizes, FLOAT_DTYPES)
    floats = {
        "student_hidden_N_D": student_hidden_N_D,
        "student_head.weight": student_head.weight,
        "student_head.bias": student_head.bias,
        "teacher_logprobs_N_K": teacher_logprobs_N_K,
    }
    check_same_device(OP, **floats, teacher_ids_N_K=teacher_ids_N_K)
    check_no_teacher_grad(OP, teacher_logprobs_N_K=teacher_logprobs_N_K)
    check_divergence(OP, divergence)
    check_events(OP, sizes["K"], divergence, tail_bucket, renormalize)
    loss_temperature = check_positive(OP, "loss_temperature", loss_temperature)
    logits = check_logit_storage(OP, logits)
    check_workspace_bytes(OP, workspace_bytes)
    arguments = (
        student_hidden_N_D,
        student_head,
        teacher_ids_N_K,
        teacher_logprobs_N_K,
        divergence,
        tail_bucket,
        renormalize,
        loss_temperature,
    )
    if check_impl(OP, impl) is Impl.REFERENCE:
        return topk_divergence_reference(*arguments)
    require_kernels(OP, **floats)
    check_number_of_ids(OP, "teacher_ids_N_K", sizes["K"])
    from esr_kernels.topk_divergence.autograd import topk_divergence_fused  # imports Triton

    return topk_divergence_fused(*arguments, logits, workspace_bytes)


def check_events(op: str, num_ids: int, divergence: Divergence, tail_bucket: bool, renormalize: bool) -> None:
    """Check what is compared: K, `tail_bucket` and `renormalize` together."""
    for name, value in (("tail_bucket", tail_bucket), ("renormalize", renormalize)):
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    if num_ids < 1:
        raise ValueError(f"{op}: teacher_ids_N_K must have K >= 1 ids per row, got 0")
    if tail_bucket and not renormalize:
        raise ValueError(
            f"{op}: renormalize must be True with tail_bucket=True, got False: the ids and the tail are all there is; "
            "pass tail_bucket=False for the ids' terms alone"
        )
    if num_ids == 1 and not tail_bucket and renormalize:
        raise ValueError(
            f"{op}: tail_bucket must be True for K = 1, got False: one renormalised id has probability 1 on both "
            "sides, so the divergence would be 0 everywhere"
        )
    if not renormalize and divergence.kernel()[0] not in TRUNCATED_DIVERGENCES:
        raise ValueError(
            f"{op}: divergence must be one of {', '.join(TRUNCATED_DIVERGENCES)} with renormalize=False, got {divergence!r}"
        )
