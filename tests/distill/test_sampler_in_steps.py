"""Do the rollouts of a real step come from the distribution that the options of rollout describe?

pytest tests/distill/test_sampler_in_steps.py
"""

import copy
from pathlib import Path

import numpy as np
import pytest
from response_logits import response_logits
from rich.console import Console
from small_runs import make_folder, small_config
from transformers import PreTrainedModel

from esr_distill.config import OptimizerConfig, RolloutConfig
from esr_distill.rollout import RolloutBatch
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run

HORIZON, BATCH_SIZE, STEPS = 11, 7, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sampler")
    make_folder(folder)
    return folder


def drawn_in_steps(folder: Path, **sampler) -> list[tuple[PreTrainedModel, RolloutBatch]]:
    """The rollouts of each step, and the student as it was then. It changes much: a sampler of old weights would show."""
    rollout = RolloutConfig(HORIZON, BATCH_SIZE, **({"sampling_temperature": 1.0, "top_p": 1.0} | sampler))
    config = small_config(folder, "unused", rollout=rollout, optimizer=OptimizerConfig(learning_rate=0.02))
    run, drawn = prepare_run(config, Console(quiet=True)), []
    for step in range(STEPS):
        student = copy.deepcopy(run.student)
        train_step(run, step, watch=lambda rollouts, *_, student=student: drawn.append((student, rollouts)))
    return drawn


def logits_and_tokens(drawn: list[tuple[PreTrainedModel, RolloutBatch]]) -> list[tuple[np.ndarray, int, float]]:
    """Of each response token: the logits that the whole model has for it, its id, and the log-prob that the sampler says it was
    drawn with."""
    found = []
    for student, rollouts in drawn:
        for row, length in enumerate(rollouts.response_lengths_B.tolist()):
            logits_T_V, tokens = response_logits(student, rollouts, row)
            logprobs = rollouts.sampling_logprobs_B_K[row, :length].tolist()
            found.extend(zip(logits_T_V, tokens, logprobs, strict=True))
    return found


def softmax(logits_V: np.ndarray) -> np.ndarray:
    exponentials_V = np.exp(logits_V - logits_V.max())
    return exponentials_V / exponentials_V.sum()


def highest(probabilities_V: np.ndarray, count: int) -> np.ndarray:
    """Probabilities of the `count` likeliest, 0 for the others, not yet divided by their sum."""
    return np.where(np.isin(np.arange(len(probabilities_V)), np.argsort(-probabilities_V)[:count]), probabilities_V, 0)


def nucleus(probabilities_V: np.ndarray, top_p: float) -> np.ndarray:
    cumulative = np.cumsum(np.sort(probabilities_V)[::-1])
    return highest(probabilities_V, 1 + int((cumulative < top_p).sum()))


# Options, and what they leave of the probabilities at temperature 1 of 19 ids.
SAMPLERS = {
    "top_k": ({"top_k": 3}, lambda logits_V: highest(softmax(logits_V), 3)),
    "top_p": ({"top_p": 0.4}, lambda logits_V: nucleus(softmax(logits_V), 0.4)),
    "min_p": ({"min_p": 0.3}, lambda logits_V: (p_V := softmax(logits_V)) * (p_V >= 0.3 * p_V.max())),
    "temperature": ({"sampling_temperature": 1.7}, lambda logits_V: softmax(logits_V / 1.7)),
    "temperature, then top_k, then top_p": (
        {"sampling_temperature": 0.5, "top_k": 5, "top_p": 0.7},
        # the nucleus is one of what top_k left
        lambda logits_V: nucleus((five_V := highest(softmax(logits_V / 0.5), 5)) / five_V.sum(), 0.7),
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_tokens_come_from_what_the_options_leave(folder, name):
    options, probabilities = SAMPLERS[name]
    tokens = logits_and_tokens(drawn_in_steps(folder, **options))
    assert len(tokens) > BATCH_SIZE * STEPS
    for logits_V, token, logprob in tokens:
        left_V = probabilities(logits_V)
        assert left_V[token] > 0
        assert logprob == pytest.approx(np.log(left_V[token] / left_V.sum()), abs=1e-4)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_without_the_option_other_tokens_are_drawn(folder, name):
    """So that the test before could fail."""
    _, probabilities = SAMPLERS[name]
    tokens = logits_and_tokens(drawn_in_steps(folder))
    excluded = sum(probabilities(logits_V)[token] == 0 for logits_V, token, _ in tokens)
    assert excluded > len(tokens) / 10


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"sampling_temperature": 0.0}], ids=str)
def test_one_token_left_is_greedy(folder, options):
    tokens = logits_and_tokens(drawn_in_steps(folder, **options))
    assert [token for _, token, _ in tokens] == [int(logits_V.argmax()) for logits_V, _, _ in tokens]
