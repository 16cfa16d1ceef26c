"""Do options by TRL's names become ours, and only where they mean the same?  pytest tests/distill/test_trl_names.py"""

from dataclasses import fields

import pytest

from esr_distill.config import TrainConfig
from esr_distill.config_file import load_saved_config, parse_train_options, save_config
from esr_distill.input_error import InputError
from esr_distill.trl_names import TRL_NAMES

THEIRS = ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "p.jsonl"]


def test_a_command_in_their_names(tmp_path):
    arguments = ["--max_completion_length", "77", "--beta", "0.25"]
    arguments += ["--learning_rate", "1e-4", "--max_steps", "9", "--output_dir", str(tmp_path), "--use_peft", "true"]
    config = parse_train_options([*THEIRS, *arguments, "--lora_r", "8"])
    assert (config.model.student, config.model.teacher, config.data.prompts) == ("s", "t", "p.jsonl")
    assert (config.rollout.horizon, config.run.steps) == (77, 9)
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
        (
            ["--lr_scheduler_type", "constant"],
            "lr_scheduler_type must be one of cosine, linear, constant_with_warmup, got",
        ),
        (["--warmup_steps", "20"], r"warmup_steps must be a share of the steps here, in \[0, 1\), got 20\.0"),
        (
            ["--warmup_steps", "0.1", "--warmup_ratio", "0.1"],
            "warmup_steps must not be given with warmup_ratio, since both are optimizer.warmup_fraction, got both",
        ),
        (["--report_to", "all"], "report_to must be none or some of tensorboard, wandb, trackio, got 'all'"),
        (["--report_to", "[wandb, mlflow]"], "report_to must be none or some of .*, got 'mlflow'"),
        (
            ["--adam_beta1", "0.8", "--optimizer.betas", "[0.9, 0.9]"],
            "adam_beta1 must not be given with optimizer.betas",
        ),
        (["--adam_beta2", "1.5"], r"optimizer\.betas must be in \[0, 1\), got \(0\.9, 1\.5\)"),
        (
            ["--load_in_4bit", "true"],
            r"model\.lora\.load_in_4bit must be False or unset unless model\.lora\.use_peft is",
        ),
    ],
)
def test_both_names_and_wrong_values_are_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_train_options([*THEIRS, *arguments])


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_name_that_means_something_else_is_refused_with_what_to_set(tmp_path, name):
    """In TRL a batch is their product times the processes; here accumulation divides rollout.batch_size."""
    message = rf"{name} must be left out, got 2: TRL's batch is .* here rollout\.batch_size is that product"
    with pytest.raises(InputError, match=message):
        parse_train_options([*THEIRS, f"--{name}", "2"])
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 2\n")
    with pytest.raises(InputError, match=message):
        parse_train_options([*THEIRS, "--config", str(file)])


def test_an_unknown_name_of_theirs_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_train_options([*THEIRS, "--steps_per_generation", "8"])
    assert "steps_per_generation" in capsys.readouterr().err


def value_of(config: TrainConfig, option: str) -> object:
    for name in option.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "bfloat16"], {"model.dtype": "bfloat16", "model.teacher_dtype": "bfloat16"}),
        (["--attn_implementation", "eager"], {"model.attn_implementation": "eager"}),
        (["--lr_scheduler_type", "linear"], {"optimizer.schedule": "linear", "optimizer.warmup_fraction": 0.1}),
        (["--lr_scheduler_type", "constant_with_warmup"], {"optimizer.schedule": "constant"}),
        (["--warmup_ratio", "0.25"], {"optimizer.warmup_fraction": 0.25}),
        (["--warmup_steps", "0"], {"optimizer.warmup_fraction": 0.0}),
        (["--adam_beta1", "0.8"], {"optimizer.betas": (0.8, 0.999)}),
        (["--adam_beta2", "0.95"], {"optimizer.betas": (0.9, 0.95)}),
        (["--adam_beta2", "0.95", "--adam_beta1", "0.8"], {"optimizer.betas": (0.8, 0.95)}),
        (["--eval_steps", "7"], {"evaluation.every": 7}),
        (["--report_to", "none"], {"monitoring.trackers": []}),
        (["--report_to", "wandb"], {"monitoring.trackers": ["wandb"]}),
        (["--report_to", "[tensorboard, trackio]"], {"monitoring.trackers": ["tensorboard", "trackio"]}),
        (
            ["--use_peft", "true", "--lora_target_modules", "[q_proj, v_proj]"],
            {"model.lora.lora_target_modules": ("q_proj", "v_proj")},
        ),
        (
            ["--use_peft", "true", "--lora_target_modules", "all-linear"],
            {"model.lora.lora_target_modules": "all-linear"},
        ),
    ],
)
def test_names_of_one_meaning(arguments, expected):
    config = parse_train_options([*THEIRS, *arguments])
    assert {option: value_of(config, option) for option in expected} == expected


def test_what_4_bits_are_is_said(capsys):
    config = parse_train_options([*THEIRS, "--use_peft", "true", "--load_in_4bit", "true"])
    assert config.model.lora.load_in_4bit
    assert "load_in_4bit is nf4 with nested quantisation here" in capsys.readouterr().err


# Values for the names that do not take 0.5.
VALUES = {"lr_scheduler_type": "cosine", "report_to": "wandb"}


def test_every_name_becomes_an_option_that_exists():
    config = parse_train_options(THEIRS)
    for name, trl_name in TRL_NAMES.items():
        for option in trl_name.options(VALUES.get(name, 0.5)):
            *groups, last = option.split(".")
            assert last in [field.name for field in fields(value_of(config, ".".join(groups)))]
