"""Does a run that begins leave alone what is not a run's?  pytest tests/distill/test_run_folder.py"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_command_line import train_arguments
from test_train import losses, tiny_config
from tiny_models import save_pair, write_prompts

import esr_distill.train as train_module
from esr_distill.command_line import main
from esr_distill.config import MonitoringConfig
from esr_distill.config_file import load_saved_config
from esr_distill.input_error import InputError
from esr_distill.train import train

QUIET = Console(quiet=True)
BY_HAND = "# my run\nmodel: {student: s, teacher: t}\ndata: {prompts: p.jsonl}\n"


@pytest.mark.parametrize(
    "text",
    [
        BY_HAND,
        "model:\n  student: s\n  teacher: t\ndata:\n  prompts: p.jsonl\n",  # as a program writes it, but not all of it
        "",
        "- 1\n",
        "a: [",
        "\ud800",
    ],
)
def test_a_config_of_the_users_own_stays(tmp_path, text):
    config = tiny_config(tmp_path, steps=1)
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(
        InputError, match=r"^run\.output_dir must not hold a config\.yaml of yours.*give the file another name"
    ):
        train(config, QUIET)
    assert path.read_bytes() == text.encode(errors="surrogatepass")
    assert [found.name for found in path.parent.iterdir()] == ["config.yaml"]


def test_by_the_command_with_a_config_inside_its_own_folder(tmp_path, capsys):
    save_pair(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", count=12)
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_text("# my run\nrun: {steps: 1}\n")
    _, *flags = train_arguments(tmp_path)
    assert main(["train", "--config", str(path), *flags]) == 2
    assert f"got '{path}', which no run wrote; give the file another name" in capsys.readouterr().err
    assert path.read_text() == "# my run\nrun: {steps: 1}\n"
    path.rename(path.with_name("mine.yaml"))
    assert main(["train", "--config", str(path.with_name("mine.yaml")), *flags]) == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_metrics_of_something_else_stay(tmp_path, name):
    config = tiny_config(tmp_path, steps=1)
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text("mine\n")
    with pytest.raises(
        InputError, match=rf"^run\.output_dir must not hold the {name} of something else.*move the file"
    ):
        train(config, QUIET)
    assert path.read_text() == "mine\n"


def kill_in_step_2(config, monkeypatch) -> None:
    """A run that ends without a checkpoint."""
    original = train_module.train_step

    def crash(run, step, *rest):
        if step == 1:
            raise RuntimeError("power failure")
        return original(run, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
        patch.setattr(train_module, "train_step", crash)
        train(config, QUIET)
    assert len(losses(config)) == 1


@pytest.mark.parametrize("horizon", [5, 7])
def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_or_other_options(
    tmp_path, monkeypatch, horizon
):
    config = tiny_config(tmp_path, steps=2)
    odd = MonitoringConfig(project="1: é\n # '\"" + 50 * " long")
    config = replace(config, monitoring=odd)
    kill_in_step_2(config, monkeypatch)
    again = replace(config, rollout=replace(config.rollout, horizon=horizon))
    assert train(again, QUIET).finished
    assert len(losses(again)) == 2 and load_saved_config(tmp_path / "run").rollout.horizon == horizon


def test_a_config_of_a_killed_run_that_got_a_comment_stays(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=2)
    kill_in_step_2(config, monkeypatch)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text() + "# try 2\n")
    with pytest.raises(InputError, match=r"must not hold a config\.yaml of yours"):
        train(config, QUIET)
    assert len(losses(config)) == 1 and path.read_text().endswith("# try 2\n")


def test_a_saved_config_has_every_group(tmp_path):
    """What the check for a run's own file goes by."""
    train(tiny_config(tmp_path, steps=1), QUIET)
    saved = yaml.safe_load(Path(tmp_path / "run" / "config.yaml").read_text())
    assert {"model", "data", "rollout", "loss", "optimizer", "run"} < saved.keys()
