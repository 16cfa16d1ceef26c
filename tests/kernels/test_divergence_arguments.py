"""Are the divergences values, and do they refuse parameters outside their domain?

python -m pytest tests/kernels/test_divergence_arguments.py
"""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from esr_kernels.divergence import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    check_divergence,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeneralizedJSD(-0.1), r"GeneralizedJSD: beta must be a number in \[0, 1\], got -0\.1"),
        (lambda: GeneralizedJSD(1.5), r"GeneralizedJSD: beta must be a number in \[0, 1\], got 1\.5"),
        (lambda: GeneralizedJSD("0.5"), r"GeneralizedJSD: beta must be a number in \[0, 1\], got '0\.5'"),
        (lambda: GeneralizedJSD(True), r"GeneralizedJSD: beta must be a number in \[0, 1\], got True"),
        (lambda: GeneralizedJSD(math.nan), r"GeneralizedJSD: beta must be a number in \[0, 1\], got nan"),
        (lambda: SkewForwardKL(1.0), r"SkewForwardKL: lam must be a number in \[0, 1\), got 1\.0"),
        (lambda: SkewReverseKL(-1), r"SkewReverseKL: lam must be a number in \[0, 1\), got -1"),
        (lambda: AlphaDivergence(math.inf), r"AlphaDivergence: alpha must be a finite number, got inf"),
    ],
)
def test_parameters_outside_their_domain_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_divergences_are_values():
    assert GeneralizedJSD(0.5) == GeneralizedJSD(beta=0.5)
    assert len({ForwardKL(), ForwardKL(), ReverseKL(), SkewForwardKL(0.1), SkewReverseKL(0.1)}) == 4
    assert repr(AlphaDivergence(alpha=0.5)) == "AlphaDivergence(alpha=0.5)"
    with pytest.raises(FrozenInstanceError):
        GeneralizedJSD(0.5).beta = 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("reverse_kl", r"op: divergence must be a value such as ReverseKL\(\), got 'reverse_kl'"),
        (ReverseKL, r"op: divergence must be a value such as ReverseKL\(\), got the class ReverseKL"),
        (None, r"op: divergence must be a value such as ReverseKL\(\), got None"),
    ],
)
def test_an_op_refuses_names_and_classes(wrong, message):
    with pytest.raises(TypeError, match=message):
        check_divergence("op", wrong)


def test_a_divergence_without_terms_says_so():
    with pytest.raises(NotImplementedError, match="Divergence has no terms"):
        Divergence().terms(torch.zeros(1), torch.zeros(1))
