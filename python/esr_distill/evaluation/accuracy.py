"""Accuracy of k samples a question with its standard error, and the difference of two models on the same questions.

Each measure is a mean over questions of one value a question, x_1 .. x_Q. Samples of a question are not independent, questions
are, so the question is the unit (a cluster, Miller 2024, arXiv 2411.00640), and the standard error of the mean is that of the
values between questions:

    SE = sqrt( sum_q (x_q - mean)^2 / (Q (Q - 1)) )

It holds the noise of sampling too, as it shows between questions. With one question it is unknown (None).
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

from esr_distill.evaluation.grades import Grades


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its standard error, None where there is one question only."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on `count` questions with `samples_per_problem` replies (k) to each.

    Attributes:
        accuracy: avg@k, share of replies with the right answer (of a boxed scorer: in the last box).
        standard_error: Its standard error, clustered by question; None with one question.
        count: Questions.
        samples_per_problem: k.
        mean_length: Mean reply length in tokens.
        finished: Share of replies that ended by EOS within the limit.
        estimates: These and all other measures of `values_by_question` with their standard errors.
    """

    accuracy: float
    standard_error: float | None
    count: int
    samples_per_problem: int
    mean_length: float
    finished: float
    estimates: dict[str, Estimate]

    @classmethod
    def of(cls, grades: Grades) -> "Accuracy":
        estimates = {name: estimate_mean(value_Q) for name, value_Q in values_by_question(grades).items()}
        count, num_samples = grades.correct_Q_S.shape
        return cls(
            accuracy=estimates["accuracy"].value,
            standard_error=estimates["accuracy"].standard_error,
            count=count,
            samples_per_problem=num_samples,
            mean_length=estimates["mean_length"].value,
            finished=estimates["finished"].value,
            estimates=estimates,
        )

    def record(self) -> dict:
        """All of it as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        k = self.samples_per_problem
        name, count = ("accuracy", f"n {self.count}") if k == 1 else (f"accuracy (avg@{k})", f"n {self.count} x {k}")
        return (
            f"{name} {percent(self.accuracy, self.standard_error)} % ({count}), "
            f"mean length {self.mean_length:.1f} tokens, finished {100 * self.finished:.0f} %"
        )


@dataclass(frozen=True)
class PairedDifference:
    """Mean over questions of a difference, its standard error (None with one question), and the number of questions."""

    difference: float
    standard_error: float | None
    count: int


def estimate_mean(value_Q: np.ndarray) -> Estimate:
    """Mean of one value a question, and its standard error by the formula above."""
    count = len(value_Q)
    standard_error = float(np.std(value_Q, ddof=1) / math.sqrt(count)) if count > 1 else None
    return Estimate(float(np.mean(value_Q)), standard_error)


def paired_difference(first_Q: np.ndarray, second_Q: np.ndarray) -> PairedDifference:
    """First minus second, question by question: SE = sqrt( sum_q (d_q - mean)^2 / (Q (Q - 1)) ) with d_q = first_q - second_q.

    What both find hard or easy cancels, so it is smaller than sqrt(SE_1^2 + SE_2^2) where their values go together.

    Raises:
        ValueError: not one value a question in both.
    """
    first_Q, second_Q = np.asarray(first_Q, dtype=np.float64), np.asarray(second_Q, dtype=np.float64)
    if first_Q.shape != second_Q.shape or first_Q.ndim != 1 or len(first_Q) == 0:
        raise ValueError(f"both must have one value a question, got shapes {first_Q.shape} and {second_Q.shape}")
    estimate = estimate_mean(first_Q - second_Q)
    return PairedDifference(estimate.value, estimate.standard_error, len(first_Q))


def pass_at(k: int, num_correct: int, num_samples: int) -> float:
    """Chance that k of the samples, drawn without putting back, hold a correct one: 1 - C(n - c, k) / C(n, k).

    Over the samples its mean is 1 - (1 - p)^k, the chance that k fresh ones do: unbiased (Chen et al. 2021, arXiv 2107.03374,
    equation 1).
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"1 <= k <= samples and 0 <= correct <= samples must hold, got {k}, {num_correct}, {num_samples}"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def ratio_by_question(numerator_Q: np.ndarray, denominator_Q: np.ndarray) -> np.ndarray:
    """Values whose mean is R = sum of numerators / sum of denominators and whose standard error is that of R to first order:
    R + (numerator_q - R denominator_q) / (mean of denominators)."""
    ratio = numerator_Q.sum() / denominator_Q.sum()
    return ratio + (numerator_Q - ratio * denominator_Q) / denominator_Q.mean()


def values_by_question(grades: Grades) -> dict[str, np.ndarray]:
    """One value a question for each measure; its mean is the measure.

    - accuracy: avg@k, share of a question's samples that are right.
    - majority: maj@k, whether the answer that most samples gave is right; ties and missing answers as in `majority`.
    - pass@1 .. pass@k: `pass_at`.
    - last_box_accuracy (the same as accuracy) and first_box_accuracy: for boxed scorers.
    - finished: share of replies that ended by EOS within the limit.
    - accuracy_if_finished: right and finished replies over finished ones, all questions together (`ratio_by_question`); left
      out where none is finished.
    - mean_length: tokens, EOS included.
    - repetition: share of replies whose last three tokens occur more than 10 times in them.
    """
    num_correct_Q, num_samples = grades.correct_Q_S.sum(1), grades.correct_Q_S.shape[1]
    values = {
        "accuracy": grades.correct_Q_S.mean(1),
        "majority": grades.majority_correct_Q.astype(np.float64),
    }
    for k in range(1, num_samples + 1):
        by_count = np.array([pass_at(k, num_correct, num_samples) for num_correct in range(num_samples + 1)])
        values[f"pass@{k}"] = by_count[num_correct_Q]
    if grades.first_box_correct_Q_S is not None:
        values["last_box_accuracy"] = grades.correct_Q_S.mean(1)
        values["first_box_accuracy"] = grades.first_box_correct_Q_S.mean(1)
    values["finished"] = grades.finished_Q_S.mean(1)
    if grades.finished_Q_S.any():
        right_Q = (grades.correct_Q_S & grades.finished_Q_S).mean(1)
        values["accuracy_if_finished"] = ratio_by_question(right_Q, grades.finished_Q_S.mean(1))
    values["mean_length"] = grades.length_Q_S.mean(1)
    values["repetition"] = grades.repetitive_Q_S.mean(1)
    return values


def percent(share: float, standard_error: float | None) -> str:
    """A share and its standard error in percent: "62.5 +- 3.1", or "62.5" where the error is unknown."""
    return f"{100 * share:.1f}" + ("" if standard_error is None else f" +- {100 * standard_error:.1f}")
