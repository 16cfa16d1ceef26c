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
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from esr_distill.config.lora import LoraSettings
from esr_distill.model_card import model_card

CONFIG = TrainConfig(
    model=ModelConfig("owner/student", "owner/teacher", teacher_dtype="bfloat16"),
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
    assert found["Teacher"] == "`owner/teacher`, bfloat16"
    assert found["Trained"] == "all weights"
    assert found["Horizon"] == "50 response tokens"
    assert found["Divergence"] == "jsd (0.25), normaliser token_mean"
    assert found["Sampling"] == "temperature 0.7, top-p 0.95"
    assert found["Steps"] == "20 of 40, 16 rollouts each, seed 7"
    assert "Accuracy" not in found and "arXiv 2605.27028" in found["Method"]
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
