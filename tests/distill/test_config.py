"""Is every option defined once, checked, read somewhere, and saved whole?  pytest tests/distill/test_config.py"""

import functools
import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from options_read import options_read

from esr_distill import config as config_module
from esr_distill.config import (
    DataConfig,
    EvaluationConfig,
    HorizonScheduleConfig,
    LoraSettings,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SelectionConfig,
    SelectionRule,
    TrainConfig,
)
from esr_distill.config_file import changed_options, load_saved_config, read_config, save_config, train_parser
from esr_distill.demo.settings import DemoConfig
from esr_distill.input_error import InputError
from esr_distill.real_demo.settings import RealDemoConfig

PACKAGE = Path(config_module.__file__).parents[1]
REQUIRED = ["--model.student", "s", "--model.teacher", "t", "--data.prompts", "p.jsonl"]


def make_config(**groups) -> TrainConfig:
    return TrainConfig(**({"model": ModelConfig("s", "t"), "data": DataConfig("p.jsonl")} | groups))


@pytest.mark.parametrize(
    "settings",
    [value for value in vars(config_module).values() if is_dataclass(value)] + [DemoConfig, RealDemoConfig],
    ids=lambda settings: settings.__name__,
)
def test_every_option_is_read(settings):
    read = package_reads()
    unread = [field.name for field in fields(settings) if (settings.__name__, field.name) not in read]
    assert not unread


@functools.cache
def package_reads() -> set[tuple[str, str]]:
    return options_read(PACKAGE)


def test_only_a_reading_of_the_group_itself_counts(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings.py").write_text(
        """
class Loss:
    read: int
    checked: int
    of_another: int
    in_a_property: int
    in_an_unread_property: int
    def __post_init__(self): self.checked
    @property
    def used(self) -> int: return self.in_a_property
    @property
    def unused(self) -> int: return self.in_an_unread_property
class Config:
    loss: Loss
    rules: list[Loss]
"""
    )
    (tmp_path / "train.py").write_text(
        """
class Run:
    config: Config
class Other:
    of_another: int
def step(run: Run, other: Other):
    config, loss = run.config, run.config.loss
    print(loss.read, other.of_another, unknown.of_another, loss.used)
def check_step(config: Config): config.loss.checked
def tell(config: Config): return [rule.used for rule in config.rules]
"""
    )
    (tmp_path / "model_card.py").write_text("def tell(loss: Loss): return loss.checked")
    found = {name for owner, name in options_read(tmp_path) if owner == "Loss"}
    assert found == {"read", "used", "in_a_property"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutConfig(horizon=0), r"rollout\.horizon must be >= 1, got 0"),
        (lambda: RolloutConfig(batch_size=0), r"rollout\.batch_size must be >= 1, got 0"),
        (
            lambda: RolloutConfig(batch_size=6, samples_per_prompt=4),
            r"rollout\.samples_per_prompt must be >= 1 and a divisor of batch_size 6, got 4",
        ),
        (lambda: RolloutConfig(samples_per_prompt=0), r"rollout\.samples_per_prompt must be >= 1 .*, got 0"),
        (
            lambda: RolloutConfig(backend="vllm", vllm_url="http://h:1"),
            r"rollout\.vllm_weights_folder must be set for rollout\.backend vllm, got None",
        ),
        (
            lambda: RolloutConfig(vllm_url="http://h:1"),
            r"rollout\.vllm_url must be unset unless rollout\.backend is vllm, got 'http://h:1'",
        ),
        (
            lambda: RolloutConfig(vllm_weights_folder_on_server="/w"),
            r"rollout\.vllm_weights_folder_on_server must be unset unless rollout\.backend is vllm, got '/w'",
        ),
        (
            lambda: RolloutConfig(backend="hf_generate", cuda_graphs=False),
            r"rollout\.cuda_graphs must be true unless rollout\.backend is inprocess, got False",
        ),
        (
            lambda: RolloutConfig(backend="hf_generate", compile_step=True),
            r"rollout\.compile_step must be false unless rollout\.backend is inprocess, got True",
        ),
        (lambda: RolloutConfig(sampling_temperature=-1.0), r"sampling_temperature must be >= 0, got -1\.0"),
        (lambda: RolloutConfig(top_p=1.5), r"top_p must be in \[0, 1\], got 1\.5"),
        (lambda: ModelConfig(teacher="t"), r"model\.student must be a hub id or a local folder, got ''"),
        (lambda: ModelConfig("s", "t", dtype="bfloat16", autocast=True), r"model\.autocast must be false unless"),
        (lambda: DataConfig(), r"data\.prompts must be the path of a JSONL file"),
        (lambda: DataConfig("p", chat_template=False, system_prompt="be brief"), r"data\.system_prompt must be unset"),
        (lambda: LossConfig(loss_temperature=0.0), r"loss_temperature must be > 0, got 0\.0"),
        (lambda: LossConfig(prefix_tokens=0), r"prefix_tokens must be >= 1 or unset, got 0"),
        (lambda: OptimizerConfig(learning_rate=0.0), r"learning_rate must be > 0, got 0\.0"),
        (lambda: EvaluationConfig(every=0), r"evaluation\.every must be >= 1, got 0"),
        (lambda: RunConfig(steps=0), r"run\.steps must be >= 1, got 0"),
        (
            lambda: make_config(rollout=RolloutConfig(horizon=8), loss=LossConfig(prefix_tokens=9)),
            r"loss\.prefix_tokens must be <= rollout\.horizon = 8, got 9",
        ),
        (
            lambda: make_config(
                horizon=HorizonScheduleConfig("adaptive", start=2, increment=1, agreement=0.8),
                loss=LossConfig(prefix_tokens=3),
            ),
            r"loss\.prefix_tokens must be unset for horizon\.kind adaptive, which looks at the last tokens, got 3",
        ),
        (
            lambda: make_config(rollout=RolloutConfig(horizon=6), horizon=HorizonScheduleConfig("linear", start=100)),
            r"horizon\.start must be below rollout\.horizon = 6, or the horizon never moves, got 100",
        ),
        (
            lambda: make_config(rollout=RolloutConfig(horizon=6), horizon=HorizonScheduleConfig("linear", start=6)),
            r"horizon\.start must be below rollout\.horizon = 6, or the horizon never moves, got 6",
        ),
    ],
)
def test_contradictions_and_ranges_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_trained_tokens_are_the_prefix_or_else_the_horizon():
    assert make_config(rollout=RolloutConfig(horizon=30)).trained_tokens == 30
    assert make_config(rollout=RolloutConfig(horizon=30), loss=LossConfig(prefix_tokens=7)).trained_tokens == 7


def parse(arguments: list[str]) -> TrainConfig:
    parser = train_parser()
    return read_config(parser.parse_args(arguments), parser)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"rollout": {"horizon": 18, "top_p": 0.5}, "optimizer": {"betas": [0.8, 0.9]}}))
    config = parse(["--config", str(file), *REQUIRED, "--rollout.top_p", "0.25"])
    assert (config.rollout.horizon, config.rollout.top_p, config.rollout.batch_size) == (18, 0.25, 16)
    assert tuple(config.optimizer.betas) == (0.8, 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollout.horizn", "3"], "rollout.horizn"),
        (["--loss.normalizer", "mean"], "loss.normalizer"),
        (["--rollout.horizon", "many"], "rollout.horizon"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_unknown_names_and_values_end_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([*REQUIRED, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {steps: 2, steps: 5}", "steps must be given once, got it in lines 1 and 1"),
        (
            "rollout:\n  horizon: 5\nrun:\n  steps: 2\nrollout:\n  top_p: 0.5\n",
            "rollout must be given once, got it in lines 1 and 5",
        ),
        (
            "selection:\n  rules:\n  - kind: prefix\n    tokens: 3\n    tokens: 4\n",
            "tokens must be given once, got it in lines 4 and 5",
        ),
        ('{"run": {"steps": 2, "steps": 5}}', "steps must be given once"),
    ],
)
def test_a_key_that_a_file_has_twice_is_refused(tmp_path, capsys, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse(["--config", str(file), *REQUIRED])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["[{kind: prefix, tokens: 3, tokens: 4}]", "[{kind: prefix, kind: prefix, tokens: 3}]"]
)
def test_a_key_that_a_flag_has_twice_is_refused(capsys, value):
    with pytest.raises(SystemExit):
        parse([*REQUIRED, "--selection.rules", value])
    assert "selection.rules" in capsys.readouterr().err


def test_a_text_may_look_like_a_mapping():
    data = parse([*REQUIRED, "--data.system_prompt", "{a: 1, a: 2}"]).data
    assert data.system_prompt == "{a: 1, a: 2}"


@pytest.mark.parametrize("flag", ["--run.out", "--max_comp", "--rollout.hor"])
def test_flags_are_not_abbreviated(capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        parse([*REQUIRED, flag, "9"])
    assert stopped.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_an_unknown_name_in_the_file_is_refused(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("rollout:\n  horizn: 3\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(file), *REQUIRED])
    assert "horizn" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["loss:", "loss: 4"])
def test_a_group_without_options_is_refused(tmp_path, text):
    """`loss:` is what is left of a group whose lines were all commented out."""
    file = tmp_path / "run.yaml"
    file.write_text(f"run:\n  steps: 3\n{text}\n")
    with pytest.raises(InputError, match="loss must be a group of options, got (None|4)"):
        parse(["--config", str(file), *REQUIRED])


def test_options_without_their_defaults_are_told():
    config = make_config(
        rollout=RolloutConfig(horizon=33),
        model=ModelConfig("s", "t", lora=LoraSettings(use_peft=True, lora_r=8)),
        selection=SelectionConfig([SelectionRule("any", rules=[SelectionRule("prefix", tokens=3)])]),
    )
    assert changed_options(config) == [
        "model.student: s",
        "model.teacher: t",
        "model.lora.use_peft: True",
        "model.lora.lora_r: 8",
        "data.prompts: p.jsonl",
        "rollout.horizon: 33",
        "selection.rules: [{'kind': 'any', 'scope': 'rollout', 'complement': False, 'rules': "
        "[{'kind': 'prefix', 'tokens': 3, 'scope': 'rollout', 'complement': False}]}]",
    ]


def test_a_saved_config_comes_back_equal(tmp_path):
    either = [
        SelectionRule("all", rules=[SelectionRule("suffix", start=2), SelectionRule("finished", complement=True)])
    ]
    config = make_config(
        selection=SelectionConfig([SelectionRule("any", rules=[*either, SelectionRule("token_ids", token_ids=[7])])]),
        rollout=RolloutConfig(horizon=33, sampling_temperature=0.3),
        loss=LossConfig(divergence="jsd", divergence_parameter=0.25, prefix_tokens=11, normalizer="sum"),
        optimizer=OptimizerConfig(betas=(0.7, 0.8)),
        evaluation=EvaluationConfig(prompts="e.jsonl", limit=5),
        run=RunConfig(output_dir=str(tmp_path), steps=7),
    )
    save_config(config, tmp_path)
    assert load_saved_config(tmp_path) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=math.inf), r"learning_rate must be a finite number, got inf"),
        (
            lambda: RolloutConfig(sampling_temperature=math.inf),
            r"sampling_temperature must be a finite number, got inf",
        ),
        (lambda: LossConfig(loss_temperature=math.nan), r"loss_temperature must be a finite number, got nan"),
        (lambda: RunConfig(seed=2**64), r"run\.seed must be in \[0, 2\*\*64\)"),
        (
            lambda: ModelConfig("s", "t", autocast=True, attn_implementation="flash_attention_2"),
            r"attn_implementation must be auto, sdpa or eager unless both models run in bfloat16",
        ),
    ],
)
def test_numbers_that_would_only_fail_later_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_flash_attention_is_accepted_where_both_models_run_in_16_bits():
    ModelConfig("s", "t", autocast=True, teacher_dtype="bfloat16", attn_implementation="flash_attention_2")
