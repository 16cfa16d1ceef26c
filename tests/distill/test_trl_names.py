"""Do options by TRL's names become ours, and only where they mean the same?  pytest tests/distill/test_trl_names.py"""

from dataclasses import fields

import pytest

from esr_distill.config_file import load_saved_config, parse_train_options, save_config
from esr_distill.input_error import InputError
from esr_distill.trl_names import TRL_NAMES

THEIRS = ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "p.jsonl"]


def test_a_command_in_their_names(tmp_path):
    arguments = ["--max_completion_length", "77", "--beta", "0.25", "--gradient_accumulation_steps", "2"]
    arguments += ["--learning_rate", "1e-4", "--max_steps", "9", "--output_dir", str(tmp_path), "--use_peft", "true"]
    config = parse_train_options([*THEIRS, *arguments, "--lora_r", "8"])
    assert (config.model.student, config.model.teacher, config.data.prompts) == ("s", "t", "p.jsonl")
    assert (config.rollout.horizon, config.optimizer.accumulation_steps, config.run.steps) == (77, 2, 9)
    assert (config.loss.divergence, config.loss.divergence_parameter) == ("jsd", 0.25)
    assert (config.model.lora.use_peft, config.model.lora.lora_r, config.optimizer.learning_rate) == (True, 8, 1e-4)
    save_config(config, tmp_path)
    assert load_saved_config(tmp_path) == config
    text = (tmp_path / "config.yaml").read_text()
    assert "max_completion_length" not in text and "horizon: 77" in text


@pytest.mark.parametrize(("beta", "divergence"), [("0", "forward_kl"), ("1", "reverse_kl"), ("1.0", "reverse_kl")])
def test_the_ends_of_beta_are_the_two_kls(beta, divergence):
    loss = parse_train_options([*THEIRS, "--beta", beta]).loss
    assert (loss.divergence, loss.divergence_parameter) == (divergence, None)


def test_a_temperature_is_both_of_ours_and_is_said_to_be(capsys):
    config = parse_train_options([*THEIRS, "--temperature", "0.9"])
    assert (config.rollout.sampling_temperature, config.loss.loss_temperature) == (0.9, 0.9)
    message = capsys.readouterr().err
    assert "temperature 0.9 is taken for both temperatures" in message and "loss.loss_temperature" in message
    parse_train_options(THEIRS)
    assert capsys.readouterr().err == ""


def test_in_a_file_beside_our_groups_and_over_a_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: full\nmax_completion_length: 50\nrollout:\n  batch_size: 4\n")
    config = parse_train_options([*THEIRS, "--config", str(file)])
    assert (config.rollout.horizon, config.rollout.batch_size) == (50, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_completion_length", "5", "--rollout.horizon", "5"], "max_completion_length must not be given with"),
        (["--temperature", "1", "--loss.loss_temperature", "1"], "temperature must not be given with loss.loss_temp"),
        (["--beta", "1.5"], r"beta must be in \[0, 1\], got 1.5"),
    ],
)
def test_both_names_and_wrong_values_are_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_train_options([*THEIRS, *arguments])


def test_a_name_that_means_something_else_is_unknown(capsys):
    with pytest.raises(SystemExit):
        parse_train_options([*THEIRS, "--per_device_train_batch_size", "8"])
    assert "per_device_train_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRL_NAMES)
def test_every_name_becomes_an_option_that_exists(name):
    for option in TRL_NAMES[name].options(0.5):
        *groups, last = option.split(".")
        group = parse_train_options(THEIRS)
        for part in groups:
            group = getattr(group, part)
        assert last in [field.name for field in fields(group)]
