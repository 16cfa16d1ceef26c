"""Does a run go on only as the run that it was?  pytest tests/distill/test_resume_refused.py"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train import losses, tiny_config
from tiny_models import make_model

import esr_distill.train as train_module
from esr_distill.command_line import main
from esr_distill.config import (
    EvaluationConfig,
    HorizonScheduleConfig,
    LossConfig,
    MonitoringConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
)
from esr_distill.config_file import load_saved_config, save_config
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.resume import MAY_CHANGE
from esr_distill.train import train

QUIET = Console(quiet=True)
STEADY = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_fraction=0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> TrainConfig:
    """A run of three steps."""
    config = tiny_config(tmp_path_factory.mktemp("resume"), steps=3, optimizer=STEADY)
    train(config, QUIET)
    return config


@pytest.fixture
def done(made, tmp_path) -> TrainConfig:
    """A copy of it, for one test."""
    shutil.copytree(made.run.output_dir, tmp_path / "run")
    return changed(made, "run", output_dir=str(tmp_path / "run"))


def changed(config: TrainConfig, group: str, **options) -> TrainConfig:
    return replace(config, **{group: replace(getattr(config, group), **options)})


def edit_state(config: TrainConfig, edit) -> None:
    """Change trainer_state.json of the newest checkpoint."""
    path = max(Path(config.run.output_dir).glob("checkpoint-*")) / "trainer_state.json"
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))


def contents(config: TrainConfig) -> dict[str, bytes]:
    folder = Path(config.run.output_dir)
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ("optimizer", {"learning_rate": 0.1}, r"^optimizer\.learning_rate must be 0\.001, got 0\.1: "),
        ("optimizer", {"betas": (0.5, 0.9)}, r"^optimizer\.betas must be \[0\.9, 0\.999\], got \[0\.5, 0\.9\]: "),
        ("optimizer", {"weight_decay": 0.5}, r"^optimizer\.weight_decay must be 0\.01, got 0\.5: "),
        ("rollout", {"batch_size": 8}, r"^rollout\.batch_size must be 4, got 8: "),
        (
            "rollout",
            {"top_k": 3, "horizon": 6},
            r"^rollout\.horizon must be 5, got 6; rollout\.top_k must be 0, got 3: ",
        ),
        ("run", {"seed": 1}, r"^run\.seed must be 0, got 1: "),
        (
            "horizon",
            {"kind": "linear", "start": 1},
            r"horizon\.kind must be 'fixed', got 'linear'; horizon\.start must be ",
        ),
        ("loss", {"divergence": "forward_kl"}, r"^loss\.divergence must be 'reverse_kl', got 'forward_kl': "),
        ("model", {"teacher_dtype": "bfloat16"}, r"^model\.teacher_dtype must be 'float32', got 'bfloat16': "),
    ],
)
def test_other_options_are_refused_by_name(done, group, options, message):
    before = contents(done)
    with pytest.raises(InputError, match=f"{message}.*checkpoint-000003 was trained so"):
        train(changed(changed(done, "run", steps=5), group, **options), QUIET, resume=True)
    assert contents(done) == before


def test_another_teacher_is_refused(done):
    student = done.model.student
    with pytest.raises(InputError, match=rf"^model\.teacher must be '.*/teacher', got '{student}'"):
        train(changed(done, "model", teacher=student), QUIET, resume=True)


def test_what_only_decides_where_and_how_fast_may_change(done, tmp_path):
    """The steps to come are those of a run that had nothing changed, up to the rounding of sums."""
    whole = changed(done, "run", steps=5, output_dir=str(tmp_path / "whole"))
    train(whole, QUIET)
    other = changed(done, "run", steps=5, save_every=2, keep_checkpoints=1)
    other = changed(other, "optimizer", accumulation_steps=2)
    other = changed(other, "model", gradient_checkpointing=True, attn_implementation="eager")
    shutil.copy(done.data.prompts, tmp_path / "moved.jsonl")
    other = changed(other, "data", prompts=str(tmp_path / "moved.jsonl"))
    evaluation = EvaluationConfig(done.data.prompts, every=2, max_tokens=3, limit=2)
    other = replace(other, evaluation=evaluation, monitoring=MonitoringConfig(samples_every=1))
    assert train(other, QUIET, resume=True).finished
    assert losses(other) == pytest.approx(losses(whole), rel=1e-5) and len(losses(other)) == 5


def test_the_options_that_may_change_are_options():
    groups = {field.name: field.type for field in fields(TrainConfig)}
    for name in MAY_CHANGE:
        group, _, option = name.partition(".")
        assert group in groups
        assert not option or option in {field.name for field in fields(groups[group])}


def test_fewer_steps_than_are_done_are_refused(done, capsys):
    """By the command, as where somebody edits config.yaml: it would never have come to its last step."""
    save_config(changed(done, "run", steps=2), Path(done.run.output_dir))
    before = contents(done)
    assert main(["train", "--resume", done.run.output_dir]) == 2
    found = f"run.steps must be at least 3, the steps of {done.run.output_dir}/checkpoint-000003, got 2\n"
    assert capsys.readouterr().err.endswith(f"esr-distill train: {found}")
    assert contents(done) == before


def test_more_steps_have_the_learning_rates_of_the_new_length(tmp_path, monkeypatch):
    """A cosine over 2 steps has come to its end; over 6 steps, the steps 2 to 5 have (1 + cos(pi s / 6)) / 2."""
    config = tiny_config(tmp_path, steps=2, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0))
    original, used = train_module.train_step, []

    def watched(run, *rest):
        used.append(run.optimizer.param_groups[0]["lr"])
        return original(run, *rest)

    monkeypatch.setattr(train_module, "train_step", watched)
    train(config, QUIET)
    train(changed(config, "run", steps=6), QUIET, resume=True)
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl", "step")]
    half_root = 3**0.5 / 2
    factors = [1, 0.5, 0.75, 0.5, 0.25, (1 - half_root) / 2]  # the first two over 2 steps
    assert rates == pytest.approx([1e-3 * factor for factor in factors], rel=1e-9)
    assert used == rates


def test_a_checkpoint_of_an_older_version_goes_on_with_a_notice(done, tmp_path):
    def make_old(state):
        for name in ("options", "horizon", "prompts_read_sha256"):
            del state[name]

    edit_state(done, make_old)
    console = Console(record=True, width=400)
    assert train(changed(done, "run", steps=4), console, resume=True).finished
    checkpoint = f"{done.run.output_dir}/checkpoint-000003"
    notice = f"{checkpoint} is of an older version and does not say its options: they are not compared"
    assert notice in console.export_text().splitlines()
    whole = changed(done, "run", steps=4, output_dir=str(tmp_path / "whole"))
    train(whole, QUIET)
    assert losses(done) == losses(whole)


def test_an_option_that_was_not_there_yet_had_its_default(done):
    edit_state(done, lambda state: state["options"].pop("loss.loss_temperature"))
    with pytest.raises(InputError, match=r"^loss\.loss_temperature must be 1\.0, got 2\.0"):
        train(replace(done, loss=LossConfig(loss_temperature=2.0)), QUIET, resume=True)
    assert train(done, QUIET, resume=True).finished


# The adaptive horizon


def adaptive_config(folder: Path, name: str, steps: int) -> TrainConfig:
    """The teacher is the student and some noise, so that they agree now and then."""
    config = tiny_config(
        folder,
        name,
        steps,
        rollout=RolloutConfig(horizon=12, batch_size=4, sampling_temperature=1.0, top_p=1.0),
        horizon=HorizonScheduleConfig("adaptive", start=2, increment=2, agreement=0.76),
        optimizer=STEADY,
    )
    near = make_model(0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=noise)
    near.save_pretrained(folder / "teacher")
    return config


def horizons_of(config: TrainConfig) -> list[int]:
    records = read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "step")
    return [record["horizon"] for record in records]


def test_an_adaptive_horizon_goes_on_without_the_metrics(tmp_path):
    whole, halted = adaptive_config(tmp_path, "whole", 5), adaptive_config(tmp_path, "halted", 3)
    train(whole, QUIET)
    train(halted, QUIET)
    assert len(set(horizons_of(whole))) > 2
    (tmp_path / "halted" / "metrics.jsonl").unlink()
    train(changed(halted, "run", steps=5), QUIET, resume=True)
    assert horizons_of(halted) == horizons_of(whole)[3:] and losses(halted) == losses(whole)[3:]
    states = [json.loads(path.read_text()) for path in tmp_path.glob("*/checkpoint-000005/trainer_state.json")]
    assert len(states) == 2 and states[0]["horizon"] == states[1]["horizon"] is not None


def test_that_of_an_older_version_needs_them(tmp_path):
    whole, halted = adaptive_config(tmp_path, "whole", 4), adaptive_config(tmp_path, "halted", 3)
    train(whole, QUIET)
    train(halted, QUIET)
    edit_state(halted, lambda state: state.pop("horizon"))
    metrics = tmp_path / "halted" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    longer = changed(halted, "run", steps=4)
    metrics.write_text("".join(lines[1:]))
    with pytest.raises(
        InputError, match=r"must hold the steps 1 to 3 for horizon\.kind adaptive to go on, got 2 of them"
    ):
        train(longer, QUIET, resume=True)
    metrics.write_text("".join(lines))
    train(longer, QUIET, resume=True)
    assert horizons_of(halted) == horizons_of(whole) and losses(halted) == losses(whole)


# Damaged files


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("optimizer.pt", b"", "got an early end"),
        ("optimizer.pt", b"PK\x03\x04 cut off", "got PytorchStreamReader failed"),
        ("optimizer.pt", None, "got No such file or directory"),
        ("trainer_state.json", None, "got No such file or directory"),
        ("trainer_state.json", b'{"step": 3, "tr', "got no JSON"),
        ("trainer_state.json", b'{"step": 3}', "got no train_seconds"),
    ],
)
def test_damaged_files_of_a_checkpoint_are_named(done, name, content, found):
    checkpoint = Path(done.run.output_dir) / "checkpoint-000003"
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        train(done, QUIET, resume=True)
    assert f"{checkpoint / name} must be the file that the run wrote there, {found}" in str(error.value)
    assert str(error.value).endswith(f"; move {checkpoint} away to go on from an earlier checkpoint")


@pytest.mark.parametrize("line", [b"garbage", b"[1]", b'{"kind": "step"}', b"\xff\xfe"])
def test_a_line_of_the_metrics_that_no_run_wrote_is_named(done, line):
    metrics = Path(done.run.output_dir) / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    before = contents(done)
    with pytest.raises(
        InputError, match=r"metrics\.jsonl, line 2, must be a record with a step, got .*remove the line"
    ):
        train(changed(done, "run", steps=4), QUIET, resume=True)
    assert contents(done) == before


def test_the_saved_options_go_on_as_they_are(done):
    """Through config.yaml: lists, tuples, numbers and nulls come back as what was recorded."""
    config = load_saved_config(Path(done.run.output_dir))
    assert train(config, QUIET, resume=True).finished
