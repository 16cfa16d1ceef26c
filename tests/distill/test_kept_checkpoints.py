"""Which checkpoints stay: the newest and the best, never half of one?  pytest tests/distill/test_kept_checkpoints.py"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_train import tiny_config

import esr_distill.train as train_module
from esr_distill.config import EvaluationConfig, RunConfig
from esr_distill.input_error import InputError
from esr_distill.kept_checkpoints import (
    best_checkpoint,
    evaluation_at,
    find_checkpoints,
    latest_checkpoint,
    remove_checkpoints,
)
from esr_distill.train import train


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints, of which step 3 was not evaluated; 2 and 4 are equally good, 0 is the untrained student."""
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
        (tmp_path / f"checkpoint-{step:06d}" / "weights").write_text(str(step))
    accuracies = {0: 0.9, 1: 0.25, 2: 0.75, 4: 0.75, 5: 0.5}
    records = [{"kind": "evaluation", "step": step, "accuracy": value} for step, value in accuracies.items()]
    records += [{"kind": "step", "step": step, "loss": 1.0} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def names(folder: Path) -> list[int]:
    return [int(path.name[-6:]) for path in find_checkpoints(folder)]


def test_the_best_is_the_highest_and_the_first_of_equal_ones(folder):
    assert best_checkpoint(folder, "accuracy").name == "checkpoint-000002"
    assert evaluation_at(folder, 4)["accuracy"] == 0.75 and evaluation_at(folder, 3) is None
    shutil.rmtree(folder / "checkpoint-000002")
    assert best_checkpoint(folder, "accuracy").name == "checkpoint-000004"
    (folder / "metrics.jsonl").unlink()
    assert best_checkpoint(folder, "accuracy") is None


@pytest.mark.parametrize(
    ("newest", "keep_best", "expected"),
    [
        (1, None, [5]),
        (2, None, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (1, "accuracy", [2, 5]),
        (4, "accuracy", [2, 3, 4, 5]),
    ],
)
def test_what_stays(folder, newest, keep_best, expected):
    remove_checkpoints(folder, newest=newest, keep_best=keep_best)
    assert names(folder) == expected
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint(folder, monkeypatch):
    def killed(path, *_, **__):
        (Path(path) / "weights").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoints(folder, newest=3, keep_best=None)
    assert names(folder) == [3, 4, 5]
    assert all((path / "weights").exists() for path in find_checkpoints(folder))
    remove_checkpoints(folder, newest=3, keep_best=None)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_latest(folder, tmp_path):
    assert latest_checkpoint(folder).name == "checkpoint-000005"
    with pytest.raises(InputError, match="--resume must name the folder of a run with a checkpoint"):
        latest_checkpoint(tmp_path / "nothing")


def test_a_run_keeps_its_best_through_a_resume(tmp_path, monkeypatch):
    """Accuracies that rise and fall, put in where evaluation writes its own."""
    accuracies = {0: 0.0, 1: 0.2, 2: 0.8, 3: 0.6, 4: 0.7, 5: 0.1}
    config = tiny_config(
        tmp_path, run=RunConfig(str(tmp_path / "run"), steps=3, save_every=1, keep_checkpoints=1, keep_best="accuracy")
    )
    evaluation = EvaluationConfig(str(tmp_path / "prompts.jsonl"), every=1, max_tokens=4, limit=4)
    config = replace(config, evaluation=evaluation)

    def record(run, state, metrics, console):
        found = {"accuracy": accuracies[state.step], "standard_error": 0.01, "count": 4}
        metrics.write({"kind": "evaluation", "step": state.step, **found})

    monkeypatch.setattr(train_module, "record_accuracy", record)
    train(config, Console(quiet=True))
    assert names(tmp_path / "run") == [2, 3]
    card = (tmp_path / "run" / "checkpoint-000002" / "README.md").read_text()
    assert "| Accuracy | 0.8000 +- 0.0100 (standard error) on 4 problems, last_number, at most 4 tokens |" in card
    train(replace(config, run=replace(config.run, steps=5)), Console(quiet=True), resume=True)
    assert names(tmp_path / "run") == [2, 5]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (EvaluationConfig(), r"run\.keep_best must be unset without evaluation\.prompts, got 'accuracy'"),
        (
            EvaluationConfig("p.jsonl", every=4),
            r"run\.save_every must be a multiple of evaluation\.every = 4 with run\.keep",
        ),
    ],
)
def test_a_best_that_nothing_measures_is_refused(tmp_path, evaluation, message):
    config = tiny_config(tmp_path, run=RunConfig(str(tmp_path / "run"), save_every=6, keep_best="accuracy"))
    if evaluation.prompts is not None:
        evaluation = replace(evaluation, prompts=config.data.prompts)
    with pytest.raises(InputError, match=message):
        train(replace(config, evaluation=evaluation), Console(quiet=True))
