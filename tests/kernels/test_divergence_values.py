"""Do the terms of each divergence sum to its formula, at its limits too?

python -m pytest tests/kernels/test_divergence_values.py
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_divergences import CASES

from esr_kernels.divergence import (
    AlphaDivergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)

INF = math.inf


def random_probabilities(seed: int, rows: int = 6, events: int = 9) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(events, 0.7), rows), generator.dirichlet(np.full(events, 0.7), rows)


def log_tensor(probabilities) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def summed(divergence, p, q) -> np.ndarray:
    return divergence.terms(log_tensor(p), log_tensor(q)).sum(-1).numpy()


@pytest.mark.parametrize("name", CASES)
def test_terms_sum_to_the_formula(name):
    case = CASES[name]
    p, q = random_probabilities(seed=1)
    np.testing.assert_allclose(summed(case.divergence, p, q), case.value(p, q), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_is_zero_for_equal_and_positive_for_unequal_distributions(name):
    p, q = random_probabilities(seed=2)
    np.testing.assert_allclose(summed(CASES[name].divergence, p, p), 0.0, atol=1e-15)
    assert (summed(CASES[name].divergence, p, q) > 1e-3).all()


# p = (1/2, 1/2) and q = (1/4, 3/4), worked by hand.
@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (ForwardKL(), 0.75 * math.log(3) - math.log(2)),
        (ReverseKL(), math.log(2) - 0.5 * math.log(3)),
        (GeneralizedJSD(0.5), 1.5 * math.log(2) - 0.625 * math.log(5)),
        (TotalVariation(), 0.25),
        (AlphaDivergence(2), 0.5 * (0.0625 / 0.5 + 0.5625 / 0.5 - 1)),
        (AlphaDivergence(-1), 0.5 * (0.25 / 0.25 + 0.25 / 0.75 - 1)),
        (AlphaDivergence(0.5), 4 * (1 - math.sqrt(0.125) - math.sqrt(0.375))),
    ],
    ids=repr,
)
def test_hand_worked_values(divergence, expected):
    assert summed(divergence, [[0.5, 0.5]], [[0.25, 0.75]])[0] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_jsd_follows_the_convention_of_trl(beta):
    """TRL: beta weighs the teacher in the mixture; the ends are the two KLs (torch's kl_div takes its target last)."""
    p, q = (torch.tensor(x) for x in random_probabilities(seed=3))
    if beta == 0:
        expected = F.kl_div(p.log(), q, reduction="none").sum(-1)
    elif beta == 1:
        expected = F.kl_div(q.log(), p, reduction="none").sum(-1)
    else:
        log_mixture = torch.log((1 - beta) * p + beta * q)
        to_teacher = F.kl_div(log_mixture, q, reduction="none").sum(-1)
        to_student = F.kl_div(log_mixture, p, reduction="none").sum(-1)
        expected = beta * to_teacher + (1 - beta) * to_student
    np.testing.assert_allclose(summed(GeneralizedJSD(beta), p.numpy(), q.numpy()), expected.numpy(), rtol=1e-12)


def test_g5_scaled_jsd_tends_to_the_kls_and_unscaled_jsd_to_zero():
    p, q = random_probabilities(seed=4)
    small = 1e-6
    forward, reverse = summed(ForwardKL(), p, q), summed(ReverseKL(), p, q)
    np.testing.assert_allclose(summed(GeneralizedJSD(small), p, q) / small, forward, rtol=1e-3)
    np.testing.assert_allclose(summed(GeneralizedJSD(1 - small), p, q) / small, reverse, rtol=1e-3)
    assert (summed(GeneralizedJSD(small), p, q) < 1e-4).all()
    assert (summed(GeneralizedJSD(0.0), p, q) > 0.05).all()


@pytest.mark.parametrize(("alpha", "limit"), [(1.0, ForwardKL()), (0.0, ReverseKL())])
@pytest.mark.parametrize("distance", [1e-4, -1e-4, 1e-9, -1e-9, 1e-18, 1e-320])
def test_g5_alpha_divergence_is_continuous_at_one_and_zero(alpha, limit, distance):
    p, q = random_probabilities(seed=5)
    value = summed(AlphaDivergence(alpha + distance), p, q)
    np.testing.assert_allclose(value, summed(limit, p, q), rtol=max(1e-13, 10 * abs(distance)) * 10, atol=1e-13)


@pytest.mark.parametrize("alpha", [1 - 1e-6, 1 + 1e-6, 1e-6, -1e-6, 1e-18])
def test_alpha_divergence_near_its_limits_keeps_its_digits_in_float32(alpha):
    """The textbook form loses all of them: it divides a difference of order 1e-7 by alpha (alpha - 1) = 1e-6."""
    p, q = random_probabilities(seed=6)
    value = AlphaDivergence(alpha).terms(log_tensor(p).float(), log_tensor(q).float()).sum(-1).double().numpy()
    expected = summed(ForwardKL() if alpha > 0.5 else ReverseKL(), p, q)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


# Student (1, 0, 0), teacher (0, 1, 0): the supports are disjoint and one event is impossible for both.
@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (ForwardKL(), [0.0, INF, 0.0]),
        (ReverseKL(), [INF, 0.0, 0.0]),
        (GeneralizedJSD(0.5), [0.5 * math.log(2), 0.5 * math.log(2), 0.0]),
        (GeneralizedJSD(0.2), [-0.8 * math.log(0.8), -0.2 * math.log(0.2), 0.0]),
        (SkewForwardKL(0.1), [0.0, -math.log(0.1), 0.0]),
        (SkewReverseKL(0.1), [-math.log(0.1), 0.0, 0.0]),
        (TotalVariation(), [0.5, 0.5, 0.0]),
        (AlphaDivergence(0.5), [0.0, 4.0, 0.0]),
        (AlphaDivergence(0.25), [1 / (0.25 * 0.75), 0.0, 0.0]),
        (AlphaDivergence(2.0), [0.0, INF, 0.0]),
        (AlphaDivergence(1.0), [0.0, INF, 0.0]),
        (AlphaDivergence(-1.0), [INF, 0.0, 0.0]),
        (AlphaDivergence(0.0), [INF, 0.0, 0.0]),
    ],
    ids=repr,
)
def test_zero_probabilities_contribute_their_limit(divergence, expected):
    terms = divergence.terms(torch.tensor([0.0, -INF, -INF]), torch.tensor([-INF, 0.0, -INF]))
    np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-6)


def test_alpha_divergence_does_not_overflow_before_its_value_does():
    """q = e^-60, p = e^-150: (q / p)^1 overflows float32, but the term q^2 / p / 2 = e^30 / 2 does not."""
    term = AlphaDivergence(2.0).terms(torch.tensor([-150.0]), torch.tensor([-60.0]))
    assert term.item() == pytest.approx(math.exp(30) / 2, rel=1e-5)
    assert AlphaDivergence(2.0).terms(torch.tensor([-1000.0]), torch.tensor([-1.0])).item() == INF
