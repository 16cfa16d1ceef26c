"""Steps without a kept token, batches of one, and SIGTERM.  pytest tests/distill/test_train_edges.py"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_command_line import train_arguments
from test_train import losses, tiny_config
from tiny_models import save_pair, write_prompts

from esr_distill.config import LossConfig, OptimizerConfig, RolloutConfig, SelectionConfig, SelectionRule, WeightRule
from esr_distill.metrics import read_metrics
from esr_distill.train import train
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run

NONE_BY_POSITION = SelectionConfig(rules=[SelectionRule("suffix", start=1000)])
NONE_BY_SCORE = SelectionConfig(rules=[SelectionRule("threshold", score="teacher_entropy", at_least=1e9)])


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("selection", [NONE_BY_POSITION, NONE_BY_SCORE], ids=["no position", "no weight"])
@pytest.mark.parametrize("normalizer", ["sequence_mean", "token_mean", "sum", "fixed"])
def test_a_step_without_a_kept_token(tmp_path, console, selection, normalizer):
    """Loss 0, gradient 0, no number that JSON lacks; without weight decay the weights stay to the bit."""
    loss = LossConfig(normalizer=normalizer, denominator=3.0 if normalizer == "fixed" else None)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    config = tiny_config(tmp_path, steps=2, loss=loss, selection=selection, optimizer=optimizer)
    run = prepare_run(config, console)
    before = [parameter.clone() for parameter in run.student.parameters()]
    records = [train_step(run, step) for step in range(2)]
    for record in records:
        assert (record["loss"], record["grad_norm"], record["trained_tokens"]) == (0.0, 0.0, 0)
        assert record["mean_weight"] is None and record["eos_in_prefix"] == 0.0
        json.dumps(record, allow_nan=False)
    assert all(torch.equal(old, new) for old, new in zip(before, run.student.parameters(), strict=True))
    nothing_scored = selection is NONE_BY_POSITION
    assert records[0]["scored_tokens"] == (0 if nothing_scored else records[0]["response_tokens"])
    assert (records[0]["divergence"] is None) == nothing_scored
    assert records[0]["divergence_by_position"] == {} or not nothing_scored


def test_a_run_goes_on_through_steps_without_a_kept_token(tmp_path, console):
    """All rules and weights on no token, samples on; the run ends and leaves a checkpoint."""
    rules = [
        SelectionRule("token_ids", token_ids=[18]),  # an id that is hardly ever drawn
        SelectionRule("suffix", start=1000),
        SelectionRule("top", score="tip", share=0.5, scope="batch"),
        SelectionRule("divergence_share", share=0.5),
        SelectionRule("rows", score="divergence", share=0.5),
    ]
    weights = [WeightRule("prefix_ratio", rate=0.5), WeightRule("decay", rate=0.1)]
    selection = SelectionConfig(rules=rules, weights=weights, rescale_weights=True)
    loss = LossConfig(gated_divergence="forward_kl", gate_coefficient=1.0, gate_entropy=0.1)
    config = tiny_config(tmp_path, steps=3, selection=selection, loss=loss)
    config = replace(config, monitoring=replace(config.monitoring, samples_every=1))
    assert train(config, console).finished
    assert losses(config) == [0.0] * 3
    rows = read_metrics(Path(config.run.output_dir) / "samples.jsonl")
    assert len(rows) == 12 and all(row["divergence"] is None and row["scored_tokens"] == 0 for row in rows)


def test_a_batch_of_one(tmp_path, console):
    rollout = RolloutConfig(horizon=1, batch_size=1, sampling_temperature=1.0, top_p=1.0)
    config = tiny_config(tmp_path, steps=3, rollout=rollout)
    assert train(config, console).finished
    for record in read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "step"):
        assert record["trained_tokens"] == record["response_tokens"] == 1
        assert record["loss"] == record["divergence"] > 0


def test_a_sigterm_in_the_shell_leaves_a_resumable_run(tmp_path):
    """As schedulers send it, to the real command in its own process, with samples and a probe, once it has logged a step.

    SIGINT: test_command_line.py."""
    save_pair(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", count=12)
    options = {"monitoring__samples_every": "1", "monitoring__probe_every": "2", "monitoring__probe_tokens": "6"}
    arguments = train_arguments(tmp_path, run__steps="100000", monitoring__probe_prompts="2", **options)
    command = [sys.executable, "-m", "esr_distill.command_line", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"kind": "step"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = output.splitlines()
    assert "stopping after this step or evaluation; once more stops at once" in lines
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    done = int(checkpoint.name.split("-")[1])
    assert lines[-1] == f"stopped after step {done}; go on with: esr-distill train --resume {tmp_path / 'run'}"
    assert len(read_metrics(metrics, "step")) == done
