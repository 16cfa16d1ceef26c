"""The divergences on the device: for each class of `esr_kernels.divergence` one small function of an event.

    (student_logprob, teacher_logprob, log_ratio, parameter, complement) -> (term, weighted_cost)

`log_ratio` is log p - log q with more digits than the difference of the two arguments before it, and 0 where both are
-inf. `parameter` is the class's one number and `complement` is 1 - parameter, rounded from float64. `term` summed over the
events is the divergence; `weighted_cost` is p * dD/dp up to a multiple of p, which the gradient does not see and which is
chosen so that it vanishes where p = q:

    d(logits) = J(dD/dp) = weighted_cost - p * sum(weighted_cost).

The rules of `esr_kernels.divergence` hold: an event of probability 0 contributes its limit, an infinite term is +inf, and
an event of probability 0 on both sides gives (0, 0). Derivations: docs/numerics.md.
"""

from typing import NamedTuple

import triton
import triton.language as tl

import esr_kernels.divergence as divergence_module
from esr_kernels.divergence import Divergence
from esr_kernels.elementary_kernel import expm1, log_quotient


@triton.jit
def forward_kl(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    return _kl_term(teacher_logprob, student_logprob, -log_ratio), -q_minus_p


@triton.jit
def reverse_kl(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    term = _kl_term(student_logprob, teacher_logprob, log_ratio)
    return term, term


@triton.jit
def generalized_jsd(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    # m = beta q + (1 - beta) p, so q - m = (1 - beta) (q - p) and p - m = -beta (q - p)
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    mixture = parameter * q + complement * p
    from_teacher = _weighted_log_quotient(q, mixture, complement * q_minus_p)
    from_student = complement * _weighted_log_quotient(p, mixture, -parameter * q_minus_p)
    return parameter * from_teacher + from_student, from_student


@triton.jit
def skew_forward_kl(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    # m = lam q + (1 - lam) p
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    mixture = parameter * q + complement * p
    # + m - q, which sums to 0: the terms are then >= 0, and an error common to all log-probabilities cancels.
    term = _weighted_log_quotient(q, mixture, complement * q_minus_p) - complement * q_minus_p
    return term, -complement * complement * q_minus_p * _ratio(p, mixture)


@triton.jit
def skew_reverse_kl(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    # m = (1 - lam) q + lam p
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    mixture = complement * q + parameter * p
    cost = _weighted_log_quotient(p, mixture, -complement * q_minus_p)
    # + m - p, which sums to 0; see skew_forward_kl
    return cost + complement * q_minus_p, cost + parameter * complement * q_minus_p * _ratio(p, mixture)


@triton.jit
def total_variation(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    sign = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio < 0, -1.0, 0.0))
    return 0.5 * tl.abs(q_minus_p), 0.5 * p * sign


@triton.jit
def alpha_at_least_half(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    # term = q ((p / q)^(1 - alpha) - 1) / (alpha (alpha - 1)); cost = -((q / p)^alpha - 1) / alpha
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    term = _power_term(teacher_logprob, student_logprob, -log_ratio, complement) / (-complement * parameter)
    term -= q_minus_p / parameter  # sums to 0; see skew_forward_kl
    return term, -_power_term(student_logprob, teacher_logprob, log_ratio, parameter) / parameter


@triton.jit
def alpha_below_half(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    # term = p ((q / p)^alpha - 1) / (alpha (alpha - 1)); cost as above, finite for alpha -> 0
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    power_term = _power_term(student_logprob, teacher_logprob, log_ratio, parameter)
    term = power_term / (-parameter * complement) + q_minus_p / complement  # the latter sums to 0; see skew_forward_kl
    return term, -power_term / parameter


@triton.jit
def _kl_term(logprob_a, logprob_b, log_a_over_b):
    """a log(a / b): 0 where a = 0, +inf where only b = 0 (also where a underflows)."""
    term = tl.exp(logprob_a) * log_a_over_b
    term = tl.where(logprob_b == float("-inf"), float("inf"), term)
    return tl.where(logprob_a == float("-inf"), 0.0, term)


@triton.jit
def _probabilities(student_logprob, teacher_logprob, log_ratio):
    """p, q and q - p, the last without cancellation where p and q are close."""
    p = tl.exp(student_logprob)
    q = tl.exp(teacher_logprob)
    is_near = tl.abs(log_ratio) < 0.35
    return p, q, tl.where(is_near, p * expm1(tl.where(is_near, -log_ratio, 0.0)), q - p)


@triton.jit
def _nonzero(x):
    return tl.where(x > 0, x, 1.0)


@triton.jit
def _ratio(p, mixture):
    """p / mixture, 0 where both are 0."""
    return p / _nonzero(mixture)


@triton.jit
def _weighted_log_quotient(a, b, difference):
    """a log(a / b) for 0 <= a, b with a - b = difference; 0 where a = 0, to which a probability may also underflow."""
    return tl.where(a == 0, 0.0, a * log_quotient(a, _nonzero(b), difference))


@triton.jit
def _power_term(logprob_a, logprob_b, log_a_over_b, power):
    """a ((b / a)^power - 1); for b = 0 its limit, -a or +inf times the sign of the power."""
    exponent = -power * log_a_over_b
    is_large = exponent > 0.35
    # exp(log a + exponent) - a is the same as a expm1(exponent), and neither overflows early nor is 0 * inf.
    large = tl.exp(logprob_a + exponent) - tl.exp(logprob_a)
    small = tl.exp(logprob_a) * expm1(tl.where(is_large, 0.0, exponent))
    term = tl.where(is_large, large, small)
    term = tl.where(logprob_b == float("-inf"), tl.where(power > 0, -tl.exp(logprob_a), float("inf")), term)
    return tl.where(logprob_a == float("-inf"), 0.0, term)


class DivergenceKernel(NamedTuple):
    """`function` of an event; `direction` of a KL, whose value needs no second sweep, else "".

    `is_gradient_bounded`: no entry of d(logits) exceeds 3 in magnitude, however large the divergence. Else they stay below
    3 + 2 (1 + |parameter|) times the divergence.

    `truncated_cost`: with this multiple of p added, the weighted cost is p * dD/dp itself, which a sum over a part of the events
    needs; None: a sum over a part is not defined, because terms were changed by what sums to 0 over all.
    """

    function: triton.JITFunction
    direction: str = ""
    is_gradient_bounded: bool = False
    truncated_cost: float | None = None


# By `Divergence.kernel()`.
DIVERGENCE_KERNELS = {
    "ForwardKL": DivergenceKernel(forward_kl, "forward", is_gradient_bounded=True, truncated_cost=-1.0),
    "ReverseKL": DivergenceKernel(reverse_kl, "reverse", truncated_cost=1.0),
    "GeneralizedJSD": DivergenceKernel(generalized_jsd, is_gradient_bounded=True, truncated_cost=0.0),
    "SkewForwardKL": DivergenceKernel(skew_forward_kl, is_gradient_bounded=True),
    "SkewReverseKL": DivergenceKernel(skew_reverse_kl),
    "TotalVariation": DivergenceKernel(total_variation, is_gradient_bounded=True),
    "AlphaDivergence>=0.5": DivergenceKernel(alpha_at_least_half),
    "AlphaDivergence<0.5": DivergenceKernel(alpha_below_half),
}


def choose_kernel(op: str, divergence: Divergence) -> tuple[str, float]:
    """`divergence.kernel()`, checked to be in the table.

    Raises:
        NotImplementedError: it is a divergence without a device function, also if it shares its name with one of ours.
    """
    name, parameter = divergence.kernel()
    namesake = getattr(divergence_module, type(divergence).__name__, type(divergence))
    if name not in DIVERGENCE_KERNELS or namesake is not type(divergence):
        raise NotImplementedError(
            f"{op}: {type(divergence).__name__} has no kernel (esr_kernels/divergence_kernel.py lists "
            f"{', '.join(DIVERGENCE_KERNELS)}); add one, or pass impl=Impl.REFERENCE for plain PyTorch"
        )
    return name, parameter
