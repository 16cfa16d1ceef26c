"""Do rollouts from a vLLM server come back as they were drawn, and are their log-probs right or said to be unknown?

The server is a stub of its interface (vllm_stub.py). Expected values come from what the stub drew, from the student itself, or
by hand.

pytest tests/distill/test_vllm_server.py
"""

import os

import numpy as np
import pytest
import torch
from tiny_models import BOS, EOS, PAD, VOCAB_SIZE
from vllm_rollouts import PLAIN, RAGGED, assert_logprobs, log_softmax, make_backend, responses, roll_out

from esr_distill.input_error import InputError
from esr_distill.rollout import GREEDY, SamplerSettings
from esr_distill.rollout.vllm_server import VllmServerBackend


@pytest.mark.parametrize("horizon", [1, 20])
def test_a_batch_is_what_the_server_drew(stub, student, tmp_path, horizon):
    rollouts = roll_out(make_backend(stub, tmp_path), student, horizon=horizon)
    drawn = {tuple(prompt): token_ids for prompt, token_ids in stub.drawn}
    expected = [drawn[tuple(prompt)] for prompt in RAGGED]
    assert responses(rollouts) == expected
    assert rollouts.stopped_by_eos_B.tolist() == [token_ids[-1] == EOS for token_ids in expected]
    if horizon == 20:
        assert 0 < rollouts.stopped_by_eos_B.sum() < len(RAGGED)  # both ways to end are in it
    width = max(map(len, expected))
    assert rollouts.prompt_width == 7 and rollouts.token_ids_B_T.shape == (len(RAGGED), 7 + width)
    for row, (prompt, response) in enumerate(zip(RAGGED, expected, strict=True)):
        before, after = 7 - len(prompt), width - len(response)
        assert rollouts.token_ids_B_T[row].tolist() == [PAD] * before + prompt + response + [PAD] * after
        mask = [0] * before + [1] * (len(prompt) + len(response)) + [0] * after
        assert rollouts.attention_mask_B_T[row].tolist() == mask
    assert rollouts.token_ids_B_T.dtype == rollouts.attention_mask_B_T.dtype == torch.int64
    assert rollouts.logprobs_B_K.dtype == torch.float32 and not rollouts.logprobs_B_K.requires_grad
    for logprobs_B_K in (rollouts.logprobs_B_K, rollouts.sampling_logprobs_B_K):
        assert_logprobs(logprobs_B_K, student, RAGGED, rollouts, log_softmax)


# Prompt to response; EOS ids, pad id, horizon; which rows stopped by EOS.
SCRIPTS = {
    "EOS and horizon": ([[5, 6, EOS], [8, 9, 10, 11]], ([EOS], PAD, 4), [True, False]),
    "EOS is the first token": ([[EOS], [5, EOS]], ([EOS], PAD, 5), [True, True]),
    "EOS at the horizon": ([[5, 6, EOS], [6, 7, 8]], ([EOS], PAD, 3), [True, False]),
    "EOS is the pad id": ([[5, EOS], [6, 7, 8]], ([EOS], EOS, 3), [True, False]),
    "two EOS ids": ([[5, 18], [6, 7, EOS]], ([EOS, 18], PAD, 5), [True, True]),
    "the server's EOS is a token like others": ([[EOS, 5, EOS], [EOS, 18]], ([18], PAD, 3), [False, True]),
    "a pad token that the model writes is a token": ([[5, PAD, 6, EOS], [PAD, EOS]], ([EOS], PAD, 5), [True, True]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_ends_by_hand(stub, student, tmp_path, name):
    expected, (eos_ids, pad_id, horizon), stopped_by_eos = SCRIPTS[name]
    prompts = [[BOS, 4, 5], [BOS]]
    stub.script = dict(zip(map(tuple, prompts), expected, strict=True))
    options = {"eos_ids": eos_ids, "pad_id": pad_id, "horizon": horizon}
    rollouts = roll_out(make_backend(stub, tmp_path), student, prompts, **options)
    assert responses(rollouts) == expected
    assert rollouts.stopped_by_eos_B.tolist() == stopped_by_eos
    width = max(map(len, expected))
    for row, response in enumerate(expected):
        after = width - len(response)
        assert rollouts.response_ids_B_K[row].tolist() == response + [pad_id] * after
        places = [-float(place) for place in range(1, len(response) + 1)]
        assert rollouts.logprobs_B_K[row].tolist() == places + [0.0] * after


def test_what_is_asked(stub, student, tmp_path):
    """All that the server would otherwise take from generation_config.json is written out."""
    sampler = SamplerSettings(sampling_temperature=0.7, top_k=5, top_p=0.9)
    roll_out(make_backend(stub, tmp_path), student, [[BOS, 4, 5], [BOS]], sampler=sampler, eos_ids=(EOS, 18), horizon=3)
    asked = sorted(stub.completions(), key=lambda body: len(body["prompt"]))
    seeds = [body.pop("seed") for body in asked]
    assert [body.pop("prompt") for body in asked] == [[BOS], [BOS, 4, 5]]
    assert (
        asked[0]
        == asked[1]
        == {
            "model": "student-at-start",
            "n": 1,
            "max_tokens": 3,
            "temperature": 0.7,
            "top_k": 5,
            "top_p": 0.9,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": None,
            "ignore_eos": True,
            "stop_token_ids": [EOS, 18],
            "logprobs": 1,
            "return_token_ids": True,
        }
    )
    assert all(0 <= seed < 2**63 for seed in seeds) and seeds[0] != seeds[1]


def test_samples_of_one_prompt_differ_and_belong_to_their_request_ids(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    rows, request_ids = [RAGGED[0]] * 3 + [RAGGED[4]] * 3, [40, 41, 42, 43, 44, 45]
    whole = responses(roll_out(backend, student, rows, request_ids, samples_per_prompt=3))
    assert len(set(map(tuple, whole[:3]))) == len(set(map(tuple, whole[3:]))) == 3
    alone = responses(roll_out(backend, student, [rows[4], rows[1]], [44, 41]))
    assert alone == [whole[4], whole[1]]
    assert responses(roll_out(backend, student, rows, request_ids, seed=8)) != whole


def test_seeds_of_neighbouring_rows_and_runs_are_all_different(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    stub.script = {(BOS,): [5]}
    for seed in range(4):
        roll_out(backend, student, [[BOS]] * 8, list(range(10, 18)), seed=seed, horizon=1)
    seeds = [body["seed"] for body in stub.completions()]
    assert len(seeds) == len(set(seeds)) == 32
    roll_out(backend, student, [[BOS]], [12], seed=0, horizon=1)
    assert stub.completions()[-1]["seed"] in seeds


def tempered(temperature: float):
    return lambda logits: log_softmax(logits / temperature)


def top_3(logits: np.ndarray) -> np.ndarray:
    third = np.sort(logits, axis=-1)[:, -3:-2]
    return log_softmax(np.where(logits >= third, logits, -np.inf))


def cut_to_16(logits: np.ndarray) -> np.ndarray:
    return log_softmax(np.where(np.arange(VOCAB_SIZE) < 16, logits, -np.inf))


def certain(logits: np.ndarray) -> np.ndarray:
    return np.zeros_like(logits)


COLD, TOP_3 = SamplerSettings(sampling_temperature=0.7), SamplerSettings(top_k=3)
# Mode, sampler, vocab_size; then what logprobs_B_K and sampling_logprobs_B_K are, None for not known.
LOGPROBS = {
    "raw, plain": ("raw_logprobs", PLAIN, None, log_softmax, log_softmax),
    "raw, cold": ("raw_logprobs", COLD, None, log_softmax, None),
    "raw, top-k": ("raw_logprobs", TOP_3, None, log_softmax, None),
    "raw, greedy": ("raw_logprobs", GREEDY, None, log_softmax, certain),
    "raw, cut": ("raw_logprobs", PLAIN, 16, None, None),
    "raw, cut and greedy": ("raw_logprobs", GREEDY, 16, None, certain),
    "raw, cut to all": ("raw_logprobs", PLAIN, VOCAB_SIZE, log_softmax, log_softmax),
    "processed, plain": ("processed_logprobs", PLAIN, None, log_softmax, log_softmax),
    "processed, cold": ("processed_logprobs", COLD, None, None, tempered(0.7)),
    "processed, top-k": ("processed_logprobs", TOP_3, None, None, top_3),
    "processed, greedy": ("processed_logprobs", GREEDY, None, log_softmax, certain),
    "processed, cut": ("processed_logprobs", PLAIN, 16, cut_to_16, cut_to_16),
    "processed, cut and greedy": ("processed_logprobs", GREEDY, 16, cut_to_16, certain),
}


@pytest.mark.parametrize("name", LOGPROBS)
def test_logprobs_are_right_or_not_known(stub, student, tmp_path, name):
    stub.mode, sampler, vocab_size, at_temperature_1, sampled = LOGPROBS[name]
    rollouts = roll_out(make_backend(stub, tmp_path), student, sampler=sampler, vocab_size=vocab_size)
    assert_logprobs(rollouts.logprobs_B_K, student, RAGGED, rollouts, at_temperature_1)
    assert_logprobs(rollouts.sampling_logprobs_B_K, student, RAGGED, rollouts, sampled)
    if vocab_size == 16:
        assert max(map(max, responses(rollouts))) < 16
        assert stub.completions()[0]["logit_bias"] == {"16": -100.0, "17": -100.0, "18": -100.0}


def test_so_many_rows_are_asked_for_at_a_time(stub, student, tmp_path):
    stub.script, stub.delay_s = {(BOS,): [EOS]}, 0.1
    roll_out(make_backend(stub, tmp_path, concurrency=3), student, [[BOS]] * 9)
    assert stub.most_in_flight == 3


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"url": "host:8000"}, "must begin with http:// or https://, got 'host:8000'"),
        ({"timeout_s": 0.0}, "must be > 0 seconds, got 0.0"),
        ({"concurrency": 0}, "at a time must be >= 1, got 0"),
        ({"weights_folder_on_server": "weights"}, "must be an absolute path, got 'weights'"),
    ],
)
def test_arguments_that_make_no_backend(tmp_path, arguments, text):
    with pytest.raises(InputError, match=text):
        VllmServerBackend(**({"url": "http://host:8000", "weights_folder": tmp_path} | arguments))


def test_the_environments_proxy_is_not_asked(stub, student, tmp_path, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setitem(os.environ, "http_proxy", "http://127.0.0.1:9")  # a port that answers nobody
    assert roll_out(make_backend(stub, tmp_path), student).batch_size == len(RAGGED)


def test_description(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    words = f"vLLM 0.32.0 at {stub.url} serving student-at-start; weights of LlamaForCausalLM by {tmp_path}"
    assert backend.describe(student) == words
    assert stub.loaded == []
