"""Are the entries of a gradient within the bounds of docs/numerics.md?  pytest tests/kernels/test_gradient_bounds.py

The kernels scale float16 gradients by the weaker of them, so an entry above it would overflow.
"""

import dataclasses
import math

import numpy as np
import pytest
from numpy_divergences import CASES, pull_back, softmax

from esr_kernels import (
    AlphaDivergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS


def rows_of_all_kinds() -> list[tuple[np.ndarray, np.ndarray]]:
    """(p, q) of few and many events: alike, far apart, and with one event that holds nearly everything on either side."""
    generator = np.random.default_rng(0)
    pairs = []
    for events in (2, 3, 37):
        for scale in (0.01, 1.0, 4.0, 9.0):
            student, teacher = generator.normal(0, scale, (2, 200, events))
            pairs += [(softmax(student), softmax(teacher)), (softmax(student), softmax(student[:, ::-1]))]
            student[:, 0] += scale * 3
            pairs += [(softmax(student), softmax(teacher)), (softmax(teacher), softmax(student))]
    return pairs


def sharp_bound(divergence, value_N: np.ndarray) -> np.ndarray:
    """The table of docs/numerics.md, section 4."""
    match divergence:
        case ForwardKL() | SkewForwardKL() | GeneralizedJSD(0):
            return np.ones_like(value_N)
        case ReverseKL() | GeneralizedJSD(1):
            return value_N + 1 / math.e
        case GeneralizedJSD(beta):
            return value_N + (1 - beta) / math.e
        case SkewReverseKL():
            return value_N + 1 / math.e + 1
        case TotalVariation():
            return np.full_like(value_N, 0.25)
        case AlphaDivergence(alpha) if alpha >= 1:
            return 1 / alpha + (alpha - 1) * value_N
        case AlphaDivergence(alpha):
            return 1 + (1 - alpha) * value_N
    raise AssertionError(divergence)


@pytest.mark.parametrize("name", CASES)
def test_no_entry_of_a_gradient_exceeds_its_bounds(name):
    case = CASES[name]
    parameter = sum(dataclasses.astuple(case.divergence))  # none or one
    nearest = 0.0
    for p, q in rows_of_all_kinds():
        value_N, largest_N = case.value(p, q), np.abs(pull_back(p, case.slope(p, q))).max(axis=-1)
        sharp_N = sharp_bound(case.divergence, value_N)
        assert (largest_N <= sharp_N * (1 + 1e-9) + 1e-9).all()
        is_bounded = DIVERGENCE_KERNELS[case.divergence.kernel()[0]].is_gradient_bounded
        assert (largest_N <= 3 + (0 if is_bounded else 2 * (1 + abs(parameter)) * value_N)).all()
        nearest = max(nearest, (largest_N / sharp_N).max())
    assert nearest > 0.04  # not vacuous: 0.05 for weak mixtures, above 0.5 for the KLs
