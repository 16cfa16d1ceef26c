"""Are hidden states and output head together the model itself?  pytest tests/distill/test_hidden_states.py"""

import pytest
import torch
from tiny_models import BOS, VOCAB_SIZE, make_model, make_rollouts
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    Qwen3Config,
)

from esr_distill.hidden_states import check_output_head, last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.prefix_positions import gather_rows, select_prefix_positions

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {}),
    "gemma2, soft cap": (Gemma2Config, {"final_logit_softcapping": 1.5, "sliding_window": 4}),
    "cohere, scale": (CohereConfig, {"logit_scale": 0.25}),
    "granite, divisor": (GraniteConfig, {"logits_scaling": 4.0}),
    "gpt2": (GPT2Config, {}),
    "phi, bias": (PhiConfig, {}),
}
PROMPTS = [[BOS, 5, 13, 7, 15], [BOS], [BOS, 8, 9]]
RESPONSES = [[4, 6], [10, 11, 12, 2], [3]]


@pytest.fixture(params=FAMILIES)
def model(request):
    config_class, options = FAMILIES[request.param]
    model = make_model(1, config_class, **options)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@torch.no_grad()
def test_head_on_hidden_states_is_the_model_itself(model):
    """Row by row without padding, against the logits of the model's own forward."""
    rollouts = make_rollouts(PROMPTS, RESPONSES)
    logits_B_T_V = output_head(model).logits(last_hidden_states(model, rollouts))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        own_T_V = model(torch.tensor([prompt + response])).logits[0]
        start = rollouts.prompt_width - len(prompt)
        ours_T_V = logits_B_T_V[row, start : start + len(prompt) + len(response)]
        torch.testing.assert_close(ours_T_V, own_T_V, atol=2e-5, rtol=1e-5)


def test_the_model_is_told_padding_and_positions(model):
    """Without a mask, today's transformers would guess it from the position ids; not every version or family does."""
    seen = []
    model.base_model.register_forward_pre_hook(lambda _, __, options: seen.append(options), with_kwargs=True)
    rollouts = make_rollouts([[BOS, 8, 9], [BOS]], [[4, 6], [3]])
    last_hidden_states(model, rollouts)
    assert seen[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert seen[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1]]
    assert seen[0]["use_cache"] is False


@torch.no_grad()
def test_padding_does_not_change_the_hidden_states_of_real_tokens(model):
    """More left padding, a neighbour with a longer response, and other ids under the padding: nothing changes."""
    alone = last_hidden_states(model, make_rollouts(PROMPTS[2:], RESPONSES[2:]))[0]
    in_batch = last_hidden_states(model, make_rollouts(PROMPTS, RESPONSES))[2, 2:6]
    other_pads = last_hidden_states(model, make_rollouts(PROMPTS, RESPONSES, pad_id=9))[2, 2:6]
    torch.testing.assert_close(in_batch, alone, atol=2e-5, rtol=1e-5)
    assert torch.equal(other_pads, in_batch)


@torch.no_grad()
def test_gathered_rows_predict_the_response_tokens(model):
    """The shift by one, end to end: row n gives the distribution of response token n given all that stands before it."""
    rollouts = make_rollouts(PROMPTS, RESPONSES)
    positions = select_prefix_positions(rollouts, 3)
    logits_N_V = output_head(model).logits(gather_rows(last_hidden_states(model, rollouts), positions))
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        for t in range(min(3, len(response))):
            expected.append(model(torch.tensor([prompt + response[:t]])).logits[0, -1])
    assert positions.token_ids_N.tolist() == [4, 6, 10, 11, 12, 3]
    torch.testing.assert_close(logits_N_V, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_every_family_passes_the_check(model):
    check_output_head(model, "model.student")


@pytest.mark.parametrize("config_class", [LlamaConfig, Gemma2Config])
def test_bfloat16_passes_the_check(config_class):
    check_output_head(make_model(1, config_class).to(torch.bfloat16), "model.student")


def test_the_head_shares_the_weights_and_passes_gradients():
    model = make_model(1)
    head = output_head(model)
    assert head.weight is model.lm_head.weight
    rollouts = make_rollouts(PROMPTS, RESPONSES)
    head.logits(last_hidden_states(model, rollouts)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


class ShiftedLlama(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits + torch.linspace(0, 1, VOCAB_SIZE, dtype=output.logits.dtype)
        return output


class TransformedLlama(LlamaForCausalLM):
    """As BERT's or Falcon-H1's head: something between the last hidden state and the projection."""

    def forward(self, input_ids, **_):
        output = super().forward(input_ids)
        output.logits = self.lm_head(torch.relu(self.model(input_ids).last_hidden_state))
        return output


@pytest.mark.parametrize("model_class", [ShiftedLlama, TransformedLlama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_not_linear_is_refused(model_class, dtype):
    model = model_class(make_model(1).config).eval().to(dtype)
    with pytest.raises(InputError, match=f"model.teacher must be a model whose .* got {model_class.__name__}, whose"):
        check_output_head(model, "model.teacher")


def test_a_scale_that_the_config_does_not_name_is_refused():
    """One percent is enough."""
    model = make_model(1)
    own_forward = model.forward
    model.forward = lambda *arguments, **options: scaled(own_forward(*arguments, **options), 1.01)
    with pytest.raises(InputError, match="model.student must be a model whose logits are a linear head"):
        check_output_head(model, "model.student")


def scaled(output, factor: float):
    output.logits = output.logits * factor
    return output


def test_a_model_that_gives_nan_is_refused():
    model = make_model(1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="differ from that by nan"):
        check_output_head(model, "model.student")
