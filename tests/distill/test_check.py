"""Does `check` find what would spoil a run, and say what to do?  pytest tests/distill/test_check.py"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_templates import TEMPLATE
from rich.console import Console
from test_command_line import train_arguments
from test_train import tiny_config
from tiny_models import make_model, make_tokenizer, save_pair, write_prompts

from esr_distill.checks import check_command
from esr_distill.checks.check_command import ask_everything
from esr_distill.checks.finding import Finding
from esr_distill.checks.planned_launch import PlannedLaunch
from esr_distill.checks.tokens import stop_finding, tokenizer_finding
from esr_distill.command_line import main
from esr_distill.config import (
    DevicesConfig,
    EvaluationConfig,
    LossConfig,
    MonitoringConfig,
    RolloutConfig,
    TrainConfig,
)
from esr_distill.input_error import InputError


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def findings(config: TrainConfig, console: Console, processes: int = 1) -> dict[str, Finding]:
    launch = PlannedLaunch(processes, config.devices)
    return {finding.check: finding for finding in ask_everything(config, console, launch).findings}


# The command


@pytest.fixture
def folder(tmp_path):
    save_pair(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", count=12)
    return tmp_path


def check_arguments(folder: Path, *more: str, **changed: str) -> list[str]:
    return ["check", *train_arguments(folder, **changed)[1:], *more]


QUESTIONS = [
    "tokenizers",
    "chat templates",
    "thinking mode",
    "stop ids",
    "end of the student's turn",
    "end of the teacher's turn",
    "context",
    "vocabulary",
    "teacher determinism",
    "agreement",
    "memory",
]


def test_a_config_that_would_train(folder, capsys):
    output = folder / "out" / "check.json"
    assert main(check_arguments(folder, "--output", str(output))) == 0
    result = json.loads(output.read_text())
    assert [finding["check"] for finding in result["findings"]] == QUESTIONS
    assert not result["has_errors"] and result["not_asked"] == []
    assert result["options"]["rollout"]["horizon"] == 4 and result["machine"]["versions"]["torch"]
    assert all((finding["fix"] is None) == (finding["level"] == "ok") for finding in result["findings"])
    assert [path.name for path in output.parent.iterdir()] == ["check.json"]
    assert not (folder / "run").exists()
    text = capsys.readouterr().out
    assert "equal to the bit" in text and "0 errors" in text


def test_an_error_is_the_exit_status(folder, capsys):
    make_model(1, vocab_size=24).save_pretrained(folder / "teacher")
    output = folder / "check.json"
    assert main(check_arguments(folder, f"--output={output}")) == 2
    result = json.loads(output.read_text())
    errors = [finding for finding in result["findings"] if finding["level"] == "error"]
    assert result["has_errors"] and [finding["check"] for finding in errors] == ["vocabulary"]
    assert "set loss.vocab_size to 19" in capsys.readouterr().out


def test_a_preset_counts_as_it_does_in_training(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        check_command, "check_config", lambda config, console, *options: seen.append((config, options)) or 0
    )
    arguments = [*check_arguments(folder), "--preset", "middle-window", "--output", "a.json"]
    assert main(arguments) == 0
    ((config, options),) = seen
    assert options == ("a.json", 1)
    assert config.rollout.horizon == 4 and config.selection.rules[0].start == "middle"


def test_the_number_of_processes_is_an_option_of_check_alone(folder, capsys):
    """The batch is of two rollouts."""
    arguments = check_arguments(folder, "--devices.shard", "student")
    assert main([*arguments, "--processes", "2", "--output", str(folder / "check.json")]) == 0
    (memory,) = [f for f in json.loads((folder / "check.json").read_text())["findings"] if f["check"] == "memory"]
    assert "each of 2 processes (devices.shard student)" in memory["message"]
    assert main([*arguments, "--processes=3"]) == 2 and main(arguments) == 2
    assert main([*arguments, "--processes", "0"]) == 2
    assert "esr-distill check: --processes must be >= 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", *arguments[1:], "--processes", "2"])


def test_resume_is_refused(folder, capsys):
    assert main(["check", "--resume", str(folder)]) == 2
    assert "--resume must be left out" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_first(folder, capsys):
    assert main(check_arguments(folder, "--output", str(folder))) == 2
    assert "output must be a file that can be written" in capsys.readouterr().err


def test_a_fix_belongs_to_what_is_not_ok():
    for level, fix in (("ok", "do"), ("warning", None), ("error", None)):
        with pytest.raises(ValueError, match="a fix belongs to a warning or an error"):
            Finding("a", level, "b", fix)


# What stops all other questions


def test_other_tokenizers(tmp_path, console):
    config = tiny_config(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    report = ask_everything(config, console)
    (error,) = [finding for finding in report.findings if finding.level == "error"]
    assert error.check == "tokenizers" and "differs in 1 ids, first at id 19 ('<think>')" in error.message
    assert "teacher determinism" in report.not_asked and "chat templates" not in report.not_asked


def test_several_errors_are_found_at_once(tmp_path, console):
    config = tiny_config(tmp_path)
    config = replace(
        config,
        data=replace(config.data, prompts="nowhere.jsonl"),
        loss=LossConfig(divergence="jsd"),
        model=replace(config.model, teacher="no/such/model"),
    )
    report = ask_everything(config, console)
    assert [finding.check for finding in report.findings] == ["options", "prompts", "tokenizers"]
    assert all(finding.level == "error" for finding in report.findings)
    messages = " ".join(finding.message for finding in report.findings)
    assert "divergence_parameter must be set" in messages and "'nowhere.jsonl'" in messages and "no/such" in messages
    assert report.not_asked[:3] == ["processes", "chat templates", "thinking mode"]


def test_a_model_that_cannot_be_loaded(tmp_path, console):
    config = tiny_config(tmp_path)
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"broken")
    report = ask_everything(config, console)
    assert [(f.check, f.level) for f in report.findings][-1] == ("run", "error")
    assert "model.teacher must be" in report.findings[-1].message and "agreement" in report.not_asked


def test_models_are_loaded_a_second_time_for_other_widths_alone(tmp_path, console, monkeypatch):
    calls = []

    def refuse(config, console):
        calls.append(config.loss.vocab_size)
        raise InputError("no")

    monkeypatch.setattr(check_command, "prepare_run", refuse)
    config = tiny_config(tmp_path)
    assert findings(config, console)["run"].message == "no" and calls == [None]
    make_model(1, vocab_size=24).save_pretrained(tmp_path / "teacher")
    assert findings(config, console)["run"].message == "no" and calls == [None, None, 19]


def test_what_training_would_find_itself_is_found_too(tmp_path, console):
    """An evaluation without answers, which only the preparation of the run reads."""
    write_prompts(tmp_path / "evaluation.jsonl", count=2, with_answers=False)
    evaluation = EvaluationConfig(str(tmp_path / "evaluation.jsonl"))
    found = findings(tiny_config(tmp_path, evaluation=evaluation), console)
    assert found["run"].level == "error" and "must have an" in found["run"].message


# Several processes


def test_what_each_of_several_processes_would_refuse(tmp_path, console):
    """The batch is of four rollouts."""
    config = tiny_config(tmp_path)
    assert "processes" not in findings(config, console, 2)
    report = ask_everything(config, console, PlannedLaunch(3))
    assert [(f.check, f.level) for f in report.findings if f.level == "error"] == [("processes", "error")]
    finding = next(f for f in report.findings if f.check == "processes")
    assert "rollout.batch_size must be a multiple of" in finding.message
    assert "the number of processes = 3, got 4" in finding.message and "than 3 (--processes)" in finding.fix
    assert "memory" in report.not_asked


def test_shards_need_the_number_of_processes(tmp_path, console):
    config = tiny_config(tmp_path, devices=DevicesConfig(shard="both"))
    finding = findings(config, console)["processes"]
    assert "devices.shard must be none in a run of one process, got 'both'" in finding.message
    assert finding.fix == "say how many processes you will start: esr-distill check --processes N"
    found = findings(config, console, 4)
    assert all(finding.level != "error" for finding in found.values())
    assert "each of 4 processes (devices.shard both)" in found["memory"].message
    assert "whole student" in found["memory"].values["stages"]["saving"]


def test_a_full_device_says_that_a_check_has_no_shards(tmp_path, console, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check_command, "prepare_run", full)
    config = tiny_config(tmp_path, devices=DevicesConfig(shard="student"))
    assert "a check has both models whole, the run has shards" in findings(config, console, 2)["run"].fix
    assert findings(replace(config, devices=DevicesConfig()), console, 2)["run"].fix.endswith("ask for less of it")


def test_the_number_of_processes_is_written_and_checked_first(tmp_path, console):
    config, output = tiny_config(tmp_path), tmp_path / "out" / "check.json"
    for processes in (0, -2):
        with pytest.raises(InputError, match=rf"^--processes must be >= 1, got {processes}$"):
            check_command.check_config(config, console, str(output), processes)
    assert not output.parent.exists()
    assert check_command.check_config(config, console, str(output), 2) == 0
    result = json.loads(output.read_text())
    assert result["processes"] == 2 and result["options"]["devices"]["shard"] == "none"
    (memory,) = [finding for finding in result["findings"] if finding["check"] == "memory"]
    assert memory["values"]["processes"] == 2


# Tokens


def test_equal_tokenizers():
    assert tokenizer_finding(make_tokenizer(), make_tokenizer()).values == {"tokens": 19}


SOURCES = {"the student's tokenizer": [2], "the teacher's tokenizer": [5], "the teacher's config": []}


@pytest.mark.parametrize(
    ("merged", "are_merged", "level", "words"),
    [
        ((2, 5), True, "ok", "rollouts end at 2 (<eos>), 5 (2)"),
        ((2, 5), True, "ok", "one event in the loss"),
        ((2, 5), False, "warning", "the loss takes them for different events"),
        ((2,), True, "warning", "not at 5 (2), which the teacher's tokenizer names"),
    ],
)
def test_stop_ids(merged, are_merged, level, words):
    finding = stop_finding(SOURCES, merged, are_merged, make_tokenizer())
    assert finding.level == level and words in finding.message
    assert finding.values["sources"] == SOURCES


def test_one_stop_id_needs_no_merging():
    finding = stop_finding({"the student's tokenizer": [2]}, (2,), False, make_tokenizer())
    assert finding.level == "ok" and "one event" not in finding.message


def test_stop_ids_come_from_all_files_of_both_sides(tmp_path, console):
    config = tiny_config(tmp_path)
    teacher = make_model(seed=1)
    teacher.generation_config.eos_token_id = [5, 2]
    teacher.config.eos_token_id = 7
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "."
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "student" / "generation_config.json").unlink()
    finding = findings(config, console)["stop ids"]
    assert finding.values["sources"] == {
        "the student's tokenizer": [2],
        "the student's generation config": [],
        "the student's config": [2],
        "the teacher's tokenizer": [18],
        "the teacher's generation config": [2, 5],
        "the teacher's config": [7],
    }
    assert finding.values["stop_ids"] == [2, 5, 18] and finding.level == "warning"
    assert "not at 7 (4), which the teacher's config names" in finding.message


def test_templates_are_looked_at_on_the_first_prompt(tmp_path, console):
    config = tiny_config(tmp_path)
    for role, template in (("student", TEMPLATE), ("teacher", TEMPLATE.replace("#2;", "#2;.<bos>"))):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / role)
    found = findings(replace(config, data=replace(config.data, chat_template=True)), console)
    assert found["chat templates"].level == found["thinking mode"].level == "warning"
    first = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    assert found["chat templates"].values["student_text"] == f"#1;{first}#2;"


# Lengths


def test_prompts_that_are_too_long(tmp_path, console):
    """The context is 128; the prompts have 1 to 12 characters and a <bos>."""
    config = tiny_config(tmp_path, rollout=RolloutConfig(horizon=120, batch_size=4))
    lengths = [1 + len(json.loads(line)["prompt"]) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    too_long = sum(length > 8 for length in lengths)
    assert 0 < too_long < 20
    found = findings(config, console)
    assert found["context"].level == "error" and found["context"].values["too_long"] == too_long
    assert found["context"].values["longest_prompt"] == max(lengths)
    assert f"{too_long} are longer than 8 (context 128 minus rollout.horizon 120)" in found["context"].message
    assert "agreement" in found  # asked all the same, on the prompts that fit
    dropping = replace(config, data=replace(config.data, long_prompts="drop"))
    assert findings(dropping, console)["context"].level == "warning"


def test_a_horizon_beyond_the_context(tmp_path, console):
    found = findings(tiny_config(tmp_path, rollout=RolloutConfig(horizon=128, batch_size=4)), console)
    assert found["run"].level == "error" and "rollout.horizon must leave room for a prompt" in found["run"].message


def test_the_probe_is_asked_about(tmp_path, console):
    config = replace(
        tiny_config(tmp_path), monitoring=MonitoringConfig(probe_every=2, probe_prompts=4, probe_tokens=127)
    )
    found = findings(config, console)["probe"]
    assert found.level == "error" and "monitoring.probe_tokens must leave room" in found.message
    fits = replace(config, monitoring=replace(config.monitoring, probe_tokens=64))
    assert findings(fits, console)["probe"].level == "ok"


def test_a_device_that_is_full_is_an_error(tmp_path, console, monkeypatch):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")

    monkeypatch.setattr(check_command, "draw_first_rollouts", full)
    report = ask_everything(tiny_config(tmp_path), console)
    (error,) = [finding for finding in report.findings if finding.level == "error"]
    assert (error.check, error.message) == ("agreement", "CUDA out of memory. Tried to allocate 2 GiB")
    assert report.not_asked == ["vocabulary", "teacher determinism"]
