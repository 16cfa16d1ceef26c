"""Is train mode eval mode with an adapter's dropout and layers that are computed again, and nothing else?

pytest tests/distill/test_train_mode.py
"""

import pytest
import torch
from tiny_models import BOS, EOS, make_model, make_prompt_batch, make_rollouts
from transformers import GPT2Config, LlamaConfig, PhiConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from esr_distill.config.lora import LoraSettings
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.models.adapters import adapter_weights, add_adapter
from esr_distill.models.train_mode import enable_gradient_checkpointing, seed_dropout, switch_off_dropout
from esr_distill.rollout import InProcessBackend, RolloutRequest
from esr_distill.rollout.hf_generate import HFGenerateBackend
from esr_distill.sampler_settings import SamplerSettings
from esr_kernels import Impl, linear_divergence

ROLLOUTS = make_rollouts([[BOS, 5, 13, 7, 15], [BOS], [BOS, 8, 9]], [[4, 6], [10, 11, 12, 2], [3]])
LORA = LoraSettings(use_peft=True, lora_r=4, lora_dropout=0.5)


def with_adapter(model, settings: LoraSettings = LORA):
    pytest.importorskip("peft", reason="peft is optional")
    add_adapter(model, settings, 0)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_weights(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model


def gradients(model) -> tuple[float, dict]:
    """Loss and gradients of a divergence to another model on fixed rollouts, dropout seeded."""
    seed_dropout(3)
    student_hidden_N_D = last_hidden_states(model, ROLLOUTS)[ROLLOUTS.attention_mask_B_T.bool()]
    teacher = make_model(7, type(model.config), **DROPOUTS.get(type(model.config), {})).requires_grad_(False)
    teacher_hidden_N_E = last_hidden_states(teacher, ROLLOUTS)[ROLLOUTS.attention_mask_B_T.bool()]
    loss = linear_divergence(
        student_hidden_N_D, output_head(model), teacher_hidden_N_E, output_head(teacher), impl=Impl.REFERENCE
    ).divergence_N.mean()
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


DROPOUTS = {
    GPT2Config: {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    PhiConfig: {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    LlamaConfig: {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("config_class", DROPOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_models_own_dropout_is_off_in_train_mode(config_class, attention):
    model = make_model(0, config_class, **DROPOUTS[config_class])
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = last_hidden_states(model, ROLLOUTS)
        model.train()
        real = ROLLOUTS.attention_mask_B_T.bool()
        assert not torch.allclose(last_hidden_states(model, ROLLOUTS)[real], expected[real], rtol=1e-2)
        switch_off_dropout(model)
        assert model.training
        torch.testing.assert_close(last_hidden_states(model, ROLLOUTS)[real], expected[real])
    assert all(getattr(model.config, name) == 0.5 for name in DROPOUTS[config_class])  # which is what is saved


def test_the_adapters_dropout_is_on_in_train_mode_alone():
    model = make_model(0)
    switch_off_dropout(model)
    with_adapter(model)
    with torch.no_grad():
        quiet = [last_hidden_states(model, ROLLOUTS) for _ in range(2)]
        model.train()
        noisy = [last_hidden_states(model, ROLLOUTS) for _ in range(2)]
        model.eval()
        again = last_hidden_states(model, ROLLOUTS)
    assert torch.equal(*quiet) and torch.equal(quiet[0], again)
    assert not torch.equal(*noisy) and not torch.equal(noisy[0], quiet[0])


class OtherInTrainMode(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, **inputs):
        hidden = self.body(**inputs).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=hidden * (1.5 if self.training else 1.0))


def test_a_model_that_differs_by_something_else_is_refused(monkeypatch):
    model = make_model(0)
    body = OtherInTrainMode(model.model)
    monkeypatch.setattr(PreTrainedModel, "base_model", property(lambda _: body))
    model.add_module("other", body)
    with pytest.raises(
        InputError, match="computes something else in train mode, got LlamaForCausalLM, whose hidden states"
    ):
        switch_off_dropout(model)


# Gradient checkpointing


@pytest.mark.parametrize("config_class", [LlamaConfig, GPT2Config])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_gradients_are_those_of_a_run_that_keeps_everything(config_class, has_adapter):
    names = ("c_attn", "c_fc") if config_class is GPT2Config else LORA.lora_target_modules
    settings = LoraSettings(use_peft=True, lora_r=4, lora_dropout=0.5, lora_target_modules=names)
    found = []
    for is_recomputed in (False, True):
        model = make_model(0, config_class, **DROPOUTS[config_class])
        switch_off_dropout(model)
        if has_adapter:
            with_adapter(model, settings)
        if is_recomputed:
            enable_gradient_checkpointing(model)
        calls = []
        model.base_model.get_submodule("layers" if config_class is LlamaConfig else "h")[
            1
        ].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients(model.train()))
        assert len(calls) == (2 if is_recomputed else 1)  # forward, and again in backward
    (loss, plain), (other_loss, recomputed) = found
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())


def test_a_frozen_embedding_gets_no_gradient_by_the_way():
    model = with_adapter(make_model(0))
    enable_gradient_checkpointing(model)
    hidden = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: hidden.append(output))
    last_hidden_states(model.train(), ROLLOUTS)
    assert not hidden[0].requires_grad


@pytest.mark.parametrize("backend", [InProcessBackend, HFGenerateBackend])
def test_rollouts_are_those_of_eval_mode(backend):
    """With checkpointing and dropout on and the model in train mode: a cache is used, nothing is dropped."""
    request = RolloutRequest(6, SamplerSettings(), (EOS,), 0, 3)
    prompts = make_prompt_batch([[BOS, 5, 13, 7, 15], [BOS], [BOS, 8, 9]])
    plain = with_adapter(make_model(0), LoraSettings(use_peft=True, lora_r=4, lora_dropout=0.0))
    expected = backend().generate(plain, prompts, request)
    model = with_adapter(make_model(0)).train()
    enable_gradient_checkpointing(model)
    caches = []
    model.model.register_forward_pre_hook(
        lambda _, __, options: caches.append(options.get("past_key_values")), with_kwargs=True
    )
    state = torch.get_rng_state()
    drawn = backend().generate(model, prompts, request)
    assert torch.equal(drawn.token_ids_B_T, expected.token_ids_B_T)
    assert torch.equal(drawn.logprobs_B_K, expected.logprobs_B_K)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(caches) > 1 and all(cache is not None for cache in caches[1:])
    assert model.training and model.model.layers[0].self_attn.q_proj.lora_dropout["default"].training


def test_models_without_such_layers_are_refused(monkeypatch):
    model = make_model(0)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match=r"model\.gradient_checkpointing must be false for LlamaForCausalLM"):
        enable_gradient_checkpointing(model)
