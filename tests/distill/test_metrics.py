"""Are the reported numbers those of the step, and does the file survive a crash?  pytest tests/distill/test_metrics.py"""

import json
import os
import time

import pytest
import torch
from tiny_models import EOS, make_rollouts

from esr_distill.metrics import MetricsFile, StageClock, check_finite, mean_by_position, read_metrics, step_metrics
from esr_distill.prefix_positions import select_prefix_positions
from esr_kernels import DivergenceOutput

CPU = torch.device("cpu")


def test_bins_by_hand():
    slots = [0, 4, 5, 9, 10, 24, 25, 49, 99, 100, 199, 2000, 5000]
    values = [1.0, 3.0, 2.0, 4.0, 10.0, 20.0, 7.0, 9.0, 6.0, 1.0, 2.0, 5.0, 7.0]
    assert mean_by_position(torch.tensor(values), torch.tensor(slots)) == {
        "0-4": 2.0,
        "5-9": 3.0,
        "10-24": 15.0,
        "25-49": 8.0,
        "50-99": 6.0,
        "100-199": 1.5,
        "2000+": 6.0,
    }


def test_every_slot_is_in_one_bin():
    slots = torch.arange(2500)
    total = 0
    for name in mean_by_position(torch.ones(2500), slots):
        first, _, last = name.rstrip("+").partition("-")
        total += (int(last) if last else 2499) - int(first) + 1
    assert total == 2500


@pytest.mark.parametrize(("loss", "grad_norm"), [("nan", "1"), ("inf", "1"), ("1", "nan"), ("1", "inf"), ("-inf", "1")])
def test_non_finite_loss_or_gradient(loss, grad_norm):
    message = rf"step 8: loss {loss}.* and gradient norm {grad_norm}.* must be finite; the weights were not changed"
    with pytest.raises(FloatingPointError, match=message):
        check_finite(torch.tensor(float(loss)), torch.tensor(float(grad_norm)), 7)


def test_finite_passes():
    check_finite(torch.tensor(3e38), torch.tensor(0.0), 0)


def test_step_metrics_by_hand():
    """Rollouts of 3 and 2 tokens, the second stopped by EOS; the first 2 tokens of each train."""
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
    record = step_metrics(4, torch.tensor(2.5), torch.tensor(0.75), 1e-3, divergence, positions, rollouts, clock)
    assert record == {
        "kind": "step",
        "step": 5,
        "loss": 2.5,
        "divergence": 3.0,
        "divergence_by_position": {"0-4": 3.0},
        "student_entropy": 1.0,
        "teacher_entropy": 0.5,
        "sampled_reverse_kl": 2.0,
        "top1_agreement": 0.75,
        "trained_tokens": 4,
        "response_tokens": 5,
        "longest_rollout": 3,
        "mean_length": 2.5,
        "stopped_by_eos": 0.5,
        "grad_norm": 0.75,
        "learning_rate": 1e-3,
        "seconds": 0.75,
        "stage_seconds": {"rollout": 0.25, "backward": 0.5},
    }
    assert json.loads(json.dumps(record)) == record


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
