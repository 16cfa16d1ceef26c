"""Is the loss the mean it says, and does a configuration give the divergence it names?

pytest tests/distill/test_distill_loss.py
"""

import pytest
import torch

from esr_distill.config import LossConfig
from esr_distill.distill_loss import make_divergence, normalize_divergence
from esr_distill.input_error import InputError
from esr_kernels import (
    AlphaDivergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)

# Three rollouts of 3, 1 and 2 positions.
ROWS = [0, 0, 0, 1, 2, 2]
VALUES = [1.0, 2.0, 3.0, 10.0, 4.0, 8.0]

# By hand: sum = 28 / 3; sequence_mean = (2 + 10 + 6) / 3; token_mean = 28 / 6.
LOSSES = {"sum": 28 / 3, "sequence_mean": 6.0, "token_mean": 28 / 6, "fixed": 28 / 7}
# Weight of each position in the loss.
WEIGHTS = {
    "sum": [1 / 3] * 6,
    "sequence_mean": [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6],
    "token_mean": [1 / 6] * 6,
    "fixed": [1 / 7] * 6,
}
DENOMINATOR = {"fixed": 7.0}


@pytest.mark.parametrize("normalizer", LOSSES)
def test_loss_and_weights_by_hand(normalizer):
    divergence_N = torch.tensor(VALUES, requires_grad=True)
    loss = normalize_divergence(
        divergence_N, torch.ones(6), torch.tensor(ROWS), 3, normalizer, DENOMINATOR.get(normalizer)
    )
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(LOSSES[normalizer], rel=1e-6)
    assert divergence_N.grad.tolist() == pytest.approx(WEIGHTS[normalizer], rel=1e-6)


def test_rollouts_of_one_length_have_one_loss_up_to_that_length():
    divergence_N, row_N = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 0, 1, 1])
    losses = {
        name: normalize_divergence(divergence_N, torch.ones(4), row_N, 2, name).item()
        for name in WEIGHTS
        if name != "fixed"
    }
    assert losses["sequence_mean"] == pytest.approx(2.75)
    assert losses["token_mean"] == pytest.approx(2.75)
    assert losses["sum"] == pytest.approx(5.5)


def test_unknown_normalizer():
    with pytest.raises(ValueError, match="normalizer must be sum, sequence_mean, token_mean or fixed, got 'mean'"):
        normalize_divergence(torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.long), 1, "mean")


# Weights 2, 0, 1 | 0 | 0.5, 1: the second rollout trains nowhere; the divergences with weight 0 are never read.
SOME_WEIGHTS = [2.0, 0.0, 1.0, 0.0, 0.5, 1.0]
WEIGHTED_SUM = 2 * 1.0 + 3.0 + 0.5 * 4.0 + 8.0
WEIGHTED_LOSSES = {
    "sum": WEIGHTED_SUM / 3,
    "sequence_mean": ((2 * 1.0 + 3.0) / 2 + 0 + (0.5 * 4.0 + 8.0) / 2) / 3,
    "token_mean": WEIGHTED_SUM / 4,
    "fixed": WEIGHTED_SUM / 7,
}


@pytest.mark.parametrize("normalizer", WEIGHTED_LOSSES)
@pytest.mark.parametrize("unread", [0.0, float("inf"), float("nan")])
def test_weights_and_positions_that_are_not_kept(normalizer, unread):
    values = [unread if weight == 0 else value for value, weight in zip(VALUES, SOME_WEIGHTS, strict=True)]
    divergence_N = torch.tensor(values, requires_grad=True)
    arguments = torch.tensor(SOME_WEIGHTS), torch.tensor(ROWS), 3, normalizer, DENOMINATOR.get(normalizer)
    loss = normalize_divergence(divergence_N, *arguments)
    loss.backward()
    assert loss.item() == pytest.approx(WEIGHTED_LOSSES[normalizer], rel=1e-6)
    is_zero = [slope == 0 for slope in divergence_N.grad.tolist()]
    assert is_zero == [weight == 0 for weight in SOME_WEIGHTS]


@pytest.mark.parametrize("normalizer", WEIGHTED_LOSSES)
@pytest.mark.parametrize("count", [0, 6])
def test_no_position_at_all_is_a_loss_of_zero(normalizer, count):
    divergence_N = torch.full((count,), float("nan"), requires_grad=True)
    row_N = torch.tensor(ROWS[:count], dtype=torch.long)
    loss = normalize_divergence(divergence_N, torch.zeros(count), row_N, 3, normalizer, DENOMINATOR.get(normalizer))
    loss.backward()
    assert loss.item() == 0 and divergence_N.grad.tolist() == [0.0] * count


@pytest.mark.parametrize(
    ("name", "parameter", "expected"),
    [
        ("reverse_kl", None, ReverseKL()),
        ("forward_kl", None, ForwardKL()),
        ("total_variation", None, TotalVariation()),
        ("jsd", 0.3, GeneralizedJSD(beta=0.3)),
        ("skew_forward_kl", 0.1, SkewForwardKL(lam=0.1)),
        ("skew_reverse_kl", 0.2, SkewReverseKL(lam=0.2)),
        ("alpha_divergence", 0.4, AlphaDivergence(alpha=0.4)),
    ],
)
def test_divergence_by_name(name, parameter, expected):
    divergence = make_divergence(LossConfig(divergence=name, divergence_parameter=parameter))
    assert type(divergence) is type(expected)
    assert divergence == expected


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("reverse_kl", 0.5, "loss.divergence_parameter must be unset for reverse_kl, got 0.5"),
        ("forward_kl", 0.0, "loss.divergence_parameter must be unset for forward_kl, got 0.0"),
        ("total_variation", 1.0, "loss.divergence_parameter must be unset for total_variation, got 1.0"),
        ("jsd", None, "loss.divergence_parameter must be set for jsd, got none"),
        ("skew_forward_kl", None, "loss.divergence_parameter must be set for skew_forward_kl"),
        ("skew_reverse_kl", None, "loss.divergence_parameter must be set for skew_reverse_kl"),
        ("alpha_divergence", None, "loss.divergence_parameter must be set for alpha_divergence"),
        ("jsd", 1.5, r"loss.divergence_parameter: GeneralizedJSD: beta must be .*, got 1.5"),
        ("skew_forward_kl", -0.1, r"loss.divergence_parameter: SkewForwardKL: lam must be .*, got -0.1"),
        ("alpha_divergence", float("nan"), r"loss.divergence_parameter: AlphaDivergence: alpha must be .*, got nan"),
        ("hellinger", 0.5, r"loss.divergence must be one of alpha_divergence, .*, got 'hellinger'"),
    ],
)
def test_divergence_errors(name, parameter, message):
    with pytest.raises(InputError, match=message):
        make_divergence(LossConfig(divergence=name, divergence_parameter=parameter))
