"""Public entry of `token_divergence`: what it computes, the checks, and the choice of implementation."""

from collections.abc import Iterable

from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_no_teacher_grad,
    check_positive,
    check_same_device,
    check_tensor,
    check_token_set,
)
from esr_kernels.divergence import Divergence, ReverseKL, check_divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.impl import Impl, check_impl, require_kernels
from esr_kernels.token_divergence.reference import token_divergence_reference

OP = "token_divergence"


def token_divergence(
    student_logits_N_V: Tensor,
    teacher_logits_N_V: Tensor,
    divergence: Divergence = ReverseKL(),  # noqa: B008 (a frozen value)
    *,
    loss_temperature: float = 1.0,
    token_ids_N: Tensor | None = None,
    stop_ids: Iterable[int] = (),
    vocab_size: int | None = None,
    impl: Impl = Impl.FUSED,
) -> DivergenceOutput:
    """Divergence between student and teacher, one value per row, from their logits.

    For the default divergence, reverse KL (arXiv 2605.27028, Eq. 1-2)::

        p = (student_logits[:, :vocab_size].float() / loss_temperature).log_softmax(-1)
        q = (teacher_logits[:, :vocab_size].float() / loss_temperature).log_softmax(-1)
        divergence_N = (p.exp() * (p - q)).sum(-1)

    and in general `divergence.terms(p, q).sum(-1)`; see each class of `esr_kernels.divergence` for formula, gradient
    and source. There is no reduction over rows and no factor `loss_temperature**2`: the gradient of a row with respect
    to its logits carries 1 / loss_temperature. Every upstream gradient per row is exact.

    Stop events: with two or more `stop_ids`, p and q first become distributions in which these ids are one event,
    whose log-probability is the logsumexp of theirs. A student that ends with one id and a teacher that ends with
    another then agree about stopping. The event's gradient reaches its ids in proportion to their p. Merging never
    increases the divergence. All outputs are those of the merged distributions; a token that is a stop id has the
    event's log-probability, and in top-1 ties the event counts as its lowest id. No id or one id changes nothing.

    Computation is in float32, in float64 where an input is float64 (REFERENCE only); outputs have that dtype.

    FUSED (esr_kernels/token_divergence/forward_kernel.py, backward_kernel.py) reads both rows once in forward for the two
    KLs, twice for the others, and once more in backward, and writes the gradient: at 16 bits 4 and 6 bytes per logit. It
    saves the logits themselves and 6 numbers per row, and allocates nothing of size (N, V) but the gradient.

    Args:
        student_logits_N_V: (N, V), any float dtype and strides. N = 0 is legal.
        teacher_logits_N_V: (N, V), any float dtype, same device; must not require grad.
        divergence: a value of `esr_kernels.divergence`.
        loss_temperature: > 0; divides the logits of both sides.
        token_ids_N: (N,) int32 or int64, the tokens whose log-probabilities are wanted, or None. Ids outside
            [0, vocab_size), such as -100, give NaN log-probabilities in their row and change nothing else.
        stop_ids: Python ints in [0, vocab_size), every id that ends a response for either model.
        vocab_size: both sides' logits are cut to their first `vocab_size` columns before the softmax. Needed when the
            two vocabularies differ; never padded.
        impl: `Impl.FUSED` or `Impl.REFERENCE`.

    Returns:
        `DivergenceOutput`; only `divergence_N` is differentiable, with respect to the student's logits.

    Edge cases, in value and gradient:
        - Probability 0 (a logit of -inf) contributes its limit: 0 log 0 = 0.
        - Where the divergence is infinite (reverse KL with p > 0 and q = 0; forward KL with q > 0 and p = 0), the
          row's value is +inf and its gradient exactly 0. Skew, Jensen-Shannon and total variation stay finite.
        - A row in which one side's logits are all -inf is fully masked: divergence, gradient, entropies and top-1
          agreement are 0, log-probabilities -inf. N rows of it are legal.
        - A NaN or +inf logit makes its own row NaN (divergence, agreement, that side's entropy and log-probability;
          the gradient is NaN or 0) and touches no other row.
        - float32 is float32: under REFERENCE a gradient entry carries an absolute error near 1e-7, so at p = 1 - 1e-7
          the largest entry of a row has no correct digit unless the inputs are float64. FUSED computes that entry as minus
          the sum of the others and keeps its digits.
        - FUSED has no second derivative: a backward with create_graph=True raises. Nor does it run under torch.func.
        - Under FUSED a row whose upstream gradient is 0 gets an exactly zero gradient, whatever it holds.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or numbers; unequal vocabularies without `vocab_size`; a teacher that
            requires grad.
        TypeError: `impl` is FUSED and an input is float64.
        NotImplementedError: `impl` is FUSED and Triton or a CUDA device is missing.
    """
    sizes: dict[str, int] = {}
    check_tensor(OP, "student_logits_N_V", student_logits_N_V, "N V", sizes, FLOAT_DTYPES)
    teacher_sizes = {"N": sizes["N"]}
    check_tensor(OP, "teacher_logits_N_V", teacher_logits_N_V, "N V", teacher_sizes, FLOAT_DTYPES)
    if token_ids_N is not None:
        check_tensor(OP, "token_ids_N", token_ids_N, "N", sizes, INTEGER_DTYPES)
    check_same_device(
        OP, student_logits_N_V=student_logits_N_V, teacher_logits_N_V=teacher_logits_N_V, token_ids_N=token_ids_N
    )
    check_no_teacher_grad(OP, teacher_logits_N_V=teacher_logits_N_V)
    check_divergence(OP, divergence)
    loss_temperature = check_positive(OP, "loss_temperature", loss_temperature)
    vocab_size = shared_vocab_size(OP, sizes["V"], teacher_sizes["V"], vocab_size)
    stop_ids = check_token_set(OP, "stop_ids", stop_ids, vocab_size)
    arguments = (
        student_logits_N_V,
        teacher_logits_N_V,
        divergence,
        loss_temperature,
        token_ids_N,
        stop_ids,
        vocab_size,
    )
    if check_impl(OP, impl) is Impl.REFERENCE:
        return token_divergence_reference(*arguments)
    require_kernels(OP, student_logits_N_V=student_logits_N_V, teacher_logits_N_V=teacher_logits_N_V)
    from esr_kernels.token_divergence.autograd import token_divergence_fused  # imports Triton

    return token_divergence_fused(*arguments)


def shared_vocab_size(op: str, student_size: int, teacher_size: int, vocab_size: int | None) -> int:
    """Number of leading ids on which the two sides are compared.

    Raises:
        TypeError: `vocab_size` is not an int.
        ValueError: the sizes differ and `vocab_size` is None; or it is < 1 or larger than either side.
    """
    if vocab_size is None:
        if student_size != teacher_size:
            raise ValueError(
                f"{op}: student and teacher must have equal vocabularies, got {student_size} and {teacher_size}; pass "
                f"vocab_size= the number of leading ids they share (at most {min(student_size, teacher_size)})"
            )
        vocab_size = student_size
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"{op}: vocab_size must be an int or None, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= min(student_size, teacher_size):
        raise ValueError(
            f"{op}: vocab_size must be in [1, {min(student_size, teacher_size)}] (student has {student_size} ids, "
            f"teacher {teacher_size}), got {vocab_size}"
        )
    return vocab_size
