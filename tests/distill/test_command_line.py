"""Does the command take what it should, and refuse the rest with one clear line?  pytest tests/distill/test_command_line.py"""

import json
import shutil
import subprocess
import sys
import time

import pytest
from tiny_models import save_pair, write_prompts

from esr_distill.command_line import main


@pytest.fixture
def folder(tmp_path):
    save_pair(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", count=12)
    return tmp_path


def train_arguments(folder, **changed: str) -> list[str]:
    options = {
        "model.student": folder / "student",
        "model.teacher": folder / "teacher",
        "model.device": "cpu",
        "data.prompts": folder / "prompts.jsonl",
        "data.chat_template": "false",
        "rollout.horizon": "4",
        "rollout.batch_size": "2",
        "run.steps": "2",
        "run.output_dir": folder / "run",
    } | {name.replace("__", "."): value for name, value in changed.items()}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_train_writes_checkpoint_metrics_and_config(folder, capsys):
    assert main(train_arguments(folder)) == 0
    assert {path.name for path in (folder / "run").iterdir()} == {"checkpoint-000002", "config.yaml", "metrics.jsonl"}
    assert "finished 2 steps" in capsys.readouterr().out


def test_eval_prints_and_writes_the_accuracy(folder, capsys):
    arguments = ["eval", "--model", str(folder / "student"), "--prompts", str(folder / "prompts.jsonl")]
    arguments += ["--chat_template", "false", "--max_tokens", "4", "--output", str(folder / "out" / "result.json")]
    assert main(arguments) == 0
    result = json.loads((folder / "out" / "result.json").read_text())
    assert result["count"] == 12 and 0 <= result["accuracy"] <= 1
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rollout__horizon": "0"}, "rollout.horizon must be >= 1, got 0"),
        ({"model__student": "no/such/model-folder"}, "model.student must be"),
        ({"data__prompts": "nowhere.jsonl"}, "data.prompts must be a JSONL file, got 'nowhere.jsonl'"),
        ({"rollout__horizon": "100000"}, "rollout.horizon must leave room for a prompt"),
        ({"data__chat_template": "true"}, "data.chat_template must be false for a tokenizer without a chat template"),
        ({"loss__divergence": "jsd"}, "loss.divergence_parameter must be set for jsd"),
        ({"loss__divergence_parameter": "0.5"}, "loss.divergence_parameter must be unset for reverse_kl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder, capsys, changed, message):
    assert main(train_arguments(folder, **changed)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("esr-distill train: ") and "Traceback" not in error
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["train", "--run.out", "x"], ["eval", "--mod", "x"], ["check", "--process", "2"]]
)
def test_no_command_takes_an_abbreviated_flag(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and f"unrecognized arguments: {arguments[1]}" in capsys.readouterr().err


def test_resume_takes_no_other_option(folder, capsys):
    assert main(["train", "--resume", str(folder / "run"), "--run.steps", "9"]) == 2
    assert "--resume must be the only option" in capsys.readouterr().err


def test_resume_of_no_run(folder, capsys):
    assert main(["train", "--resume", str(folder / "nothing")]) == 2
    assert "--resume must name the folder of a run" in capsys.readouterr().err


def test_a_copied_run_goes_on_in_its_own_folder(folder, capsys):
    assert main(train_arguments(folder)) == 0
    original = {path.name for path in (folder / "run").iterdir()}
    shutil.copytree(folder / "run", folder / "copy")
    config = folder / "copy" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 3"))
    assert main(["train", "--resume", str(folder / "copy")]) == 0
    assert (folder / "copy" / "checkpoint-000003").is_dir()
    assert {path.name for path in (folder / "run").iterdir()} == original


def test_an_output_folder_that_cannot_be_made(folder, capsys):
    (folder / "taken").write_text("")
    assert main(train_arguments(folder, run__output_dir=folder / "taken")) == 2
    assert "run.output_dir must be a folder that can be written" in capsys.readouterr().err


def test_ctrl_c_in_the_shell_leaves_a_resumable_run(folder, capsys):
    """The real command in its own process, stopped by SIGINT as soon as it has logged a step."""
    arguments = train_arguments(folder, run__steps="100000")
    command = [sys.executable, "-m", "esr_distill.command_line", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert any(
        line.endswith(f"go on with: esr-distill train --resume {folder / 'run'}") for line in output.splitlines()
    )
    (checkpoint,) = (path for path in (folder / "run").iterdir() if path.name.startswith("checkpoint-"))
    assert metrics.read_text().count('"kind": "step"') == int(checkpoint.name.split("-")[1])
