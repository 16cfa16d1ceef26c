"""Does a rollout stop where it must, draw what the model says, and depend on nothing but its own row?

pytest tests/distill/test_rollout.py
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import BOS, EOS, PAD, VOCAB_SIZE, make_model, make_prompt_batch
from transformers import DynamicCache, Gemma2Config, LlamaConfig, Qwen3Config

from esr_distill.rollout import GREEDY, InProcessBackend, RolloutBatch, SamplerSettings, generate_rollouts

RAGGED = [[BOS, 5, 13, 7, 14, 9, 15], [BOS, 4], [BOS], [BOS, 8, 8, 13, 3, 15], [BOS, 12, 14, 11, 15]]
PLAIN = SamplerSettings()


def roll_out(model, prompts=RAGGED, request_ids=None, **changed) -> RolloutBatch:
    options = {"horizon": 10, "sampler": PLAIN, "eos_ids": (EOS,), "pad_id": PAD, "seed": 7} | changed
    return generate_rollouts(model, make_prompt_batch(prompts, request_ids, options["pad_id"]), **options)


def responses(rollouts: RolloutBatch) -> list[list[int]]:
    lengths = rollouts.response_lengths_B.tolist()
    return [ids[:length] for ids, length in zip(rollouts.response_ids_B_K.tolist(), lengths, strict=True)]


class ScriptedModel(torch.nn.Module):
    """Writes script[row] token by token and goes on with token 7; keeps the input of every call, its mask as columns seen.

    Its cache holds the number of the row, so that a row is known wherever it has been moved to.
    """

    def __init__(self, script: list[list[int]]) -> None:
        super().__init__()
        self.script, self.calls = script, []
        self.config = LlamaConfig(vocab_size=VOCAB_SIZE)
        self.config._attn_implementation = "sdpa"
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, 4)
        self.get_input_embeddings = self.get_output_embeddings = lambda: self.embedding
        self.set_attn_implementation = lambda name: setattr(self.config, "_attn_implementation", name)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, **_):
        step = len(self.calls)
        seen = attention_mask if attention_mask.ndim == 2 else (attention_mask[:, 0, -1] == 0).long()  # 0 is added
        self.calls.append((input_ids.tolist(), seen.tolist(), position_ids.tolist()))
        rows = torch.arange(len(input_ids), dtype=torch.float32)
        if past_key_values is None:
            past_key_values = DynamicCache()
        else:
            rows = past_key_values.layers[0].keys[:, 0, self.prompt_width - 1, 0].clone()
        self.prompt_width = input_ids.shape[1] if step == 0 else self.prompt_width
        keys = rows[:, None, None, None].expand(-1, 1, input_ids.shape[1], 1)
        past_key_values.update(keys, keys, 0)
        logits = torch.zeros(*input_ids.shape, VOCAB_SIZE)
        for place, row in enumerate(rows.long()):
            tokens = self.script[row]
            logits[place, -1, tokens[step] if step < len(tokens) else 7] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


# Script, EOS ids, pad id, horizon; then responses, which rows stopped by EOS, and the number of model calls.
SCRIPTS = {
    "EOS ends a row, the horizon the other": (
        [[5, 6, EOS, 9], [8, 9, 10, 11, 12]],
        ([EOS], PAD, 4),
        ([[5, 6, EOS], [8, 9, 10, 11]], [True, False], 4),
    ),
    "all end early": ([[5, EOS], [6, 7, EOS]], ([EOS], PAD, 50), ([[5, EOS], [6, 7, EOS]], [True, True], 3)),
    "EOS is the first token": ([[EOS], [5, EOS]], ([EOS], PAD, 5), ([[EOS], [5, EOS]], [True, True], 2)),
    "EOS is the first token everywhere": ([[EOS], [EOS]], ([EOS], PAD, 5), ([[EOS], [EOS]], [True, True], 1)),
    "EOS is the pad id": ([[5, EOS], [6, 7, 8]], ([EOS], EOS, 3), ([[5, EOS], [6, 7, 8]], [True, False], 3)),
    "EOS at the horizon": ([[5, 6, EOS], [6, 7, 8]], ([EOS], PAD, 3), ([[5, 6, EOS], [6, 7, 8]], [True, False], 3)),
    "two EOS ids": ([[5, 18, 9], [6, EOS]], ([EOS, 18], PAD, 5), ([[5, 18], [6, EOS]], [True, True], 2)),
    "a pad token that the model writes is a token": (
        [[5, PAD, 6, EOS], [PAD, EOS]],
        ([EOS], PAD, 5),
        ([[5, PAD, 6, EOS], [PAD, EOS]], [True, True], 4),
    ),
    "horizon 1": ([[5, 6], [EOS]], ([EOS], PAD, 1), ([[5], [EOS]], [False, True], 1)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_stops_by_hand(name):
    script, (eos_ids, pad_id, horizon), (expected, stopped_by_eos, calls) = SCRIPTS[name]
    model, prompts = ScriptedModel(script), [[BOS, 4, 5], [BOS]]
    rollouts = roll_out(model, prompts, sampler=GREEDY, eos_ids=eos_ids, pad_id=pad_id, horizon=horizon)

    assert responses(rollouts) == expected
    assert rollouts.stopped_by_eos_B.tolist() == stopped_by_eos
    assert len(model.calls) == calls
    width = max(map(len, expected))
    assert rollouts.token_ids_B_T.shape == (2, 3 + width) and rollouts.prompt_width == 3
    for row, (prompt, response) in enumerate(zip(prompts, expected, strict=True)):
        before, after = 3 - len(prompt), width - len(response)
        ids = [pad_id] * before + prompt + response + [pad_id] * after
        assert rollouts.token_ids_B_T[row].tolist() == ids
        mask = [0] * before + [1] * (len(prompt) + len(response)) + [0] * after
        assert rollouts.attention_mask_B_T[row].tolist() == mask
        assert rollouts.logprobs_B_K[row, len(response) :].tolist() == [0.0] * after
        assert rollouts.sampling_logprobs_B_K[row, len(response) :].tolist() == [0.0] * after


def test_running_on_with_finished_rows_changes_nothing():
    """As on a GPU, which is not asked in every step: the model runs to the end of the segment, and nothing of that is kept."""
    model = ScriptedModel([[5, 6, EOS], [EOS]])
    backend = InProcessBackend(capture=lambda step, pool: step)
    rollouts = roll_out(model, [[BOS, 4, 5], [BOS]], sampler=GREEDY, backend=backend)
    assert len(model.calls) == 10
    assert responses(rollouts) == [[5, 6, EOS], [EOS]]
    assert rollouts.token_ids_B_T.shape == (2, 6)
    assert rollouts.stopped_by_eos_B.tolist() == [True, True]


def test_what_the_model_is_fed():
    """Prompts once, then one token a row; positions count real tokens; padding stays masked."""
    model = ScriptedModel([[5, 6, 7], [8, 9, 10]])
    roll_out(model, [[BOS, 4, 5], [BOS]], sampler=GREEDY, horizon=3)
    assert model.calls == [
        ([[BOS, 4, 5], [PAD, PAD, BOS]], [[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]]),
        ([[5], [8]], [[1, 1, 1, 1], [0, 0, 1, 1]], [[3], [1]]),
        ([[6], [9]], [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[4], [2]]),
    ]


def test_position_ids_of_the_training_forward_continue_those_of_generation():
    rollouts = roll_out(ScriptedModel([[5, 6, 7], [8, EOS]]), [[BOS, 4, 5], [BOS]], sampler=GREEDY, horizon=3)
    assert rollouts.position_ids_B_T.tolist()[0] == [0, 1, 2, 3, 4, 5]
    assert rollouts.position_ids_B_T.tolist()[1][:5] == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, Gemma2Config])
def test_greedy_equals_generate(config_class):
    options = {"sliding_window": 4, "query_pre_attn_scalar": 8} if config_class is Gemma2Config else {}
    model = make_model(3, config_class, **options)
    batch = make_prompt_batch(RAGGED)
    free = model.generate(
        batch.prompt_ids_B_P,
        attention_mask=batch.prompt_mask_B_P.long(),
        do_sample=False,
        max_new_tokens=10,
        min_new_tokens=10,
        pad_token_id=PAD,
    )[:, batch.prompt_ids_B_P.shape[1] :]
    eos_id = free[0, 4].item()  # a token that does come, so that at least one row ends by it
    expected = model.generate(
        batch.prompt_ids_B_P,
        attention_mask=batch.prompt_mask_B_P.long(),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=eos_id,
        pad_token_id=PAD,
    )
    rollouts = roll_out(model, sampler=GREEDY, eos_ids=(eos_id,))
    assert torch.equal(rollouts.token_ids_B_T, expected)
    assert rollouts.stopped_by_eos_B[0]
    assert len({tuple(ids) for ids in responses(rollouts)}) > 1


def test_never_more_than_the_horizon_and_nothing_after_the_first_eos():
    model, ends = make_model(1), set()
    for seed in range(6):
        rollouts = roll_out(model, seed=seed, horizon=8, eos_ids=(EOS, 5), pad_id=5)
        for ids, by_eos in zip(responses(rollouts), rollouts.stopped_by_eos_B.tolist(), strict=True):
            assert 1 <= len(ids) <= 8
            assert not {EOS, 5} & set(ids[:-1])
            assert by_eos == (ids[-1] in (EOS, 5))
            assert by_eos or len(ids) == 8
            ends.add(by_eos)
        assert rollouts.response_ids_B_K.shape[1] == rollouts.response_lengths_B.max()
    assert ends == {True, False}


@pytest.mark.parametrize("config_class", [LlamaConfig, Gemma2Config])
def test_a_row_does_not_depend_on_neighbours_slot_or_padding(config_class):
    options = {"sliding_window": 4} if config_class is Gemma2Config else {}
    model, request_ids = make_model(2, config_class, **options), [40, 41, 42, 43, 44]
    whole = roll_out(model, RAGGED, request_ids)
    for order in ([0], [1], [4, 2], [3, 1, 4, 0, 2]):
        part = roll_out(model, [RAGGED[i] for i in order], [request_ids[i] for i in order])
        for slot, i in enumerate(order):
            assert responses(part)[slot] == responses(whole)[i]
            length = int(whole.response_lengths_B[i])
            difference = part.logprobs_B_K[slot, :length] - whole.logprobs_B_K[i, :length]
            assert difference.abs().max() < 1e-4


def test_seed_and_request_id_name_the_random_stream():
    model, prompts = make_model(2), [[BOS, 5]] * 4
    first = responses(roll_out(model, prompts, [1, 2, 3, 1]))
    assert first == responses(roll_out(model, prompts, [1, 2, 3, 1]))
    assert first[0] == first[3]
    assert len({tuple(ids) for ids in first[:3]}) == 3
    assert all(a != b for a, b in zip(first, responses(roll_out(model, prompts, [1, 2, 3, 1], seed=8)), strict=True))


def test_global_random_state_is_neither_read_nor_moved():
    model = make_model(2)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = roll_out(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(roll_out(model).token_ids_B_T, first.token_ids_B_T)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, Gemma2Config])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_those_of_a_training_forward(config_class, temperature):
    """One uncached forward over the whole rollout, row by row without padding."""
    options = {"sliding_window": 4} if config_class is Gemma2Config else {}
    model = make_model(5, config_class, **options)
    rollouts = roll_out(model, sampler=SamplerSettings(sampling_temperature=temperature))
    for row, ids in enumerate(responses(rollouts)):
        with torch.no_grad():
            logits_T_V = model(torch.tensor([RAGGED[row] + ids])).logits[0].double()
        first = len(RAGGED[row]) - 1
        for t, token in enumerate(ids):
            for values, scale in (
                (rollouts.logprobs_B_K, 1.0),
                (rollouts.sampling_logprobs_B_K, 1 / temperature),
            ):
                expected = torch.log_softmax(scale * logits_T_V[first + t], -1)[token]
                assert values[row, t].item() == pytest.approx(expected.item(), abs=1e-4)
    if temperature != 1.0:
        assert (rollouts.logprobs_B_K - rollouts.sampling_logprobs_B_K).abs().max() > 0.01


def test_filtered_sampling_logprobs_renormalise_the_kept_ids():
    """top-k 3: the drawn token is one of the three best, its log-prob is among those three alone."""
    model = make_model(5)
    rollouts = roll_out(model, sampler=SamplerSettings(sampling_temperature=0.8, top_k=3))
    for row, ids in enumerate(responses(rollouts)):
        with torch.no_grad():
            logits_T_V = model(torch.tensor([RAGGED[row] + ids])).logits[0].double() / 0.8
        for t, token in enumerate(ids):
            best = logits_T_V[len(RAGGED[row]) - 1 + t].topk(3)
            assert token in best.indices
            expected = logits_T_V[len(RAGGED[row]) - 1 + t, token] - best.values.logsumexp(0)
            assert rollouts.sampling_logprobs_B_K[row, t].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_cut_vocabulary():
    """Ids from 12 on are never drawn, and log-probs are those of a softmax over the first 12."""
    model = make_model(5)
    drawn = responses(roll_out(model))
    assert max(map(max, drawn)) >= 12
    rollouts = roll_out(model, vocab_size=12)
    for row, ids in enumerate(responses(rollouts)):
        assert max(ids) < 12
        with torch.no_grad():
            logits_T_V = model(torch.tensor([RAGGED[row] + ids])).logits[0, :, :12].double()
        for t, token in enumerate(ids):
            expected = torch.log_softmax(logits_T_V[len(RAGGED[row]) - 1 + t], -1)[token]
            assert rollouts.logprobs_B_K[row, t].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("was_training", [True, False])
def test_dropout_is_off_meanwhile_and_the_mode_comes_back(was_training):
    model = make_model(2, attention_dropout=0.9).train(was_training)
    modes = []
    model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    rollouts = roll_out(model)
    assert set(modes) == {False}
    assert {module.training for module in model.modules()} == {was_training}
    assert torch.equal(rollouts.token_ids_B_T, roll_out(make_model(2)).token_ids_B_T)


def test_the_mode_comes_back_after_an_error():
    model = make_model(2).train()
    with pytest.raises(IndexError):
        roll_out(model, [[BOS, VOCAB_SIZE + 5]])
    assert model.training


def test_no_graph_is_kept():
    rollouts = roll_out(make_model(2))
    assert not rollouts.logprobs_B_K.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    model = make_model(2)
    with torch.no_grad():
        model.lm_head.weight[4, 3] = bad
    with pytest.raises(FloatingPointError, match=r"rollout: the logits must be finite, got NaN or infinity in \d rows"):
        roll_out(model)


def test_the_cache_is_used():
    """Prompt tokens go through the layers once, then one token a row and step."""
    model, token_counts = make_model(2), []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: token_counts.append(inputs[0].shape[1]))
    roll_out(model, horizon=10, eos_ids=())
    assert token_counts == [max(map(len, RAGGED))] + [1] * 9


def test_only_the_last_prompt_position_is_projected():
    model, rows = make_model(2), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    roll_out(model, horizon=3, eos_ids=())
    assert rows == [1, 1, 1]
