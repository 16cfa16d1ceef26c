"""Are the measures and their standard errors those of the formulas, worked by hand or by enumeration?

pytest tests/distill/test_accuracy.py
"""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from esr_distill.evaluation.accuracy import (
    Accuracy,
    PairedDifference,
    estimate_mean,
    paired_difference,
    pass_at,
    percent,
    ratio_by_question,
    values_by_question,
)
from esr_distill.evaluation.grades import Grades


def make_grades(correct, *, first_box=None, majority=None, finished=None, repetitive=None, length=None) -> Grades:
    correct = np.array(correct, dtype=bool)
    return Grades(
        answers=[[None] * correct.shape[1]] * correct.shape[0],
        correct_Q_S=correct,
        first_box_correct_Q_S=None if first_box is None else np.array(first_box, dtype=bool),
        majority_correct_Q=np.array(correct[:, 0] if majority is None else majority, dtype=bool),
        finished_Q_S=np.ones_like(correct) if finished is None else np.array(finished, dtype=bool),
        repetitive_Q_S=np.zeros_like(correct) if repetitive is None else np.array(repetitive, dtype=bool),
        length_Q_S=np.ones(correct.shape, dtype=int) if length is None else np.array(length),
    )


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_is_the_share_of_all_subsets_that_hold_a_correct_sample(num_samples):
    for num_correct in range(num_samples + 1):
        samples = [i < num_correct for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = list(combinations(samples, k))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at(k, num_correct, num_samples) == pytest.approx(float(expected), abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_pass_at_is_unbiased(k):
    """Its mean over the binomial distribution of correct samples, in exact fractions, is 1 - (1 - p)^k."""
    p, n = Fraction(3, 11), 8
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(pass_at(k, c, n)).limit_denominator(10**6)
        for c in range(n + 1)
    )
    assert mean == 1 - (1 - p) ** k


@pytest.mark.parametrize("arguments", [(0, 1, 3), (4, 1, 3), (1, -1, 3), (1, 4, 3)])
def test_pass_at_of_what_cannot_be(arguments):
    with pytest.raises(ValueError, match="1 <= k <= samples and 0 <= correct <= samples must hold, got"):
        pass_at(*arguments)


def test_standard_error_by_hand():
    """Means 1, 1/2, 0: mean 1/2, squares 1/4 + 0 + 1/4, over 3 x 2."""
    estimate = estimate_mean(np.array([1.0, 0.5, 0.0]))
    assert estimate.value == pytest.approx(0.5)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.5 / 6))


def test_one_question_has_no_standard_error():
    assert estimate_mean(np.array([0.25])).standard_error is None
    assert Accuracy.of(make_grades([[True, False]])).standard_error is None
    assert paired_difference(np.array([1.0]), np.array([0.5])) == PairedDifference(0.5, None, 1)


def test_standard_error_is_that_of_clusters():
    """Miller's clustered form: the sum over pairs of samples of one question. It is that of the means between questions, but for
    a factor Q / (Q - 1) in the variance."""
    correct_Q_S = np.random.default_rng(0).random((13, 5)) < np.linspace(0.05, 0.95, 13)[:, None]
    num_questions, n, mean = 13, 65, correct_Q_S.mean()
    clustered = 0.0
    for row in correct_Q_S:
        for i in range(5):
            for j in range(5):
                clustered += (row[i] - mean) * (row[j] - mean) / n**2
    accuracy = Accuracy.of(make_grades(correct_Q_S))
    assert accuracy.standard_error**2 == pytest.approx(clustered * num_questions / (num_questions - 1))
    # as if the samples were independent, it would be much too small
    assert accuracy.standard_error > 1.4 * math.sqrt(mean * (1 - mean) / n)


def test_standard_error_of_one_greedy_reply_each():
    accuracy = Accuracy.of(make_grades([[True], [True], [True], [False], [False]]))
    assert (accuracy.count, accuracy.samples_per_problem) == (5, 1)
    assert accuracy.accuracy == pytest.approx(0.6)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    for name in ("accuracy", "majority", "pass@1"):
        assert accuracy.estimates[name].value == pytest.approx(0.6)
        assert accuracy.estimates[name].standard_error == pytest.approx(accuracy.standard_error)
    assert "pass@2" not in accuracy.estimates


def test_all_measures_by_hand():
    grades = make_grades(
        [[1, 1, 0], [0, 0, 1], [0, 0, 0]],
        first_box=[[1, 1, 1], [0, 0, 1], [0, 1, 0]],
        majority=[1, 0, 0],
        finished=[[1, 0, 1], [1, 1, 1], [0, 0, 0]],
        repetitive=[[0, 0, 0], [0, 0, 0], [1, 1, 0]],
        length=[[2, 4, 6], [1, 1, 1], [9, 9, 9]],
    )
    accuracy = Accuracy.of(grades)
    values = {name: estimate.value for name, estimate in accuracy.estimates.items()}
    assert values == pytest.approx(
        {
            "accuracy": 3 / 9,
            "majority": 1 / 3,
            "pass@1": 3 / 9,
            "pass@2": (1 + 2 / 3 + 0) / 3,  # of 3 pairs: 3 hold a right one, 2 do
            "pass@3": 2 / 3,
            "last_box_accuracy": 3 / 9,
            "first_box_accuracy": 5 / 9,
            "finished": 5 / 9,
            "accuracy_if_finished": 2 / 5,
            "mean_length": (4 + 1 + 9) / 3,
            "repetition": 2 / 9,
        }
    )
    assert (accuracy.accuracy, accuracy.mean_length, accuracy.finished) == pytest.approx((3 / 9, 14 / 3, 5 / 9))
    pass_2 = [1, 2 / 3, 0]
    mean = sum(pass_2) / 3
    expected = math.sqrt(sum((x - mean) ** 2 for x in pass_2) / 6)
    assert accuracy.estimates["pass@2"].standard_error == pytest.approx(expected)
    assert accuracy.record()["estimates"]["pass@2"] == {
        "value": pytest.approx(mean),
        "standard_error": pytest.approx(expected),
    }


def test_nothing_finished_has_no_accuracy_of_it():
    values = values_by_question(make_grades([[1], [0]], finished=[[0], [0]]))
    assert "accuracy_if_finished" not in values and "first_box_accuracy" not in values


def test_a_ratio_has_the_standard_error_of_a_bootstrap_over_questions():
    generator = np.random.default_rng(1)
    ability_Q = generator.random(400)
    finished_Q_S = generator.random((400, 4)) < 0.3 + 0.6 * ability_Q[:, None]
    right_Q_S = (generator.random((400, 4)) < ability_Q[:, None]) & finished_Q_S
    estimate = estimate_mean(ratio_by_question(right_Q_S.mean(1), finished_Q_S.mean(1)))
    assert estimate.value == pytest.approx(right_Q_S.sum() / finished_Q_S.sum())
    draws = generator.integers(0, 400, (4000, 400))
    ratios = right_Q_S.sum(1)[draws].sum(1) / finished_Q_S.sum(1)[draws].sum(1)
    assert estimate.standard_error == pytest.approx(ratios.std(), rel=0.05)


def test_a_standard_error_is_that_of_a_bootstrap_over_questions():
    generator = np.random.default_rng(2)
    correct_Q_S = generator.random((300, 4)) < generator.random((300, 1))
    estimates = Accuracy.of(make_grades(correct_Q_S)).estimates
    draws = generator.integers(0, 300, (4000, 300))
    assert estimates["accuracy"].standard_error == pytest.approx(correct_Q_S.mean(1)[draws].mean(1).std(), rel=0.05)
    assert estimates["pass@4"].standard_error == pytest.approx(correct_Q_S.any(1)[draws].mean(1).std(), rel=0.05)


def test_paired_difference_by_hand():
    """Differences 1/2, 0, 0, -1/4: mean 1/16; squares 49/256 + 1/256 + 1/256 + 25/256, over 4 x 3."""
    result = paired_difference(np.array([1, 1, 0, 0.25]), np.array([0.5, 1, 0, 0.5]))
    assert (result.difference, result.count) == (pytest.approx(1 / 16), 4)
    assert result.standard_error == pytest.approx(math.sqrt(76 / 256 / 12))


def test_pairing_takes_out_what_the_questions_share():
    generator = np.random.default_rng(3)
    hardness_Q = generator.random(200)
    first_Q, second_Q = hardness_Q + 0.01 * generator.standard_normal((2, 200))
    unpaired = math.hypot(estimate_mean(first_Q).standard_error, estimate_mean(second_Q).standard_error)
    assert paired_difference(first_Q, second_Q).standard_error < 0.1 * unpaired


@pytest.mark.parametrize("pair", [([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[1.0]])])
def test_values_that_do_not_pair(pair):
    with pytest.raises(ValueError, match="both must have one value a question, got shapes"):
        paired_difference(*map(np.array, pair))


def test_in_words():
    one = Accuracy.of(make_grades([[1], [0], [1], [1]], length=[[2], [4], [6], [9]], finished=[[1], [1], [0], [1]]))
    assert str(one) == "accuracy 75.0 +- 25.0 % (n 4), mean length 5.2 tokens, finished 75 %"
    assert str(Accuracy.of(make_grades([[1, 0]]))) == (
        "accuracy (avg@2) 50.0 % (n 1 x 2), mean length 1.0 tokens, finished 100 %"
    )
    assert percent(0.5, 0.125) == "50.0 +- 12.5"
    assert percent(0.5, None) == "50.0"
