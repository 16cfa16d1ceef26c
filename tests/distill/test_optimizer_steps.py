"""Do real steps clip, decay and move the weights as AdamW is written, at the rates that the schedule names?

pytest tests/distill/test_optimizer_steps.py
"""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_runs import make_folder, small_config

from esr_distill.config import OptimizerConfig
from esr_distill.train_step import train_step
from esr_distill.training_run import TrainingRun, prepare_run

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("optimizer")
    make_folder(folder)
    return folder


def run_of(folder: Path, steps: int, optimizer: OptimizerConfig) -> TrainingRun:
    return prepare_run(small_config(folder, "unused", steps, optimizer=optimizer), Console(quiet=True))


def weights_of(run: TrainingRun) -> Arrays:
    """A copy in float64."""
    return {name: weight.detach().double().numpy() for name, weight in run.student.named_parameters()}


def gradients_as_they_come(run: TrainingRun) -> Arrays:
    """Filled by each backward, before anything is clipped."""
    gradients: Arrays = {}
    for name, weight in run.student.named_parameters():

        def keep(weight, name=name) -> None:
            gradients[name] = weight.grad.double().numpy()

        weight.register_post_accumulate_grad_hook(keep)
    return gradients


def adamw(weights: Arrays, gradients: list[Arrays], rates: list[float], config: OptimizerConfig) -> Arrays:
    """Algorithm 2 of arXiv 1711.05101 with epsilon 1e-8 and a decay of rate times weight_decay, after all gradients of a step
    were scaled down to one norm."""
    beta1, beta2 = config.betas
    mean, square = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        scale = min(1.0, config.max_grad_norm / norm_of(gradient))
        for name in weights:
            mean[name] = beta1 * mean[name] + (1 - beta1) * scale * gradient[name]
            square[name] = beta2 * square[name] + (1 - beta2) * (scale * gradient[name]) ** 2
            move = mean[name] / (1 - beta1**step) / (np.sqrt(square[name] / (1 - beta2**step)) + 1e-8)
            weights = weights | {name: weights[name] - rate * (move + config.weight_decay * weights[name])}
    return weights


def norm_of(gradient: Arrays) -> float:
    return float(np.sqrt(sum((values**2).sum() for values in gradient.values())))


@pytest.mark.parametrize(("max_grad_norm", "is_clipped"), [(0.02, True), (1e6, False)], ids=["clipped", "not clipped"])
def test_two_steps_are_adamw_by_hand(folder, max_grad_norm, is_clipped):
    """No option has its default. Half of two steps is warm-up, so the rates are half the peak and the peak."""
    optimizer = OptimizerConfig(
        learning_rate=0.01, betas=(0.6, 0.7), weight_decay=0.3, max_grad_norm=max_grad_norm, warmup_fraction=0.5
    )
    run = run_of(folder, 2, optimizer)
    before, seen, gradients = weights_of(run), gradients_as_they_come(run), []
    for step in range(2):
        record = train_step(run, step)
        gradients.append(dict(seen))
        assert record["grad_norm"] == pytest.approx(norm_of(gradients[-1]), rel=1e-5)
        assert (record["grad_norm"] > max_grad_norm) == is_clipped
    expected = adamw(before, gradients, [0.005, 0.01], optimizer)
    for name, weight in weights_of(run).items():
        # weights are below 4 and have 24 bits; a step moves most of them by about 0.01
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=1e-6, err_msg=name)


# Of the peak; the first two of six steps warm up. Half a cosine: (1 + cos(pi done)) / 2 at done = 0, 1/4, 1/2, 3/4.
RATES = {
    "cosine": [1 / 3, 2 / 3, 1, 0.85355339, 0.5, 0.14644661],
    "linear": [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25],
    "constant": [1 / 3, 2 / 3, 1, 1, 1, 1],
}


@pytest.mark.parametrize("schedule", RATES)
def test_weights_move_by_the_rate_of_the_schedule(folder, schedule):
    """With both betas 0 AdamW divides each gradient by its own size, so every weight that has one moves by just the rate."""
    peak = 0.003
    run = run_of(
        folder, 6, OptimizerConfig(peak, betas=(0.0, 0.0), weight_decay=0.0, schedule=schedule, warmup_fraction=1 / 3)
    )
    moves, told = [], []
    for step in range(6):
        before = weights_of(run)
        told.append(train_step(run, step)["learning_rate"])
        moves.append(max(np.abs(weight - before[name]).max() for name, weight in weights_of(run).items()))
    expected = [peak * rate for rate in RATES[schedule]]
    assert moves == pytest.approx(expected, rel=1e-3)
    assert told == pytest.approx(expected, rel=1e-6)
