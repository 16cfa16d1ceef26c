"""Do two steps train a model of each family, all of it or an adapter, by the right loss?

pytest tests/distill/test_architectures.py
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from test_train import record_rollouts, tiny_config
from tiny_models import make_model, make_tokenizer
from transformers import (
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from whole_logits import reverse_kl_of_rollouts

from esr_distill.config import OptimizerConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.input_error import InputError
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run

GEMMA = {
    "tie_word_embeddings": True,
    "final_logit_softcapping": 4.0,
    "attn_logit_softcapping": 20.0,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (
        Qwen2Config,
        {"vocab_size": 20},
    ),  # transformers gives every tokenizer beside a Qwen 2 model one token more
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, GEMMA),
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "phi3": (Phi3Config, {}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
}


def family_run(folder, family: str, lora: LoraSettings):
    config_class, options = FAMILIES[family]
    config = tiny_config(folder, steps=2, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0))
    for seed, role in enumerate(("student", "teacher")):
        make_model(seed, config_class, **options).save_pretrained(folder / role)
        make_tokenizer().save_pretrained(folder / role)
    # Gemma 2 caps attention scores, which sdpa does not
    attention = "eager" if family == "gemma2" else "sdpa"
    model = replace(config.model, lora=lora, attn_implementation=attention, gradient_checkpointing=lora.use_peft)
    return prepare_run(replace(config, model=model), Console(quiet=True))


def reloaded(family: str, seed: int):
    config_class, options = FAMILIES[family]
    model = make_model(seed, config_class, **options)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights(tmp_path, monkeypatch, family):
    run = family_run(tmp_path, family, LoraSettings())
    before = {name: parameter.detach().clone() for name, parameter in run.student.named_parameters()}
    seen = []
    record_rollouts(monkeypatch, seen)
    records = [train_step(run, step) for step in range(2)]
    with torch.no_grad():
        expected = reverse_kl_of_rollouts(reloaded(family, 0), reloaded(family, 1), seen[0]).item()
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1 and records[1]["loss"] > 0 and records[1]["grad_norm"] > 0
    for name, parameter in run.student.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is optional")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter(tmp_path, monkeypatch, family):
    """With dropout and gradient checkpointing, the first loss is that of the base model, and only the adapter moves."""
    names = (
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if family == "phi3" else LoraSettings.lora_target_modules
    )
    lora = LoraSettings(use_peft=True, lora_r=4, lora_target_modules=names)
    run = family_run(tmp_path, family, lora)
    before = {name: parameter.detach().clone() for name, parameter in run.student.named_parameters()}
    seen = []
    record_rollouts(monkeypatch, seen)
    records = [train_step(run, step) for step in range(2)]
    with torch.no_grad():
        expected = reverse_kl_of_rollouts(reloaded(family, 0), reloaded(family, 1), seen[0]).item()
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert records[1]["loss"] > 0 and records[1]["grad_norm"] > 0
    moved = {name for name, parameter in run.student.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 2 * len(names)


def test_the_default_names_do_not_fit_every_family(tmp_path):
    with pytest.raises(
        InputError,
        match=r"lora_target_modules must be last names of linear layers of Phi3ForCausalLM "
        r"\(down_proj, gate_up_proj, o_proj, qkv_proj\), got 'q_proj'",
    ):
        family_run(tmp_path, "phi3", LoraSettings(use_peft=True))
