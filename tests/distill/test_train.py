"""Does a whole run learn, stay inside the horizon, stop cleanly and resume exactly?  pytest tests/distill/test_train.py"""

import inspect
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import VOCAB_SIZE, make_model, save_pair, write_prompts

import esr_distill.train as train_module
import esr_distill.train_step as train_step_module
import esr_distill.training_run as training_run_module
from esr_distill.checkpoint import find_checkpoints
from esr_distill.config import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from esr_distill.demo.arms import MODELS
from esr_distill.demo.chain_sum import make_problems
from esr_distill.distill_loss import choose_impl
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.rollout import InProcessBackend
from esr_distill.train import train
from esr_kernels import Impl


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def tiny_config(folder: Path, name: str = "run", steps: int = 6, **groups) -> TrainConfig:
    """A few steps on a random pair of 2 layers."""
    if not (folder / "prompts.jsonl").exists():
        save_pair(folder)
        write_prompts(folder / "prompts.jsonl", count=20)
    defaults = {
        "rollout": RolloutConfig(horizon=5, batch_size=4, sampling_temperature=1.0, top_p=1.0),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "run": RunConfig(output_dir=str(folder / name), steps=steps, save_every=100, keep_checkpoints=9),
    }
    return TrainConfig(
        model=ModelConfig(str(folder / "student"), str(folder / "teacher"), device="cpu"),
        data=DataConfig(str(folder / "prompts.jsonl"), chat_template=False),
        **(defaults | groups),
    )


def losses(config: TrainConfig) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "step")]


def interrupt_after(step: int, monkeypatch) -> None:
    """Send this process SIGINT during step `step`, as Ctrl-C does."""
    original = train_module.train_step

    def interrupted_step(run, index, *rest):
        if index + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, index, *rest)

    monkeypatch.setattr(train_module, "train_step", interrupted_step)


def record_rollouts(monkeypatch, seen: list) -> None:
    draw = InProcessBackend.generate

    def recording(*arguments):
        seen.append(draw(*arguments))
        return seen[-1]

    monkeypatch.setattr(InProcessBackend, "generate", recording)


def test_the_embedded_pair_learns_and_respects_the_horizon(tmp_path, console, monkeypatch):
    problems = make_problems("rewrite", 32, 0, 7, 7)
    write_prompts(tmp_path / "prompts.jsonl", texts=[problem.prompt for problem in problems])
    rollouts_seen = []

    record_rollouts(monkeypatch, rollouts_seen)
    config = TrainConfig(
        model=ModelConfig(str(MODELS / "rewrite" / "student"), str(MODELS / "rewrite" / "teacher"), device="cpu"),
        data=DataConfig(str(tmp_path / "prompts.jsonl"), chat_template=False),
        rollout=RolloutConfig(horizon=8, batch_size=32, sampling_temperature=1.0, top_p=1.0),
        optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=0.0, schedule="constant", warmup_fraction=0.0),
        loss=LossConfig(normalizer="token_mean"),
        run=RunConfig(output_dir=str(tmp_path / "run"), steps=20),
    )
    train(config, console)

    loss = losses(config)
    assert sum(loss[-3:]) < 0.8 * sum(loss[:3])
    records = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(rollouts_seen) == len(records) == 20
    for rollouts, record in zip(rollouts_seen, records, strict=True):
        # A whole reply has 51 tokens, so every rollout is cut at the horizon and trains exactly that many rows.
        assert rollouts.response_ids_B_K.shape[1] == 8
        assert rollouts.response_lengths_B.tolist() == [8] * 32
        assert record["trained_tokens"] == 32 * 8


def test_a_run_interrupted_and_resumed_has_the_same_losses_and_weights(tmp_path, console, monkeypatch):
    whole = tiny_config(tmp_path, "whole")
    halted = tiny_config(tmp_path, "halted")
    assert train(whole, console).finished
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        result = train(halted, console)
    assert not result.finished and result.step == 3
    assert len(losses(halted)) == 3

    result = train(halted, console, resume=True)
    assert result.finished and result.step == 6
    assert losses(halted) == losses(whole)
    weights = [load_file(find_checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("whole", "halted")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_forgets_what_was_logged_after_the_checkpoint(tmp_path, console, monkeypatch):
    config = tiny_config(tmp_path, run=RunConfig(output_dir=str(tmp_path / "run"), steps=6, save_every=2))

    def crash(run, step, horizon):
        if step == 3:
            raise RuntimeError("power failure")
        return original(run, step, horizon)

    original = train_module.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", crash)
        with pytest.raises(RuntimeError, match="power failure"):
            train(config, console)
    assert len(losses(config)) == 3  # step 3 was logged, the newest checkpoint is of step 2
    train(config, console, resume=True)
    assert len(losses(config)) == 6
    train(tiny_config(tmp_path, "whole"), console)
    assert losses(config) == losses(tiny_config(tmp_path, "whole"))


def test_resuming_with_other_prompts_is_refused(tmp_path, console):
    config = tiny_config(tmp_path, run=RunConfig(output_dir=str(tmp_path / "run"), steps=1))
    train(config, console)
    write_prompts(tmp_path / "prompts.jsonl", count=21)
    longer = replace(config, run=replace(config.run, steps=2))
    with pytest.raises(InputError, match=r"data\.prompts must hold the prompts that the run began with"):
        train(longer, console, resume=True)


def test_a_checkpoint_stops_at_every_id_that_training_took_for_a_stop(tmp_path, console):
    config = tiny_config(tmp_path, steps=1)
    teacher = make_model(seed=1)
    teacher.generation_config.eos_token_id = [5, 2]
    teacher.save_pretrained(tmp_path / "teacher")
    result = train(config, console)
    saved = json.loads((result.checkpoint / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 5]


def test_a_finished_run_resumed_changes_nothing(tmp_path, console):
    config = tiny_config(tmp_path, steps=2)
    first = train(config, console)
    again = train(config, console, resume=True)
    assert again == first and len(losses(config)) == 2


def test_another_runs_folder_is_refused(tmp_path, console):
    config = tiny_config(tmp_path, steps=1)
    train(config, console)
    with pytest.raises(InputError, match=r"run\.output_dir must not hold another run's checkpoints.*--resume"):
        train(config, console)


def test_resuming_without_a_checkpoint_is_refused(tmp_path, console):
    with pytest.raises(InputError, match="--resume must name the folder of a run with a checkpoint"):
        train(tiny_config(tmp_path), console, resume=True)


def test_a_loss_masked_full_rollout_generates_all_and_trains_the_prefix(tmp_path, console):
    config = tiny_config(
        tmp_path,
        steps=2,
        rollout=RolloutConfig(horizon=20, batch_size=4, sampling_temperature=1.0, top_p=1.0),
        loss=LossConfig(prefix_tokens=3),
    )
    train(config, console)
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "step"):
        assert record["longest_rollout"] > 3
        assert record["trained_tokens"] <= 4 * 3


def test_a_padded_teacher_head_is_cut_and_surplus_ids_are_never_drawn(tmp_path, console, monkeypatch):
    """Student with 3 surplus ids, teacher with 5, tokenizer with 19: everything happens on the first 19."""
    config = tiny_config(tmp_path, steps=2)
    for role, width in (("student", VOCAB_SIZE + 3), ("teacher", VOCAB_SIZE + 5)):
        make_model(seed=width, vocab_size=width).save_pretrained(tmp_path / role)
    with pytest.raises(InputError, match="vocabulary size 22, got 24; .* set loss.vocab_size to 22 or less"):
        train(config, console)
    seen = []

    record_rollouts(monkeypatch, seen)
    train(replace(config, loss=LossConfig(vocab_size=VOCAB_SIZE)), console)
    assert len(seen) == 2
    assert all(int(rollouts.response_ids_B_K.max()) < VOCAB_SIZE for rollouts in seen)


@pytest.mark.parametrize("precision", [{"autocast": True}, {"dtype": "bfloat16"}])
def test_a_run_in_16_bits(tmp_path, console, precision):
    config = tiny_config(tmp_path, steps=2)
    train(replace(config, model=replace(config.model, teacher_dtype="bfloat16", **precision)), console)
    assert all(0 < loss < 100 for loss in losses(config))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # -inf - -inf, no warning on a GPU
@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean"])
def test_the_fused_kernels_train_the_same_student(tmp_path, console, monkeypatch, normalizer):
    """On a CPU the kernels run in Triton's interpreter, which tests/conftest.py asks for."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    loss = LossConfig(normalizer=normalizer)
    reference = tiny_config(tmp_path, "reference", steps=3, loss=loss)
    fused = tiny_config(tmp_path, "fused", steps=3, loss=loss)
    train(reference, console)
    monkeypatch.setattr(training_run_module, "choose_impl", lambda device: Impl.FUSED)
    train(fused, console)
    assert losses(fused) == pytest.approx(losses(reference), rel=1e-5)
    assert losses(fused)[0] > 1e-3


def test_the_implementation_of_the_divergence_is_printed(tmp_path):
    console = Console(record=True, width=200)
    train(tiny_config(tmp_path, steps=1), console)
    assert "divergence: reference (plain PyTorch: the kernels need a CUDA device)" in console.export_text()


@pytest.mark.parametrize("device, expected", [("cuda", Impl.FUSED), ("cpu", Impl.REFERENCE)])
def test_the_kernels_are_chosen_where_they_run(device, expected):
    assert choose_impl(torch.device(device)) is expected


def test_accuracy_is_recorded_before_during_and_after(tmp_path, console):
    config = tiny_config(tmp_path, steps=5)
    config = replace(
        config,
        evaluation=EvaluationConfig(
            str(tmp_path / "prompts.jsonl"), every=2, scorer="last_number", max_tokens=6, limit=8
        ),
    )
    train(config, console)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl", "evaluation")
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    assert all(record["count"] == 8 for record in records)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, console, monkeypatch):
    config = tiny_config(tmp_path, steps=3, run=RunConfig(output_dir=str(tmp_path / "run"), steps=3, save_every=1))
    original = train_module.train_step

    def poisoned(run, step, horizon):
        if step == 1:
            with torch.no_grad():
                run.teacher.get_output_embeddings().weight[0, 0] = torch.nan
        return original(run, step, horizon)

    monkeypatch.setattr(train_module, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="step 2: loss nan .* must be finite"):
        train(config, console)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-000001"]


def test_the_training_step_fits_one_screen():
    source = inspect.getsource(train_step_module)
    assert len(source.splitlines()) <= 64
