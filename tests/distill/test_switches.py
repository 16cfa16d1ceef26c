"""Is the loss of a real step the formula that its switches spell: normaliser, selection, gate, temperature, stop ids?

pytest tests/distill/test_switches.py
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from response_logits import response_logits
from rich.console import Console
from small_runs import make_folder, small_config
from tiny_models import make_model
from transformers import PreTrainedModel

from esr_distill.config import LossConfig, RolloutConfig, SelectionConfig, SelectionRule, WeightRule
from esr_distill.rollout import RolloutBatch
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run

BATCH_SIZE = 7
STOP_IDS = [2, 5]  # the student's generation config has the first of them, the teacher's has both


def reverse_kl(p: np.ndarray, q: np.ndarray) -> float:
    """Of the student's p and the teacher's q."""
    return float((p * np.log(p / q)).sum())


def forward_kl(p: np.ndarray, q: np.ndarray) -> float:
    return reverse_kl(q, p)


def jsd(p: np.ndarray, q: np.ndarray) -> float:
    """With 0.3 for the teacher's side."""
    mixture = 0.3 * q + 0.7 * p
    return 0.3 * reverse_kl(q, mixture) + 0.7 * reverse_kl(p, mixture)


def skew_reverse_kl(p: np.ndarray, q: np.ndarray) -> float:
    return reverse_kl(p, 0.9 * q + 0.1 * p)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


def entropy(q: np.ndarray) -> float:
    return float(-(q * np.log(q)).sum())


def every_token(p_T: list[np.ndarray], q_T: list[np.ndarray]) -> list[float]:
    return [1.0] * len(p_T)


def window_of_three(p_T: list[np.ndarray], q_T: list[np.ndarray]) -> list[float]:
    return [float(1 <= t < 4) for t in range(len(p_T))]


def two_least_sure(p_T: list[np.ndarray], q_T: list[np.ndarray]) -> list[float]:
    """The two tokens before which the teacher's entropy is highest, of those after the first."""
    second_highest = sorted((entropy(q) for q in q_T[1:]), reverse=True)[:2]
    return [float(t >= 1 and entropy(q) in second_highest) for t, q in enumerate(q_T)]


def decay_of_the_sure(p_T: list[np.ndarray], q_T: list[np.ndarray]) -> list[float]:
    return [float(np.exp(-0.2 * t)) * (entropy(q) <= 1.5) for t, q in enumerate(q_T)]


def mean_of_means(terms: list[list[float]], counts: list[int]) -> float:
    return sum(sum(row) / max(1, count) for row, count in zip(terms, counts, strict=True)) / BATCH_SIZE


def mean_of_tokens(terms: list[list[float]], counts: list[int]) -> float:
    return sum(map(sum, terms)) / sum(counts)


def mean_of_sums(terms: list[list[float]], counts: list[int]) -> float:
    return sum(map(sum, terms)) / BATCH_SIZE


def sum_over_nine(terms: list[list[float]], counts: list[int]) -> float:
    return sum(map(sum, terms)) / 9


@dataclass(frozen=True)
class Case:
    """The options, and the formula that they spell, in float64 and without the loop's own parts.

    Attributes:
        loss, selection: the options.
        divergence: of p and q, with the gate.
        temperature: by which logits are divided.
        weights: of the tokens of a rollout.
        reduce: weighted divergences by rollout, and how many weights are above 0 in each, to one number.
        is_merged: whether both stop ids are one event.
    """

    loss: LossConfig
    selection: SelectionConfig
    divergence: Callable[[np.ndarray, np.ndarray], float]
    weights: Callable[[list[np.ndarray], list[np.ndarray]], list[float]]
    reduce: Callable[[list[list[float]], list[int]], float]
    temperature: float = 1.0
    is_merged: bool = True


TWO_LEAST_SURE = SelectionConfig(
    [SelectionRule("suffix", start=1), SelectionRule("top", score="teacher_entropy", tokens=2)]
)
CASES = {
    "sequence_mean": Case(LossConfig(), SelectionConfig(), reverse_kl, every_token, mean_of_means),
    "stop ids apart": Case(
        LossConfig(merge_stop_ids=False), SelectionConfig(), reverse_kl, every_token, mean_of_means, is_merged=False
    ),
    "token_mean, window, temperature": Case(
        LossConfig(divergence="forward_kl", normalizer="token_mean", loss_temperature=2.0),
        SelectionConfig([SelectionRule("window", tokens=3, start=1)]),
        forward_kl,
        window_of_three,
        mean_of_tokens,
        temperature=2.0,
    ),
    "token_mean, two rules, one on scores": Case(
        LossConfig(divergence="total_variation", normalizer="token_mean"),
        TWO_LEAST_SURE,
        total_variation,
        two_least_sure,
        mean_of_tokens,
    ),
    "sum, gate, temperature": Case(
        LossConfig(
            normalizer="sum",
            loss_temperature=0.8,
            gated_divergence="forward_kl",
            gate_coefficient=0.6,
            gate_entropy=1.2,
        ),
        SelectionConfig(),
        lambda p, q: reverse_kl(p, q) + 0.6 * forward_kl(p, q) * (entropy(q) > 1.2),
        every_token,
        mean_of_sums,
        temperature=0.8,
    ),
    "sequence_mean, two rules, gate": Case(
        LossConfig(
            divergence="skew_reverse_kl",
            divergence_parameter=0.1,
            gated_divergence="total_variation",
            gate_coefficient=2.5,
            gate_entropy=2.0,
        ),
        TWO_LEAST_SURE,
        lambda p, q: skew_reverse_kl(p, q) + 2.5 * total_variation(p, q) * (entropy(q) > 2.0),
        two_least_sure,
        mean_of_means,
    ),
    "fixed, threshold, weights, gate, temperature": Case(
        LossConfig(
            divergence="jsd",
            divergence_parameter=0.3,
            normalizer="fixed",
            denominator=9.0,
            loss_temperature=0.6,
            gated_divergence="reverse_kl",
            gate_coefficient=0.3,
            gate_entropy=0.7,
        ),
        SelectionConfig(
            [SelectionRule("threshold", score="teacher_entropy", at_most=1.5)], weights=[WeightRule("decay", rate=0.2)]
        ),
        lambda p, q: jsd(p, q) + 0.3 * reverse_kl(p, q) * (entropy(q) > 0.7),
        decay_of_the_sure,
        sum_over_nine,
        temperature=0.6,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("switches")
    make_folder(folder)
    teacher = make_model(1)
    teacher.generation_config.eos_token_id = STOP_IDS
    teacher.save_pretrained(folder / "teacher")
    return folder


def distributions(model: PreTrainedModel, rollouts: RolloutBatch, row: int, case: Case) -> list[np.ndarray]:
    """Of the next token, before each response token of a rollout."""
    p_T_V = np.exp(response_logits(model, rollouts, row)[0] / case.temperature)
    if case.is_merged:
        p_T_V[:, STOP_IDS[0]] += p_T_V[:, STOP_IDS[1]]
        p_T_V = np.delete(p_T_V, STOP_IDS[1], axis=1)
    return list(p_T_V / p_T_V.sum(-1, keepdims=True))


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_step_is_the_formula(folder, name):
    case, seen = CASES[name], []
    rollout = RolloutConfig(horizon=9, batch_size=BATCH_SIZE, sampling_temperature=1.0, top_p=1.0)
    run = prepare_run(
        small_config(folder, "unused", loss=case.loss, selection=case.selection, rollout=rollout), Console(quiet=True)
    )
    student = copy.deepcopy(run.student)
    record = train_step(run, 0, watch=lambda rollouts, *_: seen.append(rollouts))
    (rollouts,) = seen
    assert len(set(rollouts.response_lengths_B.tolist())) > 2

    terms, counts = [], []
    for row in range(BATCH_SIZE):
        p_T, q_T = (distributions(model, rollouts, row, case) for model in (student, run.teacher))
        weights = case.weights(p_T, q_T)
        terms.append([weight * case.divergence(p, q) for weight, p, q in zip(weights, p_T, q_T, strict=True)])
        counts.append(sum(weight > 0 for weight in weights))
    assert record["trained_tokens"] == sum(counts) > 0
    assert record["loss"] == pytest.approx(case.reduce(terms, counts), rel=2e-5)
