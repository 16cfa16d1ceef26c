r"""The divergence family as frozen values: `ReverseKL()`, `GeneralizedJSD(beta=0.5)`, ...

A divergence is taken per row between the student's distribution p and the teacher's distribution q over the same
events. Each class states its value, its gradient and its limits, and has one method: the terms, one per event, whose
sum over the events is the divergence.

Gradients are with respect to the student's logits z (p = softmax(z)), the teacher being constant. They are written
with the pull-back of a vector c through the softmax,

    J(c) = p * (c - sum(p * c)),

which sums to 0 over the vocabulary and does not change when a constant is added to c.

Rules that hold for every divergence:

- An event of probability 0 (log-probability -inf) contributes its limit: 0 log 0 = 0.
- Zero means a log-probability of -inf, not a probability that underflows.
- Where a term is mathematically infinite, or too large for its dtype, it is +inf. Its derivative is then 0, not NaN;
  the ops set the gradient of the whole row to 0.
- No limit is clamped: values may leave 0 by rounding (about 1e-7 of the row's log-sum-exp in float32).
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Below it the limit of an alpha-divergence is exact to float64, while power * log(b / a) could underflow in float32.
LIMIT_OF_POWER = 1e-20


@dataclass(frozen=True)
class Divergence:
    """Base class: a new divergence is a frozen dataclass with `terms`, and a device function for `Impl.FUSED`."""

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Terms whose sum over events is the divergence; both arguments and the result have one shape and dtype.

        Differentiable in `student_logprobs`; entries may be -inf.
        """
        raise NotImplementedError(f"{type(self).__name__} has no terms")

    def kernel(self) -> tuple[str, float]:
        """Name of the device function in esr_kernels/divergence_kernel.py, and its parameter: the class's only field."""
        values = [getattr(self, field.name) for field in fields(self)]
        if len(values) > 1:
            raise NotImplementedError(
                f"{type(self).__name__}: the kernels take one parameter, got {len(values)} fields"
            )
        return type(self).__name__, float(values[0]) if values else 0.0


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) = sum q log(q / p).

    Gradient: p - q. Infinite where q > 0 and p = 0.
    """

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return _kl_terms(teacher_logprobs, student_logprobs)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum p log(p / q), the divergence of Early Stopping Rollout (arXiv 2605.27028, Eq. 1-2).

    Gradient: J(log(p / q)). Infinite where p > 0 and q = 0.
    """

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return _kl_terms(student_logprobs, teacher_logprobs)


@dataclass(frozen=True)
class GeneralizedJSD(Divergence):
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p: beta multiplies the **teacher** (q).

    Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649); beta = 0.5 is the symmetric one, at most log 2.
    KDFlow and DistiLLM write the weight of the student instead: their beta is 1 - beta here.

    Gradient: (1 - beta) J(log(p / m)). Finite for 0 < beta < 1.

    The ends follow TRL and Liger: beta = 0 **is** `ForwardKL` and beta = 1 **is** `ReverseKL`. This is a jump, because
    the formula above tends to 0 at both ends. What tends to the two KLs are the scaled values: JSD / beta -> forward
    KL as beta -> 0, and JSD / (1 - beta) -> reverse KL as beta -> 1. A small beta therefore means a small loss.

    Args:
        beta: 0 <= beta <= 1.
    """

    beta: float

    def __post_init__(self) -> None:
        _check_parameter("GeneralizedJSD", "beta", self.beta, "a number in [0, 1]", 0 <= _number(self.beta) <= 1)

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        if self.beta == 0:
            return ForwardKL().terms(student_logprobs, teacher_logprobs)
        if self.beta == 1:
            return ReverseKL().terms(student_logprobs, teacher_logprobs)
        mixture = _log_mixture(self.beta, teacher_logprobs, student_logprobs)
        from_teacher = _kl_terms(teacher_logprobs, mixture)
        from_student = _kl_terms(student_logprobs, mixture)
        return self.beta * from_teacher + (1 - self.beta) * from_student

    def kernel(self) -> tuple[str, float]:
        ends = {0: ForwardKL(), 1: ReverseKL()}
        return ends[self.beta].kernel() if self.beta in ends else super().kernel()


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(q || m) with m = lam q + (1 - lam) p: forward KL against a student mixed with the teacher (arXiv 2402.03898).

    Gradient: J(-(1 - lam) q / m). At most -log(lam), since m >= lam q.
    lam = 0 is `ForwardKL`. lam = 1 is identically 0 and refused.

    Args:
        lam: weight of the teacher in the mixture, 0 <= lam < 1 (DistiLLM uses 0.1).
    """

    lam: float

    def __post_init__(self) -> None:
        _check_parameter("SkewForwardKL", "lam", self.lam, "a number in [0, 1)", 0 <= _number(self.lam) < 1)

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return _kl_terms(teacher_logprobs, _log_mixture(self.lam, teacher_logprobs, student_logprobs))

    def kernel(self) -> tuple[str, float]:
        return super().kernel() if self.lam else ForwardKL().kernel()


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p || m) with m = (1 - lam) q + lam p: reverse KL against a teacher mixed with the student (arXiv 2402.03898).

    Gradient: J(log(p / m) - lam p / m). At most -log(lam), since m >= lam p.
    lam = 0 is `ReverseKL`. lam = 1 is identically 0 and refused.

    Args:
        lam: weight of the student in the mixture, 0 <= lam < 1 (DistiLLM uses 0.1).
    """

    lam: float

    def __post_init__(self) -> None:
        _check_parameter("SkewReverseKL", "lam", self.lam, "a number in [0, 1)", 0 <= _number(self.lam) < 1)

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return _kl_terms(student_logprobs, _log_mixture(self.lam, student_logprobs, teacher_logprobs))

    def kernel(self) -> tuple[str, float]:
        return super().kernel() if self.lam else ReverseKL().kernel()


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """0.5 sum |p - q|, in [0, 1].

    Gradient: J(0.5 sign(p - q)), with sign(0) = 0.
    """

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return 0.5 * (student_logprobs.exp() - teacher_logprobs.exp()).abs()


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """(sum q^alpha p^(1 - alpha) - 1) / (alpha (alpha - 1)), Amari's alpha-divergence.

    Gradient: J(-(q / p)^alpha / alpha).

    Continuous in alpha: alpha -> 1 is `ForwardKL` and alpha -> 0 is `ReverseKL`, which alpha = 1 and alpha = 0 give
    exactly. alpha = 0.5 is 4 times the squared Hellinger distance. For alpha >= 1 it is infinite where q > 0 and
    p = 0, for alpha <= 0 where p > 0 and q = 0; between it is at most 1 / (alpha (1 - alpha)).

    The terms are q expm1((1 - alpha) log(p / q)) for alpha >= 0.5 and p expm1(alpha log(q / p)) below, each over
    alpha (alpha - 1): both sum to the value above and lose no digits near alpha = 1 and alpha = 0.

    Args:
        alpha: any finite number.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_parameter("AlphaDivergence", "alpha", self.alpha, "a finite number", math.isfinite(_number(self.alpha)))

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        if self.alpha >= 0.5:
            return _alpha_terms(teacher_logprobs, student_logprobs, 1 - self.alpha)
        return _alpha_terms(student_logprobs, teacher_logprobs, self.alpha)

    def kernel(self) -> tuple[str, float]:
        if abs(self.alpha) < LIMIT_OF_POWER:
            return ReverseKL().kernel()
        if abs(1 - self.alpha) < LIMIT_OF_POWER:
            return ForwardKL().kernel()
        return "AlphaDivergence>=0.5" if self.alpha >= 0.5 else "AlphaDivergence<0.5", float(self.alpha)


def check_divergence(op: str, divergence: object) -> None:
    """Check that the argument `divergence` of an op is a value of this family.

    Raises:
        TypeError: it is not, e.g. a name or a class instead of a value.
    """
    if isinstance(divergence, type) and issubclass(divergence, Divergence):
        raise TypeError(f"{op}: divergence must be a value such as ReverseKL(), got the class {divergence.__name__}")
    if not isinstance(divergence, Divergence):
        raise TypeError(f"{op}: divergence must be a value such as ReverseKL(), got {divergence!r}")


def _kl_terms(logprobs_a: Tensor, logprobs_b: Tensor) -> Tensor:
    """Terms of KL(a || b): a log(a / b), 0 where a = 0, +inf where only b = 0."""
    zero = logprobs_a == -math.inf
    infinite = (logprobs_b == -math.inf) & ~zero
    # Both branches of `where` are differentiated, so the branch not taken is given harmless inputs.
    logprobs_a = logprobs_a.masked_fill(zero | infinite, 0.0)
    logprobs_b = logprobs_b.masked_fill(zero | infinite, 0.0)
    terms = logprobs_a.exp() * (logprobs_a - logprobs_b)
    return terms.masked_fill(infinite, math.inf)


def _log_mixture(weight: float, logprobs_a: Tensor, logprobs_b: Tensor) -> Tensor:
    """log(weight a + (1 - weight) b) for 0 <= weight < 1."""
    if weight == 0:
        return logprobs_b
    # logaddexp(-inf, -inf) is right, but its gradient is NaN.
    both_zero = (logprobs_a == -math.inf) & (logprobs_b == -math.inf)
    logprobs_a = logprobs_a.masked_fill(both_zero, 0.0)
    logprobs_b = logprobs_b.masked_fill(both_zero, 0.0)
    mixture = torch.logaddexp(math.log(weight) + logprobs_a, math.log1p(-weight) + logprobs_b)
    return mixture.masked_fill(both_zero, -math.inf)


def _alpha_terms(logprobs_a: Tensor, logprobs_b: Tensor, power: float) -> Tensor:
    """Terms a ((b / a)^power - 1) / (power (power - 1)) for power <= 0.5; the limit a log(a / b) for power -> 0."""
    if abs(power) < LIMIT_OF_POWER:
        return _kl_terms(logprobs_a, logprobs_b)
    a_zero = logprobs_a == -math.inf
    b_zero = (logprobs_b == -math.inf) & ~a_zero
    logprobs_a = logprobs_a.masked_fill(a_zero, 0.0)
    logprobs_b = logprobs_b.masked_fill(a_zero | b_zero, 0.0)

    a = logprobs_a.exp()
    exponent = power * (logprobs_b - logprobs_a)
    largest = math.log(torch.finfo(exponent.dtype).max)
    too_large = logprobs_a + exponent > largest
    # exp(log a + exponent) - a is the same as a expm1(exponent) and overflows later.
    is_large = exponent > 1
    small = a * torch.expm1(exponent.masked_fill(is_large, 0.0))
    large = (logprobs_a + exponent).masked_fill(~is_large | too_large, 0.0).exp() - a
    difference = torch.where(is_large, large, small)
    difference = torch.where(b_zero, -a if power > 0 else math.inf, difference)
    difference = difference.masked_fill(too_large, math.inf)
    return difference / (power * (power - 1))


def _number(value: object) -> float:
    """The value itself if it is a Python number, else NaN, which is in no domain."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _check_parameter(divergence: str, name: str, value: object, domain: str, is_inside: bool) -> None:
    if not is_inside:
        raise ValueError(f"{divergence}: {name} must be {domain}, got {value!r}")
