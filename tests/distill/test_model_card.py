"""Does the card of a checkpoint say what was done, and nothing of the machine's folders?

pytest tests/distill/test_model_card.py
"""

from dataclasses import replace

import pytest
import torch
import transformers
import yaml

from esr_distill.config import (
    DataConfig,
    EvaluationConfig,
    HorizonScheduleConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SelectionConfig,
    SelectionRule,
    TrainConfig,
    WeightRule,
)
from esr_distill.config.lora import LoraSettings
from esr_distill.config_file import parse_train_options
from esr_distill.model_card import model_card

CONFIG = TrainConfig(
    model=ModelConfig("owner/student", "/elsewhere/somebody/teacher", teacher_dtype="bfloat16"),
    data=DataConfig("/elsewhere/somebody/prompts.jsonl"),
    rollout=RolloutConfig(
        horizon=50, backend="vllm", vllm_url="http://host:8000", vllm_weights_folder="/shared/weights"
    ),
    loss=LossConfig(divergence="jsd", divergence_parameter=0.25, normalizer="token_mean"),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    run=RunConfig("/elsewhere/somebody/run", steps=40, seed=7),
)


def rows(card: str) -> dict[str, str]:
    lines = [line.split("|") for line in card.splitlines() if line.startswith("| ") and line != "| | |"]
    return {name.strip(): value.strip() for _, name, value, _ in lines}


def test_facts_of_the_config_and_the_machine():
    card = model_card(CONFIG, 20, None)
    assert card.split("\n\n")[1] == "# A student after 20 steps of on-policy distillation"
    found = rows(card)
    assert found["Student"] == "`owner/student`, float32"
    assert found["Teacher"] == "`teacher` (a local folder), bfloat16"
    assert found["Trained"] == "all weights"
    assert found["Horizon"] == "50 response tokens"
    assert found["Divergence"] == "jsd (0.25), normaliser token_mean"
    assert found["Sampling"] == "temperature 0.7, top-p 0.95"
    assert found["Steps"] == "20 of 40, 16 rollouts each, seed 7"
    assert found["Trained tokens"] == "all that are drawn"
    assert "Accuracy" not in found and "Early Stopping Rollout, arXiv 2605.27028" in found["Method"]
    assert f"torch {torch.__version__.split('+')[0]}" in found["Versions"]
    assert f"transformers {transformers.__version__}" in found["Versions"]
    assert set(card[card.index("Options") :].splitlines()[2:]) == {
        "- `rollout.horizon: 50`",
        "- `rollout.backend: vllm`",
        "- `loss.divergence: jsd`",
        "- `loss.divergence_parameter: 0.25`",
        "- `loss.normalizer: token_mean`",
        "- `optimizer.learning_rate: 0.0001`",
    }


@pytest.mark.parametrize("secret", ["somebody", "host:8000", "shared/weights"])
def test_folders_and_addresses_stay_out(secret):
    assert secret not in model_card(CONFIG, 20, None)


def test_the_head_is_what_the_hub_reads(tmp_path):
    head = yaml.safe_load(model_card(CONFIG, 20, None).split("---\n")[1])
    assert head == {
        "library_name": "transformers",
        "tags": ["on-policy-distillation", "early-stopping-rollout"],
        "base_model": "owner/student",
    }
    local = replace(CONFIG, model=replace(CONFIG.model, student=str(tmp_path)))
    card = model_card(local, 20, None)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert rows(card)["Student"] == f"`{tmp_path.name}` (a local folder), float32" and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("./gone/model", "`model` (a local folder)"),
        ("~/gone/model", "`model` (a local folder)"),
        ("gone/somewhere/model", "`model` (a local folder)"),
        ("owner/model", "`owner/model`"),
        ("model", "`model`"),
    ],
)
def test_a_folder_is_told_from_a_hub_id_though_it_is_gone(source, name):
    card = model_card(replace(CONFIG, model=ModelConfig(source, source)), 20, None)
    assert rows(card)["Student"] == f"{name}, float32" and rows(card)["Teacher"] == f"{name}, float32"
    assert ("base_model" in yaml.safe_load(card.split("---\n")[1])) is (name == f"`{source}`")
    assert "somewhere" not in card


# The method


def of_preset(name: str, **options: str) -> TrainConfig:
    """As `esr-distill train --preset NAME` has it."""
    words = {"model.student": "owner/student", "model.teacher": "owner/teacher", "data.prompts": "p.jsonl"} | options
    return parse_train_options(["--preset", name, *(word for n, v in words.items() for word in (f"--{n}", v))])


BASE = "on-policy distillation on rollouts "
FULL = f"{BASE}of at most 3584 tokens"
ALL = "all that are drawn"


@pytest.mark.parametrize(
    ("preset", "method", "horizon", "trained"),
    [
        ("esr", f"{BASE}of at most 100 tokens (Early Stopping Rollout, arXiv 2605.27028)", "100 response tokens", ALL),
        ("full", FULL, "3584 response tokens", ALL),
        (
            "full-loss-masked",
            f"{FULL}, of which the first 100 train",
            "3584 response tokens",
            "the first 100 of each rollout",
        ),
        (
            "topd",
            f"{BASE}cut at a share of the longest horizon (TOPD, arXiv 2605.31490)",
            "896 response tokens, 0.25 of 3584",
            ALL,
        ),
        (
            "popd",
            f"{BASE}whose horizon grows in stairs (POPD, arXiv 2605.31490)",
            "100 response tokens at first, 100 more each 10 steps, at most 3584; 300 in step 23",
            ALL,
        ),
        (
            "middle-window",
            f"{FULL}, of which selected tokens train",
            "3584 response tokens",
            "those that the rule keeps: window (tokens 100, start middle)",
        ),
        (
            "iw-opd",
            f"{FULL}, token by token with weights",
            "3584 response tokens",
            f"{ALL}; weighted by prefix_ratio (rate 0.5)",
        ),
    ],
)
def test_the_method_is_told_from_the_options(preset, method, horizon, trained):
    card = model_card(of_preset(preset), 23, None)
    found = rows(card)
    assert (found["Method"], found["Horizon"], found["Trained tokens"]) == (method, horizon, trained)
    assert ("early-stopping" in card) is ("Early Stopping" in card) is (preset == "esr")


def test_what_was_drawn_and_not_what_was_allowed():
    """With a longest horizon of 40, TOPD's quarter is 10."""
    assert (
        rows(model_card(of_preset("topd", **{"rollout.horizon": "40"}), 5, None))["Horizon"]
        == "10 response tokens, 0.25 of 40"
    )


@pytest.mark.parametrize(("step", "last"), [(1, 1), (20, 48), (40, 97)])
def test_a_horizon_that_grows_evenly(step, last):
    schedule = HorizonScheduleConfig("linear", start=1)
    config = replace(CONFIG, rollout=RolloutConfig(horizon=100), horizon=schedule)  # 1 + floor(99 (step - 1) / 40)
    found = rows(model_card(config, step, None))
    assert found["Horizon"] == f"1 response tokens at first, growing evenly to 100; {last} in step {step}"
    assert found["Method"] == f"{BASE}whose horizon grows evenly (the progressive run of arXiv 2605.27028)"


def test_an_adaptive_horizon_is_what_the_run_says():
    schedule = HorizonScheduleConfig("adaptive", start=20, increment=5, agreement=0.8)
    config = replace(CONFIG, rollout=RolloutConfig(horizon=300), horizon=schedule)
    moves = "20 response tokens at first, 5 more or fewer by the agreement of the models, at most 300"
    assert rows(model_card(config, 9, None))["Horizon"] == moves
    assert rows(model_card(config, 9, None, horizon=35))["Horizon"] == f"{moves}; 35 after step 9"
    assert "early-stopping" not in model_card(config, 9, None)


@pytest.mark.parametrize(("horizon", "max_tokens", "is_early"), [(64, 64, False), (63, 64, True), (301, 4000, False)])
def test_a_rollout_as_long_as_a_whole_reply_stops_early_of_nothing(horizon, max_tokens, is_early):
    evaluation = EvaluationConfig("p.jsonl", max_tokens=max_tokens)
    config = replace(CONFIG, rollout=RolloutConfig(horizon=horizon), evaluation=evaluation)
    card = model_card(config, 5, None)
    assert ("Early Stopping Rollout" in card) is ("early-stopping-rollout" in card) is is_early


def test_rules_weights_gate_and_filters_in_words():
    selection = SelectionConfig(
        rules=[
            SelectionRule("token_ids", token_ids=list(range(50)), complement=True),
            SelectionRule("top", score="student_entropy", tokens=3, scope="batch"),
        ],
        combine="any",
        weights=[WeightRule("decay", rate=0.5, floor=0.25), WeightRule("prefix_ratio", rate=2.0)],
        keep_eos=False,
    )
    loss = LossConfig(prefix_tokens=20, gated_divergence="forward_kl", gate_coefficient=0.5, gate_entropy=0.8)
    rollout = RolloutConfig(horizon=50, top_k=40, min_p=0.01)
    card = model_card(replace(CONFIG, selection=selection, loss=loss, rollout=rollout), 20, None)
    assert rows(card)["Trained tokens"] == (
        "those among the first 20 of each rollout that any of the rules keep: token_ids (token_ids 50 ids, complement True); "
        "top (tokens 3, score student_entropy, scope batch); without the end-of-sequence token; "
        "weighted by decay (rate 0.5, floor 0.25) times prefix_ratio (rate 2.0)"
    )
    assert rows(card)["Divergence"] == (
        "reverse_kl, plus 0.5 forward_kl where the teacher's entropy is above 0.8 nats, normaliser sequence_mean"
    )
    assert rows(card)["Sampling"] == "temperature 0.7, top-p 0.95, top-k 40, min-p 0.01"
    weights = '[{"kind": "decay", "rate": 0.5, "floor": 0.25}, {"kind": "prefix_ratio", "rate": 2.0}]'
    assert f"- `selection.weights: {weights}`\n" in card


# Adapters, and what was measured


def test_an_adapter_and_its_base_model_for_a_teacher():
    lora = LoraSettings(use_peft=True, lora_r=8, start_from="owner/sft", load_in_4bit=True)
    model = ModelConfig("owner/student", "self", lora=lora)
    card = model_card(replace(CONFIG, model=model), 20, None)
    assert rows(card)["Student"] == "`owner/student`, 4 bits"
    assert rows(card)["Teacher"] == "the student without its adapter"
    assert rows(card)["Trained"] == (
        "a LoRA adapter, rank 8, alpha 64, dropout 0.05, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, "
        "from `owner/sft` on"
    )
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (0.0125, "0.3125 +- 0.0125 (standard error) on 160 problems, last_number, at most 99 tokens"),
        (None, "0.3125 on 160 problems, last_number, at most 99 tokens"),
    ],
)
def test_what_was_measured(error, expected):
    config = replace(CONFIG, evaluation=EvaluationConfig("p.jsonl", max_tokens=99))
    card = model_card(config, 20, {"accuracy": 0.3125, "standard_error": error, "count": 160})
    assert rows(card)["Accuracy"] == expected


def test_defaults_are_not_repeated():
    config = TrainConfig(ModelConfig("owner/student", "owner/teacher"), DataConfig("p.jsonl"))
    assert "Options" not in model_card(config, 1, None)
