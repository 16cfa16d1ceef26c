"""Is a checkpoint whole or absent, whatever fails while it is written?  pytest tests/distill/test_checkpoint.py"""

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import esr_distill.checkpoint as checkpoint_module
from esr_distill.checkpoint import TrainerState, find_checkpoints, load_training_state, save_checkpoint
from esr_distill.complete_files import WriteError
from esr_distill.config import RunConfig
from esr_distill.train import train
from esr_distill.training_run import prepare_run


@pytest.fixture
def run(tmp_path):
    return prepare_run(tiny_config(tmp_path), Console(quiet=True))


def test_a_checkpoint_is_a_hugging_face_folder(run, tmp_path):
    folder = save_checkpoint(run, TrainerState(3, 1.5), tmp_path / "out")
    assert folder.name == "checkpoint-000003"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in run.student.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == run.tokenizer.get_vocab()
    assert load_training_state(run, folder) == TrainerState(3, 1.5)


@pytest.mark.parametrize("stage", ["weights", "optimizer", "rename"])
def test_a_failing_write_leaves_the_earlier_checkpoint(run, tmp_path, monkeypatch, stage):
    output_dir = tmp_path / "out"
    save_checkpoint(run, TrainerState(1, 0.0), output_dir)

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if stage == "weights":
            patch.setattr(type(run.student), "save_pretrained", disk_full)
        elif stage == "optimizer":
            patch.setattr(checkpoint_module.torch, "save", disk_full)
        else:
            patch.setattr(os, "replace", disk_full)
        with pytest.raises(WriteError, match=r"checkpoint-000002 could not be written \(No space left on device\)"):
            save_checkpoint(run, TrainerState(2, 0.0), output_dir)
    assert [path.name for path in find_checkpoints(output_dir)] == ["checkpoint-000001"]
    AutoModelForCausalLM.from_pretrained(find_checkpoints(output_dir)[0])
    save_checkpoint(run, TrainerState(2, 0.0), output_dir)
    assert [path.name for path in find_checkpoints(output_dir)] == ["checkpoint-000001", "checkpoint-000002"]


def test_only_the_newest_are_kept(tmp_path):
    config = tiny_config(
        tmp_path, run=RunConfig(output_dir=str(tmp_path / "run"), steps=5, save_every=1, keep_checkpoints=2)
    )
    train(config, Console(quiet=True))
    assert sorted(path.name for path in Path(config.run.output_dir).iterdir()) == [
        "checkpoint-000004",
        "checkpoint-000005",
        "config.yaml",
        "metrics.jsonl",
    ]
