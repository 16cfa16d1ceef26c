"""What is left, and what is said, where a run ends before its last step?  pytest tests/distill/test_stopped_runs.py"""

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train import interrupt_after, losses, tiny_config

import esr_distill.train as train_module
from esr_distill.config import EvaluationConfig, MonitoringConfig, RunConfig, TrainConfig
from esr_distill.devices import Devices
from esr_distill.input_error import InputError
from esr_distill.kept_checkpoints import find_checkpoints
from esr_distill.resume_command import resume_command, what_is_left
from esr_distill.train import TrainResult, train

QUIET = Console(quiet=True)


def narrow_console() -> Console:
    return Console(file=io.StringIO(), width=40)


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


# A signal before the first step


@pytest.mark.parametrize("moment", ["record_accuracy", "record_probe"])
def test_a_signal_in_the_first_measurement_ends_the_run_before_its_first_step(tmp_path, monkeypatch, moment):
    config = tiny_config(tmp_path, steps=2)
    evaluation = EvaluationConfig(config.data.prompts, every=5, max_tokens=3, limit=2)
    probe = MonitoringConfig(probe_every=5, probe_prompts=2, probe_tokens=8)
    config = replace(config, evaluation=evaluation, monitoring=probe)
    original, measured = getattr(train_module, moment), []

    def signalled(run, state, *rest):
        if state.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        measured.append(original(run, state, *rest))

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    console = narrow_console()
    with monkeypatch.context() as patch:
        patch.setattr(train_module, moment, signalled)
        assert train(config, console) == TrainResult(False, 0, None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(measured) == 1 and not find_checkpoints(tmp_path / "run") and losses(config) == []
    said = "stopped before the first step: nothing is saved, begin again with the same command"
    assert said in lines_of(console)
    records = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == ["evaluation", "probe"][: 1 if moment == "record_accuracy" else 2]
    assert train(config, QUIET).finished


# What is printed


@pytest.mark.parametrize(
    ("name", "quoted"), [("a[/x]b", "'{}/a[/x]b'"), ("e[red]x y", "'{}/e[red]x y'"), ("it's", """'{}/it'"'"'s'""")]
)
def test_paths_are_printed_as_they_are_and_commands_in_one_line(tmp_path, monkeypatch, name, quoted):
    """Brackets are markup to the console, and it is narrow."""
    folder, path = tmp_path / name, quoted.format(tmp_path)
    config = tiny_config(tmp_path, name, steps=3)
    console = narrow_console()
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        train(config, console)
    lines = lines_of(console)
    assert f"stopped after step 2; go on with: esr-distill train --resume {path}" in lines
    assert f"options without their defaults (all of them in {folder}/config.yaml):" in lines
    assert f"  run.output_dir: {folder}" in lines
    for said in (f"finished 3 steps; the student is in {folder}/checkpoint-000003", "all 3 steps were done already; "):
        console = narrow_console()
        train(config, console, resume=True)
        assert any(line.startswith(said) for line in lines_of(console))
    with pytest.raises(InputError) as error:
        train(config, QUIET)
    assert f"go on with it by --resume {path}, or" in str(error.value)


CPU = torch.device("cpu")


def test_the_command_starts_as_many_processes_again():
    folder = Path("runs/my run")
    of_one = "esr-distill train --resume 'runs/my run'"
    assert resume_command(folder, Devices(CPU), {"GROUP_WORLD_SIZE": "9"}) == of_one
    rest = "-m esr_distill.command_line train --resume 'runs/my run'"
    for environment in ({}, {"GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}):
        command = resume_command(folder, Devices(CPU, 0, 4), environment)
        assert command == f"torchrun --standalone --nproc_per_node 4 {rest}"
    two_machines = {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    place = "--nnodes 2 --node_rank NUMBER_OF_THIS_MACHINE --master_addr 10.0.0.1 --master_port 29500"
    command = resume_command(folder, Devices(CPU, 0, 8), two_machines)
    assert command == f"torchrun {place} --nproc_per_node 4 {rest}"


def test_what_is_left(tmp_path):
    begin_again = "there is no checkpoint yet, so begin again with the same command"
    assert what_is_left(tmp_path, Devices(CPU)) == begin_again
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    expected = f"{tmp_path}/checkpoint-000010 is whole, go on with: esr-distill train --resume {tmp_path}"
    assert what_is_left(tmp_path, Devices(CPU)) == expected


# Bad input in the middle of a run


def stream_config(folder: Path, name: str = "run", steps: int = 6) -> TrainConfig:
    """Batches of 4 out of windows of 4: step s reads the lines 4 s - 3 to 4 s."""
    config = tiny_config(folder, name, steps)
    return replace(config, data=replace(config.data, stream_prompts=4))


def with_line(path: str, number: int, prompt: str) -> list[str]:
    """Put another prompt into a line; returns the lines that were there."""
    lines = Path(path).read_text().splitlines(keepends=True)
    Path(path).write_text("".join([*lines[: number - 1], json.dumps({"prompt": prompt}) + "\n", *lines[number:]]))
    return lines


@pytest.mark.parametrize("prompt", ["", 40 * "1+"])
def test_a_bad_line_of_a_stream_does_not_cost_the_steps_before_it(tmp_path, prompt):
    config, whole = stream_config(tmp_path), stream_config(tmp_path, "whole")
    train(whole, QUIET)
    config = replace(config, data=replace(config.data, max_prompt_tokens=30))
    whole_lines = with_line(config.data.prompts, 15, prompt)
    with pytest.raises(InputError) as error:
        train(config, QUIET)
    folder = tmp_path / "run"
    left = f"; {folder}/checkpoint-000003 is whole, go on with: esr-distill train --resume {folder}"
    assert str(error.value).startswith("data.prompts") and str(error.value).endswith(left)
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-000003"] and len(losses(config)) == 3
    before = (folder / "checkpoint-000003" / "optimizer.pt").stat().st_mtime_ns
    with pytest.raises(InputError, match="^data.prompts.*checkpoint-000003 is whole"):
        train(config, QUIET, resume=True)  # the line is still bad; what is saved is not saved again
    assert (folder / "checkpoint-000003" / "optimizer.pt").stat().st_mtime_ns == before
    Path(config.data.prompts).write_text("".join(whole_lines))
    assert train(config, QUIET, resume=True).finished
    assert losses(config) == losses(whole)


def test_a_bad_line_of_the_first_window_is_found_before_anything_is_written(tmp_path):
    config = stream_config(tmp_path)
    with_line(config.data.prompts, 3, "")
    with pytest.raises(InputError, match="^data.prompts"):
        train(config, QUIET)
    assert not (tmp_path / "run").exists()


def test_input_that_turns_bad_after_a_step_does_not_cost_that_step(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=4)

    def refused(run, state, *rest):
        if state.step == 2:
            raise InputError("the server must answer, got nothing")

    config = replace(config, monitoring=MonitoringConfig(probe_every=2, probe_prompts=1, probe_tokens=8))
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "record_probe", refused)
        with pytest.raises(
            InputError, match=r"^the server must answer, got nothing; .*checkpoint-000002 is whole, go on"
        ):
            train(config, QUIET)
    assert train(config, QUIET, resume=True).finished
    whole = tiny_config(tmp_path, "whole", steps=4)
    train(whole, QUIET)
    assert losses(config) == losses(whole)


@pytest.mark.parametrize(("line", "is_refused"), [(2, True), (10, True), (15, False)])
def test_a_stream_goes_on_where_what_was_read_is_the_same(tmp_path, line, is_refused):
    """Three steps read the first twelve lines."""
    config = stream_config(tmp_path, steps=3)
    train(config, QUIET)
    with_line(config.data.prompts, line, "9+9=")
    longer = replace(config, run=replace(config.run, steps=4))
    if is_refused:
        with pytest.raises(
            InputError, match=r"^data\.prompts must hold the prompts that the run began with and has read"
        ):
            train(longer, QUIET, resume=True)
    else:
        assert train(longer, QUIET, resume=True).finished


def test_numbers_that_are_not_finite_leave_the_last_checkpoint_as_it_was(tmp_path, monkeypatch):
    """Those weights would come to the same numbers again; going back further is for the user to decide."""
    config = tiny_config(tmp_path, run=RunConfig(str(tmp_path / "run"), steps=6, save_every=2))
    original = train_module.train_step

    def infinite(run, step, *rest):
        if step == 3:
            raise FloatingPointError("step 4: loss inf")
        return original(run, step, *rest)

    monkeypatch.setattr(train_module, "train_step", infinite)
    with pytest.raises(FloatingPointError, match="step 4"):
        train(config, QUIET)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-000002"]
