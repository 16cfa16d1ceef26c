"""Are hidden states, gradients and whole steps of packed rows those of padded ones?  pytest tests/distill/test_packed_rows.py

The two kernels need a GPU; a double in plain PyTorch stands in for each (varlen_double.py), and transformers' own mask for packed
sequences is a second opinion. test_packed_rows_on_gpu.py has the kernels.
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import BOS, EOS, make_model, make_prompt_batch, make_rollouts
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from varlen_double import FlashDouble, VarlenDouble

from esr_distill.config import OptimizerConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.hidden_states import last_hidden_states, pack_rows
from esr_distill.models.teacher import AdapterFreeTeacher
from esr_distill.models.train_mode import enable_gradient_checkpointing, switch_off_dropout
from esr_distill.packed_attention import Packing, packing_of
from esr_distill.packed_rows import HiddenRows, PackedRows
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.rollout import InProcessBackend, RolloutRequest
from esr_distill.sampler_settings import SamplerSettings
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run

# Rows of 11, 2, 4, 10 and 5 tokens: prompts and responses of one token, and one row that is the widest in neither.
PROMPTS = [[BOS, 5, 13, 7, 15, 6, 4], [BOS], [BOS, 8, 9], [BOS, 12], [BOS, 12]]
RESPONSES = [[4, 6, 9, 9], [EOS], [3], [10, 11, 12, 7, 8, 5, 16, EOS], [10, 11, EOS]]
TOKENS = 11 + 2 + 4 + 10 + 5
ROLLOUTS = make_rollouts(PROMPTS, RESPONSES)
WINDOW = {"sliding_window": 3}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, as many key heads": (LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral, windows": (MistralConfig, WINDOW),
    "gemma3, windows in one layer": (
        Gemma3TextConfig,
        WINDOW | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (Phi3Config, {}),
    "gpt2, learnt positions": (GPT2Config, {}),
    "mixtral, experts": (MixtralConfig, {"num_local_experts": 4}),
}


@pytest.fixture
def varlen(monkeypatch) -> VarlenDouble:
    return VarlenDouble().install(monkeypatch)


def make_family(family: str, seed: int = 1):
    config_class, options = FAMILIES[family]
    return make_model(seed, config_class, **options)


def packed(model):
    assert pack_rows(model, Packing.VARLEN, "model.student") == "packed, by PyTorch's varlen_attn"
    return model


def gradients(model, rollouts=ROLLOUTS) -> dict[str, torch.Tensor]:
    """Of a weighted sum of the hidden states that predict response tokens."""
    hidden_N_D = gather_rows(last_hidden_states(model, rollouts), select_prefix_positions(rollouts, 6))
    weights_N_D = torch.randn(hidden_N_D.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (hidden_N_D * weights_N_D).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0.1
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max().item()
        assert error <= tolerance * max(gradient.abs().max().item(), 1e-2 * largest), (name, error)


# The sequence, by hand


def test_rows_stand_one_behind_the_other():
    rows = PackedRows.of(make_rollouts([[BOS, 8, 9], [BOS]], [[4, 6], [3]], pad_id=17))
    assert rows.token_ids_1_S.tolist() == [[BOS, 8, 9, 4, 6, BOS, 3]]
    assert rows.position_ids_1_S.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert rows.starts.tolist() == [0, 5, 7] and rows.starts.dtype == torch.int32
    assert rows.longest == 5 and isinstance(rows.longest, int)
    assert rows.place_B_T.tolist() == [[0, 1, 2, 3, 4], [7, 7, 5, 6, 7]]


def test_hidden_rows_are_read_by_row_and_column():
    place_B_T = PackedRows.of(make_rollouts([[BOS, 8, 9], [BOS]], [[4, 6], [3]])).place_B_T
    hidden = HiddenRows(torch.arange(7.0)[:, None] * torch.tensor([1.0, 10.0]), place_B_T)
    rows, columns = torch.tensor([1, 0, 0]), torch.tensor([2, 4, 0])
    assert hidden[rows, columns].tolist() == [[5.0, 50.0], [4.0, 40.0], [0.0, 0.0]]
    for row, column in ((1, 0), (1, 1), (1, 4)):
        with pytest.raises(IndexError):
            hidden[torch.tensor([row]), torch.tensor([column])]


def test_columns_come_and_go_at_the_front():
    """What a teacher with prompts of its own width needs: the same states, counted from another column."""
    place_B_T = PackedRows.of(make_rollouts([[BOS, 8, 9], [BOS]], [[4, 6], [3]])).place_B_T
    hidden = HiddenRows(torch.arange(7.0)[:, None], place_B_T)
    rows, columns = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert hidden[:, 0:][rows, columns].tolist() == [[2.0], [6.0]]
    assert hidden[:, 2:][rows, columns - 2].tolist() == [[2.0], [6.0]]
    wider = hidden.with_padding_before(3)
    assert wider[rows, columns + 3].tolist() == [[2.0], [6.0]]
    for column in (0, 2):
        with pytest.raises(IndexError):
            wider[rows, torch.tensor([column, column])]


# Hidden states and gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_every_token_are_those_of_padded_rows(family, varlen):
    model = make_family(family)
    row_N, column_N = ROLLOUTS.attention_mask_B_T.nonzero(as_tuple=True)
    expected = last_hidden_states(model, ROLLOUTS)[row_N, column_N].detach()
    found = last_hidden_states(packed(model), ROLLOUTS)
    assert isinstance(found, HiddenRows) and found.hidden_S_D.shape == (TOKENS, 32)
    torch.testing.assert_close(found[row_N, column_N].detach(), expected, rtol=1e-5, atol=1e-5)
    assert [(call["tokens"], call["longest"]) for call in varlen.calls[-2:]] == [(TOKENS, 11)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_padded_rows(family, varlen):
    model = make_family(family)
    expected = gradients(model)
    assert_same_gradients(gradients(packed(model)), expected)


@pytest.mark.parametrize("family", ["llama", "mistral, windows", "gpt2, learnt positions"])
def test_hidden_states_are_those_of_transformers_own_packed_mask(family, varlen):
    """Its sdpa takes position ids that start again for rows, and builds the mask of the whole sequence."""
    model, rows = make_family(family), PackedRows.of(ROLLOUTS)
    with torch.no_grad():
        theirs = model.base_model(
            input_ids=rows.token_ids_1_S, position_ids=rows.position_ids_1_S, use_cache=False
        ).last_hidden_state[0]
        ours = last_hidden_states(packed(model), ROLLOUTS).hidden_S_D
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[0], [1], [1, 1, 1], [4, 1, 0]])
def test_single_rows_and_rows_of_the_shortest_length(rows, varlen):
    rollouts = make_rollouts([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows])
    model = make_family("mistral, windows")
    expected = gradients(model, rollouts)
    assert_same_gradients(gradients(packed(model), rollouts), expected)


def test_a_row_that_is_one_token(varlen):
    """No rollout is: its response has a token, and its prompt. The mask alone decides."""
    mask_B_T = torch.tensor([[0, 1, 0], [1, 1, 1]])
    rollouts = replace(
        make_rollouts([[BOS, 4], [BOS, 4]], [[5], [6]]),
        attention_mask_B_T=mask_B_T,
        response_lengths_B=torch.tensor([0, 1]),
    )
    model = make_family("llama")
    rows = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2])
    expected = last_hidden_states(model, rollouts)[rows]
    found = last_hidden_states(packed(model), rollouts)[rows]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [[[9] * 9, [BOS], [8, 4], [5], [6]], [[BOS, 3], [4], [5, 5], [BOS], [7, 8]]])
def test_other_prompts_are_counted_from_the_students_columns(prompts, varlen):
    """A teacher that reads prompts of its own, wider or narrower than the student's seven columns."""
    model, read = make_family("llama"), make_rollouts(prompts, RESPONSES)
    expected = gather_rows(last_hidden_states(model, read), select_prefix_positions(read, 6))
    surplus = read.prompt_width - ROLLOUTS.prompt_width
    hidden = last_hidden_states(packed(model), read)
    hidden = hidden[:, surplus:] if surplus >= 0 else hidden.with_padding_before(-surplus)
    found = gather_rows(hidden, select_prefix_positions(ROLLOUTS, 6))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_windows_limit_rows_that_are_longer(varlen):
    """Three tokens, the token itself among them, are two to its left; rows within the window need none."""
    model = packed(make_family("mistral, windows"))
    last_hidden_states(model, ROLLOUTS)
    assert varlen.calls[-1]["window"] == (2, 0)
    last_hidden_states(model, make_rollouts([[BOS], [BOS, 4]], [[5], [6]]))
    assert varlen.calls[-1]["window"] == (-1, 0)


def test_no_linear_layer_sees_padding(varlen):
    model, seen = make_family("llama"), []
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.append((name, inputs[0].shape[:-1].numel()))
            )
    last_hidden_states(model, ROLLOUTS)
    assert seen[0] == ("layers.0.self_attn.q_proj", 5 * 15) and {count for _, count in seen} == {75}
    packed(model)
    seen.clear()
    last_hidden_states(model, ROLLOUTS)
    assert seen[0] == ("layers.0.self_attn.q_proj", TOKENS) and {count for _, count in seen} == {32}


def test_rows_do_not_see_each_other(varlen):
    model = packed(make_family("llama"))
    other_ids = ROLLOUTS.token_ids_B_T.clone()
    other_ids[0] = (other_ids[0] + 1) % 19
    with torch.no_grad():
        before = last_hidden_states(model, ROLLOUTS).hidden_S_D
        after = last_hidden_states(model, replace(ROLLOUTS, token_ids_B_T=other_ids)).hidden_S_D
    assert torch.equal(before[11:], after[11:]) and (before[:11] - after[:11]).abs().max() > 0.1


def test_gradients_where_layers_are_computed_again(varlen):
    """In backward, after the forward has returned: the layers must find the same attention."""
    expected = gradients(make_family("llama"))
    model = make_family("llama")
    switch_off_dropout(model)
    packed(model)
    enable_gradient_checkpointing(model)
    varlen.calls.clear()
    assert_same_gradients(gradients(model.train()), expected)
    assert len(varlen.calls) == 4  # of two layers


def test_autocast_reaches_the_kernel(varlen):
    """Rotary angles are float32 there, and so are queries and keys; the kernel takes 16 bits alone."""
    model = make_family("llama")
    rows = ROLLOUTS.attention_mask_B_T.nonzero(as_tuple=True)
    expected = last_hidden_states(model, ROLLOUTS)[rows]
    with torch.autocast("cpu", torch.bfloat16):
        packed(model)
        varlen.calls.clear()
        found = last_hidden_states(model, ROLLOUTS)[rows].float()
    assert {call["dtype"] for call in varlen.calls} == {torch.bfloat16}
    assert (found - expected).norm() < 0.05 * expected.norm()


# Flash attention, through transformers


def with_flash(model):
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral, windows", "gemma3, windows in one layer"])
def test_flash_attention_is_told_where_rows_start(family, monkeypatch):
    expected = gradients(make_family(family))
    flash = FlashDouble().install(monkeypatch)
    model = with_flash(make_family(family))
    assert_same_gradients(gradients(model), expected)  # the double itself, on padded rows
    assert pack_rows(model, Packing.FLASH, "model.student") == "packed, by flash-attn's varlen kernel"
    flash.calls.clear()
    assert_same_gradients(gradients(model), expected)
    assert [call["tokens"] for call in flash.calls] == [TOKENS] * 2


def test_flash_attention_has_soft_caps_too(monkeypatch):
    """Gemma 2 runs without them neither in varlen_attn nor in sdpa; its own attention is the other side here."""
    options = WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}
    model = make_model(1, Gemma2Config, **options)
    model.config._attn_implementation = "eager"
    expected = gradients(model)
    flash = FlashDouble().install(monkeypatch)
    pack_rows(with_flash(model), Packing.FLASH, "model.student")
    flash.calls.clear()
    assert_same_gradients(gradients(model), expected)
    assert [call["softcap"] for call in flash.calls] == [2.0] * 2


# What a packed model does beside


def test_rollouts_are_drawn_as_before(varlen):
    prompts = make_prompt_batch([prompt for prompt in PROMPTS for _ in range(2)], samples_per_prompt=2)
    request = RolloutRequest(6, SamplerSettings(), (EOS,), 0, 3)
    model = make_family("llama")
    expected = InProcessBackend().generate(model, prompts, request)
    packed(model)
    varlen.calls.clear()
    drawn = InProcessBackend().generate(model, prompts, request)
    assert torch.equal(drawn.token_ids_B_T, expected.token_ids_B_T) and not varlen.calls
    torch.testing.assert_close(drawn.logprobs_B_K, expected.logprobs_B_K)


def test_a_prefill_of_prompts_is_read_as_before(varlen):
    model, prompts = make_family("llama"), make_prompt_batch(PROMPTS)
    rows = ROLLOUTS.attention_mask_B_T.nonzero(as_tuple=True)
    expected = last_hidden_states(model, ROLLOUTS)[rows]
    packed(model)
    varlen.calls.clear()
    hidden = last_hidden_states(model, ROLLOUTS, PromptPrefill.start(model, prompts, None))
    torch.testing.assert_close(hidden[rows], expected, rtol=1e-5, atol=1e-5)
    assert not varlen.calls


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is optional")
def test_a_teacher_without_a_model_of_its_own_is_packed_as_the_student_is(varlen):
    from esr_distill.models.adapters import add_adapter

    model = make_family("llama")
    expected = last_hidden_states(model, ROLLOUTS)[0, 4:].detach()
    add_adapter(model, LoraSettings(use_peft=True, lora_r=4), 0)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B.default.weight)
    teacher = AdapterFreeTeacher(packed(model))
    assert packing_of(teacher) is Packing.VARLEN
    found = last_hidden_states(teacher, ROLLOUTS)
    rows = torch.zeros(7, dtype=torch.long), torch.arange(4, 11)
    torch.testing.assert_close(found[rows], expected[:7], rtol=1e-5, atol=1e-5)
    assert not found.hidden_S_D.requires_grad


# Whole steps


def stepped(folder, *, is_packed: bool, samples: int = 1, model: dict | None = None, **rollout):
    """Losses of two steps, the student's gradients of the first and its weights after both."""
    config = tiny_config(folder, steps=2, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0))
    config = replace(
        config,
        model=replace(config.model, **(model or {})),
        rollout=replace(config.rollout, samples_per_prompt=samples, **rollout),
    )
    run = prepare_run(config, Console(quiet=True))
    if is_packed:
        packed(run.student)
        packed(run.teacher)
    gradients = []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            {n: p.grad.clone() for n, p in run.student.named_parameters() if p.grad is not None}
        )
    )
    records = [train_step(run, index) for index in range(2)]
    return [record["loss"] for record in records], gradients[0], [record["trained_tokens"] for record in records]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"samples": 2},
        {"samples": 2, "overlap_teacher": True},
        {"model": {"gradient_checkpointing": True}},
        {"model": {"lora": LoraSettings(use_peft=True, lora_r=4, lora_dropout=0.0)}},
    ],
    ids=["plain", "two samples a prompt", "the teacher reads prompts early", "checkpointing", "adapter"],
)
def test_whole_steps_are_the_same(tmp_path, varlen, options):
    if "lora" in options.get("model", {}):
        pytest.importorskip("peft", reason="peft is optional")
    losses, expected, tokens = stepped(tmp_path, is_packed=False, **options)
    assert not varlen.calls
    packed_losses, found, packed_tokens = stepped(tmp_path, is_packed=True, **options)
    assert varlen.calls
    assert_same_gradients(found, expected)
    assert losses[0] > 0.1
    assert packed_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert packed_tokens == tokens
