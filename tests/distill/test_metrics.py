"""Are the reported numbers those of the step, and does the file survive a crash?  pytest tests/distill/test_metrics.py"""

import json
import math
import os
import time

import pytest
import torch
from tiny_models import EOS, make_rollouts

from esr_distill.json_numbers import finite_or_none
from esr_distill.metrics import MetricsFile, StageClock, check_finite, read_metrics, step_metrics, teacher_first
from esr_distill.prefix_positions import select_prefix_positions
from esr_kernels import DivergenceOutput

CPU = torch.device("cpu")


@pytest.mark.parametrize(("loss", "grad_norm"), [("nan", "1"), ("inf", "1"), ("1", "nan"), ("1", "inf"), ("-inf", "1")])
def test_non_finite_loss_or_gradient(loss, grad_norm):
    message = rf"step 8: loss {loss}.* and gradient norm {grad_norm}.* must be finite; the weights were not changed"
    with pytest.raises(FloatingPointError, match=message):
        check_finite(torch.tensor(float(loss)), torch.tensor(float(grad_norm)), 7)


def test_finite_passes():
    check_finite(torch.tensor(3e38), torch.tensor(0.0), 0)


def test_step_metrics_by_hand():
    """Rollouts of 3 and 2 tokens, the second stopped by EOS; the first 2 tokens of each are scored, 3 of these 4 train."""
    rollouts = make_rollouts([[1, 8], [1]], [[5, 6, 7], [8, EOS]])
    positions = select_prefix_positions(rollouts, 2)
    divergence = DivergenceOutput(
        divergence_N=torch.tensor([1.0, 2.0, 3.0, 6.0], requires_grad=True),
        student_entropy_N=torch.tensor([0.5, 0.5, 1.0, 2.0]),
        teacher_entropy_N=torch.tensor([0.0, 0.5, 0.5, 1.0]),
        student_logprob_N=torch.tensor([-1.0, -1.0, -2.0, -4.0]),
        teacher_logprob_N=torch.tensor([-2.0, -1.0, -5.0, -8.0]),
        top1_agreement_N=torch.tensor([1.0, 0.0, 1.0, 1.0]),
    )
    clock = StageClock(CPU)
    clock.seconds = {"rollout": 0.25, "backward": 0.5}
    weights_N = torch.tensor([1.0, 0.0, 0.25, 1.0])
    record = step_metrics(
        4, torch.tensor(2.5), torch.tensor(0.75), 1e-3, divergence, positions, weights_N, rollouts, 2, clock
    )
    assert record == {
        "kind": "step",
        "step": 5,
        "loss": 2.5,
        "divergence": 3.0,
        "divergence_by_position": {"0-4": 3.0},
        "student_entropy_by_position": {"0-4": 1.0},
        "teacher_entropy_by_position": {"0-4": 0.5},
        "top1_agreement_by_position": {"0-4": 0.75},
        "student_entropy": 1.0,
        "teacher_entropy": 0.5,
        "sampled_reverse_kl": 2.0,
        "top1_agreement": 0.75,
        "late_agreement": 0.5,  # of the second tokens
        "teacher_first_at_least": 0.0,
        "teacher_first_at_most": 0.0,
        "horizon": 2,
        "scored_tokens": 4,
        "trained_tokens": 3,
        "mean_weight": 0.75,
        "response_tokens": 5,
        "longest_rollout": 3,
        "mean_length": 2.5,
        "stopped_by_eos": 0.5,
        "eos_in_prefix": 0.5,
        "stop_density": 0.2,
        "stop_log_ratio": -4.0,
        "grad_norm": 0.75,
        "learning_rate": 1e-3,
        "seconds": 0.75,
        "stage_seconds": {"rollout": 0.25, "backward": 0.5},
        "tokens_per_second": pytest.approx(20 / 3),
    }
    assert json.loads(json.dumps(record)) == record


def divergence_output(count: int, **fields: list[float]) -> DivergenceOutput:
    """Zeros but for the fields that are given."""
    zeros = dict.fromkeys(DivergenceOutput._fields, [0.0] * count)
    return DivergenceOutput(**{name: torch.tensor(value) for name, value in (zeros | fields).items()})


def test_who_watches_a_step_sees_what_its_numbers_are_made_of():
    rollouts, seen = make_rollouts([[1]], [[5, 6]]), []
    positions = select_prefix_positions(rollouts, 2)
    divergence, zero = divergence_output(2), torch.tensor(0.0)
    arguments = 0, zero, zero, 1e-3, divergence, positions, torch.ones(2), rollouts, 2, StageClock(CPU)
    watched = step_metrics(*arguments, lambda *values: seen.append(values))
    assert watched == step_metrics(*arguments)
    ((seen_rollouts, seen_positions, seen_divergence),) = seen
    assert seen_rollouts is rollouts and seen_positions is positions and seen_divergence is divergence


def test_bounds_on_the_share_of_tokens_that_the_teacher_ranks_first():
    """Of (0.7, 0.1, 0.1, 0.1) the first id is likeliest for sure and the second surely is not; of a uniform teacher
    neither can be told; of (0.4, 0.3, 0.2, 0.1) the second id is not the likeliest but could be by what is known of it."""
    distributions = [(0.7, 0.1, 0.1, 0.1), (0.7, 0.1, 0.1, 0.1), (0.25,) * 4, (0.4, 0.3, 0.2, 0.1)]
    drawn = [0, 1, 2, 1]
    entropies = [-sum(q * math.log(q) for q in row) for row in distributions]
    logprobs = [math.log(row[token]) for row, token in zip(distributions, drawn, strict=True)]
    bounds = teacher_first(divergence_output(4, teacher_entropy_N=entropies, teacher_logprob_N=logprobs))
    assert bounds == {"teacher_first_at_least": 0.25, "teacher_first_at_most": 0.75}


def test_the_bounds_hold_for_random_teachers():
    generator = torch.Generator().manual_seed(3)
    logits_N_V = 3 * torch.randn(500, 37, generator=generator)
    teacher_N_V = logits_N_V.log_softmax(-1)
    token_N = torch.multinomial((logits_N_V / 2).softmax(-1), 1, generator=generator)[:, 0]
    divergence = divergence_output(
        500,
        teacher_entropy_N=(-(teacher_N_V.exp() * teacher_N_V).sum(-1)).tolist(),
        teacher_logprob_N=teacher_N_V.gather(1, token_N[:, None])[:, 0].tolist(),
    )
    share = (teacher_N_V.argmax(-1) == token_N).double().mean().item()
    bounds = teacher_first(divergence)
    assert 0.05 < bounds["teacher_first_at_least"] < share < bounds["teacher_first_at_most"] < 0.95


def test_what_is_not_finite_is_none():
    """A position whose weight is 0 may hold anything; the step is none the worse, and its numbers are JSON."""
    rollouts = make_rollouts([[1]], [[5, 6]])
    positions = select_prefix_positions(rollouts, 2)
    divergence = divergence_output(
        2, divergence_N=[1.0, math.inf], student_entropy_N=[math.nan, 1.0], teacher_logprob_N=[-math.inf, -1.0]
    )
    zero, weights_N = torch.tensor(0.0), torch.tensor([1.0, 0.0])
    record = step_metrics(0, zero, zero, 1e-3, divergence, positions, weights_N, rollouts, 2, StageClock(CPU))
    assert record["divergence"] is record["student_entropy"] is record["sampled_reverse_kl"] is None
    assert record["divergence_by_position"] == record["student_entropy_by_position"] == {"0-4": None}
    assert record["stop_log_ratio"] is record["tokens_per_second"] is None  # no stop, no seconds
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (8, 1 / 2),  # tokens 6 and 7, which agree and do not
        (7, 2 / 3),  # 5.25 is rounded down: tokens 5, 6, 7
        (10, 0.0),  # 7.5: token 7
        (4, 3 / 5),  # tokens 3 to 7
        (1, 4 / 11),  # all
        (12, None),  # no rollout came to token 9
    ],
)
def test_the_late_agreement_is_that_of_the_last_quarter_of_the_horizon(horizon, expected):
    """Rollouts of 8 and 3 tokens, counted from 0."""
    rollouts = make_rollouts([[1], [1]], [[5] * 8, [6] * 3])
    positions = select_prefix_positions(rollouts, 8)
    agrees = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0] + [0.0, 0.0, 0.0]
    divergence, zero = divergence_output(11, top1_agreement_N=agrees), torch.tensor(0.0)
    record = step_metrics(
        0, zero, zero, 1e-3, divergence, positions, torch.ones(11), rollouts, horizon, StageClock(CPU)
    )
    assert record["late_agreement"] == (None if expected is None else pytest.approx(expected))


def test_finite_or_none():
    nested = {"a": [1, math.nan, {"b": -math.inf}], "c": "nan", "d": (0.5,), "e": True, "f": None}
    assert finite_or_none(nested) == {"a": [1, None, {"b": None}], "c": "nan", "d": [0.5], "e": True, "f": None}


def test_step_metrics_of_no_position():
    """Nothing is kept: counts are 0, means are None, and nothing is NaN, which JSON does not have."""
    rollouts = make_rollouts([[1]], [[5, 6]])
    positions = select_prefix_positions(rollouts, 2, torch.zeros(1, 2, dtype=torch.bool))
    divergence = DivergenceOutput(*(torch.zeros(0) for _ in DivergenceOutput._fields))
    zero = torch.tensor(0.0)
    record = step_metrics(0, zero, zero, 1e-3, divergence, positions, torch.zeros(0), rollouts, 2, StageClock(CPU))
    assert (record["scored_tokens"], record["trained_tokens"], record["eos_in_prefix"]) == (0, 0, 0.0)
    assert record["divergence"] is record["late_agreement"] is record["mean_weight"] is record["top1_agreement"] is None
    assert record["teacher_first_at_least"] is record["stop_log_ratio"] is None
    assert record["divergence_by_position"] == record["top1_agreement_by_position"] == {}
    json.dumps(record, allow_nan=False)


def test_clock_adds_up_the_stages_also_through_an_error():
    clock = StageClock(CPU)
    for _ in range(2):
        with clock("rollout"):
            time.sleep(0.01)
    with pytest.raises(KeyError), clock("backward"):
        raise KeyError
    assert list(clock.seconds) == ["rollout", "backward"]
    assert 0.02 <= clock.seconds["rollout"] < 1
    assert clock.total == pytest.approx(sum(clock.seconds.values()))


@pytest.fixture
def metrics(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"kind": "evaluation", "step": 0, "accuracy": 0.5})
    for step in (1, 2, 3):
        metrics.write({"kind": "step", "step": step, "loss": 1 / step})
    metrics.write({"kind": "evaluation", "step": 3, "accuracy": 0.75})
    return metrics


def test_one_line_a_record_and_reading_by_kind(metrics):
    assert len(metrics.path.read_text().splitlines()) == 5
    assert [record["step"] for record in read_metrics(metrics.path)] == [0, 1, 2, 3, 3]
    assert [record["loss"] for record in read_metrics(metrics.path, "step")] == [1.0, 0.5, 1 / 3]
    assert [record["accuracy"] for record in read_metrics(metrics.path, "evaluation")] == [0.5, 0.75]


def test_a_line_is_json_whatever_the_record_holds(metrics):
    metrics.write({"kind": "step", "step": 4, "loss": math.nan, "nested": {"a": [math.inf]}})
    last = metrics.path.read_text().splitlines()[-1]
    assert last == '{"kind": "step", "step": 4, "loss": null, "nested": {"a": [null]}}'


def test_no_file(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    MetricsFile(tmp_path / "metrics.jsonl").drop_after(3)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_half_written_last_line_is_left_out_and_later_cut_off(metrics):
    with open(metrics.path, "a") as file:
        file.write('{"kind": "step", "step": 4, "lo')
    assert [record["step"] for record in read_metrics(metrics.path)] == [0, 1, 2, 3, 3]
    metrics.drop_after(3)
    metrics.write({"kind": "step", "step": 4, "loss": 0.25})
    assert [record["step"] for record in read_metrics(metrics.path, "step")] == [1, 2, 3, 4]


def test_drop_after(metrics):
    metrics.drop_after(2)
    assert [(record["kind"], record["step"]) for record in read_metrics(metrics.path)] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
    ]
    assert [path.name for path in metrics.path.parent.iterdir()] == ["metrics.jsonl"]


def test_drop_after_that_fails_leaves_the_file_whole(metrics, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    before = metrics.path.read_text()
    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        metrics.drop_after(1)
    assert metrics.path.read_text() == before
