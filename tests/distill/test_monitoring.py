"""Are samples shown and kept, and do trackers get the numbers?  pytest tests/distill/test_monitoring.py"""

import json
import math
import sys
from dataclasses import replace
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_train import interrupt_after, losses, record_rollouts, tiny_config
from tiny_models import BOS, EOS, make_model, make_rollouts, make_tokenizer

from esr_distill.config import LossConfig, MonitoringConfig, RolloutConfig, TrainConfig
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.monitoring import trackers
from esr_distill.monitoring.sample_table import SampleWatch, sample_table
from esr_distill.monitoring.trackers import check_trackers, numbers_of
from esr_distill.prefix_positions import select_prefix_positions
from esr_distill.run_folder import begin_folder
from esr_distill.train import train
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run
from esr_kernels import DivergenceOutput


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def monitored_config(folder: Path, name: str = "run", steps: int = 6, **fields) -> TrainConfig:
    groups = fields.pop("groups", {})
    return replace(tiny_config(folder, name, steps, **groups), monitoring=MonitoringConfig(**fields))


def samples(config: TrainConfig) -> list[dict]:
    return read_metrics(Path(config.run.output_dir) / "samples.jsonl")


# Samples


def divergences(*values: float) -> DivergenceOutput:
    return DivergenceOutput(torch.tensor(values), *(torch.zeros(len(values)) for _ in range(5)))


def test_rows_by_hand():
    """Two of three rollouts; of the first only two of three tokens are scored, of the second none."""
    encode = make_tokenizer()
    prompts = [encode(text)["input_ids"] for text in ("1+2=", "9=", "8=")]
    responses = [[*encode("34", add_special_tokens=False)["input_ids"], EOS], [11], [11]]
    rollouts = make_rollouts(prompts, responses)
    candidates = torch.tensor([[True, True, False], [False] * 3, [True, False, False]])
    positions = select_prefix_positions(rollouts, 3, candidates)
    watch = SampleWatch(make_tokenizer(), step=7, count=2)
    watch(rollouts, positions, divergences(1.0, 4.0, 8.0))
    first, second = watch.rows
    assert first == {
        "kind": "sample",
        "step": 7,
        "prompt": make_tokenizer().decode(prompts[0]),
        "rollout": "34<eos>",
        "tokens": 3,
        "scored_tokens": 2,
        "divergence": 2.5,
        "finished": True,
    }
    assert "1+2=" in first["prompt"] and "<pad>" not in first["prompt"] + second["prompt"]
    assert (second["tokens"], second["scored_tokens"], second["divergence"], second["finished"]) == (1, 0, None, False)


def test_other_columns_of_the_prompts_are_kept_where_they_are_json():
    rollouts = make_rollouts([[BOS]] * 3, [[5]] * 3)
    positions = select_prefix_positions(rollouts, 1)
    columns = [
        {"id": 7, "nested": {"a": [1, None, "x"]}, "bytes": b"1", "nan": math.nan, "when": date(2026, 1, 2)},
        {"bytes": b"1"},
        {},
    ]
    watch = SampleWatch(make_tokenizer(), 1, 3, columns)
    watch(rollouts, positions, divergences(1.0, 1.0, 1.0))
    assert [row.get("columns") for row in watch.rows][1:] == [None, None]
    kept = watch.rows[0]["columns"]
    assert list(kept) == ["id", "nested", "nan"] and kept["id"] == 7 and kept["nested"] == {"a": [1, None, "x"]}


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_columns_are_those_of_the_prompt_that_was_answered(tmp_path, console, is_stream):
    config = monitored_config(tmp_path, samples=3, groups={"rollout": RolloutConfig(6, 4, samples_per_prompt=2)})
    lines = [{"prompt": f"{i}+{i}=", "name": f"sum {i}", "tags": [i]} for i in range(1, 8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = prepare_run(replace(config, data=replace(config.data, stream_prompts=3 if is_stream else None)), console)
    names = set()
    for step in range(1, 6):
        watch = SampleWatch.of(run, step)
        train_step(run, step - 1, 6, watch)
        assert len(watch.rows) == 3
        for row in watch.rows:
            (line,) = [line for line in lines if line["prompt"] in row["prompt"]]
            assert row["columns"] == {"name": line["name"], "tags": line["tags"]}
            names.add(line["name"])
    assert len(names) > 4


def test_a_divergence_that_is_not_finite_is_none():
    rollouts = make_rollouts([[BOS]], [[5, 6]])
    watch = SampleWatch(make_tokenizer(), step=1, count=9)
    watch(rollouts, select_prefix_positions(rollouts, 2), divergences(1.0, math.inf))
    assert [row["divergence"] for row in watch.rows] == [None]


def test_the_table_cuts_long_texts_and_takes_brackets_literally():
    rows = [
        {"step": 3, "prompt": "[/bold]", "rollout": "abcdefghij", "tokens": 10, "divergence": 0.25, "finished": False},
        {"step": 3, "prompt": "p", "rollout": "[red]ab", "tokens": 2, "divergence": None, "finished": True},
    ]
    console = Console(record=True, width=100)
    console.print(sample_table(rows, 8))
    text = console.export_text()
    assert "rollouts of step 3" in text and "[/bold]" in text and "[red]ab" in text
    assert "abcdefg…" in text and "abcdefgh" not in text
    assert "0.250" in text and "cut" in text and "finished" in text


def test_samples_are_those_of_the_step(tmp_path, monkeypatch):
    seen = []
    record_rollouts(monkeypatch, seen)
    console = Console(record=True, width=160)
    config = monitored_config(tmp_path, samples_every=2, samples=3, groups={"loss": LossConfig(prefix_tokens=2)})
    train(config, console)
    rows = samples(config)
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    tokenizer = make_tokenizer()
    for row, (step, place) in zip(rows, [(s, i) for s in (2, 4, 6) for i in range(3)], strict=True):
        rollouts = seen[step - 1]
        length = int(rollouts.response_lengths_B[place])
        assert row["rollout"] == tokenizer.decode(rollouts.response_ids_B_K[place, :length].tolist())
        assert row["tokens"] == length and row["scored_tokens"] == min(2, length)
        assert row["finished"] == bool(rollouts.stopped_by_eos_B[place])
        json.dumps(row, allow_nan=False)
    assert "rollouts of step 4" in console.export_text()


def test_the_divergence_of_a_sample_is_that_of_its_rollout(tmp_path, console, monkeypatch):
    seen = []
    record_rollouts(monkeypatch, seen)
    config = monitored_config(tmp_path, steps=1, samples_every=1)
    train(config, console)
    student, teacher = make_model(0), make_model(1)
    for row, sample in enumerate(samples(config)):
        ids_1_T = seen[0].token_ids_B_T[row, seen[0].attention_mask_B_T[row].bool()][None]
        with torch.no_grad():
            p, q = (
                model(ids_1_T).logits[0, -sample["tokens"] - 1 : -1].double().log_softmax(-1)
                for model in (student, teacher)
            )
        assert sample["divergence"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_samples_change_no_number_and_a_resumed_run_writes_them_again(tmp_path, console, monkeypatch):
    plain = tiny_config(tmp_path, "plain")
    whole = monitored_config(tmp_path, "whole", samples_every=2)
    halted = monitored_config(tmp_path, "halted", samples_every=2)
    train(plain, console)
    train(whole, console)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        train(halted, console)
    assert [row["step"] for row in samples(halted)] == [2] * 4
    with open(Path(halted.run.output_dir) / "samples.jsonl", "a") as lines:
        lines.write('{"kind": "sample", "step": 4}\n')  # of a step that was lost with the machine
    train(halted, console, resume=True)
    assert losses(plain) == losses(whole) == losses(halted)
    assert samples(halted) == samples(whole) and len(samples(whole)) == 12


def test_a_fresh_run_forgets_the_samples_of_a_run_without_checkpoint(tmp_path, console):
    config = monitored_config(tmp_path, steps=1, samples_every=1)
    begin_folder(config)
    (Path(config.run.output_dir) / "samples.jsonl").write_text('{"kind": "sample", "step": 99}\n')
    train(config, console)
    assert [row["step"] for row in samples(config)] == [1] * 4


# Trackers


class FakePackage(ModuleType):
    """A tracker's package as far as accelerate calls it: wandb and trackio have the same functions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.opened, self.logged, self.options, self.is_finished = [], [], {}, False
        self.config = SimpleNamespace(update=lambda values, **_: self.options.update(values))

    def init(self, **arguments):
        self.opened.append(arguments)
        return self

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


class FakeWriter:
    """torch.utils.tensorboard.SummaryWriter, as far as accelerate calls it."""

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.options, self.is_closed = folder, {}, None, False

    def add_hparams(self, values, metric_dict):
        self.options = values

    def add_scalar(self, name, value, global_step):
        self.scalars.setdefault(name, []).append((global_step, value))

    def flush(self): ...

    def close(self):
        self.is_closed = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_number(tmp_path, console, monkeypatch, name):
    pytest.importorskip("accelerate", reason="accelerate is optional")
    package = FakePackage(name)
    monkeypatch.setitem(sys.modules, name, package)
    config = monitored_config(tmp_path, steps=2, trackers=[name], project="study")
    train(config, console)
    assert package.opened == [{"project": "study", "name": "run"}] and package.is_finished
    assert package.options["rollout/horizon"] == 5 and package.options["loss/prefix_tokens"] == "None"
    steps = read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "step")
    assert [step for step, _ in package.logged] == [1, 2]
    for record, (_, values) in zip(steps, package.logged, strict=True):
        assert values["train/loss"] == record["loss"]
        assert values["train/divergence_by_position/0-4"] == record["divergence_by_position"]["0-4"]
        assert values["train/stage_seconds/backward"] == record["stage_seconds"]["backward"]
        assert all(type(value) is float for value in values.values())


def test_tensorboard_writes_into_the_folder_of_the_run(tmp_path, console, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is optional")
    writers = []
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: writers.append(FakeWriter(folder)) or writers[-1]
    package = ModuleType("tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(torch.utils, "tensorboard", board, raising=False)
    probe = {"probe_every": 2, "probe_prompts": 2, "probe_tokens": 6}
    config = monitored_config(tmp_path, steps=2, trackers=["tensorboard"], **probe)
    train(config, console)
    (writer,) = writers
    assert writer.folder == str(tmp_path / "run" / "tensorboard") and writer.is_closed
    assert writer.options["run/steps"] == 2
    assert [step for step, _ in writer.scalars["train/loss"]] == [1, 2]
    assert [value for _, value in writer.scalars["train/loss"]] == losses(config)
    assert [step for step, _ in writer.scalars["probe/divergence_behind"]] == [0, 2]


def test_numbers_of_a_record():
    record = {
        "kind": "evaluation",
        "step": 3,
        "accuracy": 0.5,
        "standard_error": None,
        "estimates": {"a": {"value": 1, "standard_error": None}},
        "name": "text",
        "flag": True,
        "rows": [1, 2],
    }
    assert numbers_of(record) == {"evaluation/accuracy": 0.5, "evaluation/estimates/a/value": 1.0}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path, console, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in ("wandb", "accelerate") else object())
    config = monitored_config(tmp_path, trackers=["tensorboard", "wandb"])
    config = replace(config, model=replace(config.model, student="no/such/model"))
    message = (
        r"monitoring\.trackers must name installed packages, got \['tensorboard', 'wandb'\] without accelerate and wandb "
        r"\(pip install accelerate wandb\)"
    )
    with pytest.raises(InputError, match=message):
        train(config, console)
    check_trackers([])  # nobody asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples_every": 0}, r"monitoring\.samples_every must be >= 1 or unset, got 0"),
        ({"samples": 0}, r"monitoring\.samples must be >= 1, got 0"),
        ({"sample_width": 0}, r"monitoring\.sample_width must be >= 1, got 0"),
        ({"trackers": ["wandb", "wandb"]}, r"monitoring\.trackers must be without repeats, got \['wandb', 'wandb'\]"),
        ({"project": ""}, r"monitoring\.project must be a name, got ''"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        MonitoringConfig(**fields)


def test_by_default_there_are_samples_each_50_steps(tmp_path):
    console = Console(record=True, width=120)
    train(tiny_config(tmp_path, steps=51, rollout=RolloutConfig(horizon=1, batch_size=5)), console)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "samples.jsonl")] == [50] * 4
    assert console.export_text().count("rollouts of step") == 1


def test_samples_can_be_off_and_then_nothing_more_is_written(tmp_path, console):
    train(monitored_config(tmp_path, steps=1, samples_every=None), console)
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert {record["kind"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {"step"}
