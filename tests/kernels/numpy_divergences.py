"""The divergences a second time, in numpy and in probabilities: formula and gradient as the literature prints them.

Nothing here is shared with the library, which works in log-probabilities and gets its gradients from autograd. The
gradient is given as c = dD/dp; the gradient with respect to the student's logits is J(c) = p (c - sum(p c)).
All functions expect float64 arrays (rows, events) of positive probabilities.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from esr_kernels import divergence as family


class Case(NamedTuple):
    divergence: family.Divergence
    value: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (p, q) -> (rows,)
    slope: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (p, q) -> dD/dp, (rows, events)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def pull_back(p: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return p * (slope - (p * slope).sum(axis=-1, keepdims=True))


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * np.log(a / b)).sum(axis=-1)


def jsd(beta: float) -> Case:
    def value(p, q):
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)

    def slope(p, q):
        return (1 - beta) * np.log(p / (beta * q + (1 - beta) * p))

    return Case(family.GeneralizedJSD(beta), value, slope)


def skew_forward(lam: float) -> Case:
    return Case(
        family.SkewForwardKL(lam),
        lambda p, q: kl(q, lam * q + (1 - lam) * p),
        lambda p, q: -(1 - lam) * q / (lam * q + (1 - lam) * p),
    )


def skew_reverse(lam: float) -> Case:
    def slope(p, q):
        m = (1 - lam) * q + lam * p
        return np.log(p / m) - lam * p / m

    return Case(family.SkewReverseKL(lam), lambda p, q: kl(p, (1 - lam) * q + lam * p), slope)


def alpha(a: float) -> Case:
    return Case(
        family.AlphaDivergence(a),
        lambda p, q: ((q**a * p ** (1 - a)).sum(axis=-1) - 1) / (a * (a - 1)),
        lambda p, q: -((q / p) ** a) / a,
    )


def forward_value(p, q):
    return kl(q, p)


def forward_slope(p, q):
    return -q / p


def reverse_value(p, q):
    return kl(p, q)


def reverse_slope(p, q):
    return np.log(p / q)


CASES = {
    "forward_kl": Case(family.ForwardKL(), forward_value, forward_slope),
    "reverse_kl": Case(family.ReverseKL(), reverse_value, reverse_slope),
    "jsd_0_is_forward": Case(family.GeneralizedJSD(0.0), forward_value, forward_slope),
    "jsd_0.1": jsd(0.1),
    "jsd_0.5": jsd(0.5),
    "jsd_0.9": jsd(0.9),
    "jsd_1_is_reverse": Case(family.GeneralizedJSD(1.0), reverse_value, reverse_slope),
    "skew_forward_0": Case(family.SkewForwardKL(0.0), forward_value, forward_slope),
    "skew_forward_0.1": skew_forward(0.1),
    "skew_forward_0.7": skew_forward(0.7),
    "skew_reverse_0": Case(family.SkewReverseKL(0.0), reverse_value, reverse_slope),
    "skew_reverse_0.1": skew_reverse(0.1),
    "skew_reverse_0.7": skew_reverse(0.7),
    "total_variation": Case(
        family.TotalVariation(), lambda p, q: 0.5 * np.abs(p - q).sum(axis=-1), lambda p, q: 0.5 * np.sign(p - q)
    ),
    "alpha_-1.5": alpha(-1.5),
    "alpha_0_is_reverse": Case(family.AlphaDivergence(0.0), reverse_value, reverse_slope),
    "alpha_0.3": alpha(0.3),
    "alpha_0.5": alpha(0.5),
    "alpha_0.8": alpha(0.8),
    "alpha_1_is_forward": Case(family.AlphaDivergence(1.0), forward_value, forward_slope),
    "alpha_2": alpha(2.0),
}
