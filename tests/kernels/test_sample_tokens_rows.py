"""Does a row depend on itself alone, are its log-probs right, and do broken rows stay harmless?

python -m pytest tests/kernels/test_sample_tokens_rows.py
"""

import numpy as np
import pytest
import torch

from esr_kernels import Impl, SamplerState, prefix_logprobs, sample_tokens

NAN, INF = float("nan"), float("inf")
HORIZON, VOCAB_SIZE = 6, 33


def logits_of(request: int, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * request + position)
    return 2 * torch.randn(VOCAB_SIZE, generator=generator)


def parameters_of(requests: list[int]) -> dict[str, torch.Tensor]:
    """Different filters for neighbouring requests, among them rows without any and greedy rows."""
    ids = torch.tensor(requests)
    return {
        "sampling_temperature": 0.5 * (ids % 4).double(),
        "top_k": 7 * (ids % 3),
        "top_p": 1.0 - 0.2 * (ids % 2).double(),
        "min_p": 0.05 * (ids % 5).double(),
        "request_ids": ids,
    }


def roll_out(sampler_impl: Impl, requests: list[int]) -> SamplerState:
    state = SamplerState.create(len(requests), HORIZON, eos_ids=[2, 11], seed=99, **parameters_of(requests))
    for position in range(HORIZON):
        logits = torch.stack([logits_of(request, position) for request in requests])
        sample_tokens(logits, state, impl=sampler_impl)
    return state


@pytest.mark.parametrize("requests", [[3], [7, 3], [19, 0, 3, 7, 12], list(range(39, -1, -1))])
def test_slot_batch_size_and_neighbours_do_not_matter(requests, sampler_impl):
    """R4: every request gives the bits it gives in the batch 0 .. 39, in every slot and company."""
    whole, part = roll_out(sampler_impl, list(range(40))), roll_out(sampler_impl, requests)
    for slot, request in enumerate(requests):
        for name in ("token_ids_B_K", "logprobs_B_K", "sampling_logprobs_B_K", "lengths_B", "stopped_by_eos_B"):
            assert torch.equal(getattr(part, name)[slot], getattr(whole, name)[request]), (name, request)
    assert whole.lengths_B.min() < HORIZON < VOCAB_SIZE  # some rows did stop early


def test_equal_seed_on_different_requests_differs_and_equal_address_agrees(sampler_impl):
    state = SamplerState.create(4, 8, eos_ids=(), seed=5, request_ids=[1, 2, 1, 2**40 + 1])
    for _ in range(8):
        sample_tokens(torch.zeros(4, 1000), state, impl=sampler_impl)
    tokens = state.token_ids_B_K
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[3])


def test_seed_per_row_equals_seed_of_the_batch(sampler_impl):
    """A row of seed s draws the same in a batch of mixed seeds and in a batch of seed s; 2^64 - 1 is the pattern -1."""
    seeds = [0, 1, 2**63 - 1, 2**64 - 1]
    mixed = SamplerState.create(4, 5, eos_ids=(), seed=torch.tensor([0, 1, 2**63 - 1, -1]))
    for _ in range(5):
        sample_tokens(torch.zeros(4, 500), mixed, impl=sampler_impl)
    for row, seed in enumerate(seeds):
        single = SamplerState.create(4, 5, eos_ids=(), seed=seed)
        for _ in range(5):
            sample_tokens(torch.zeros(4, 500), single, impl=sampler_impl)
        assert torch.equal(single.token_ids_B_K[row], mixed.token_ids_B_K[row])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_raw_logprob_is_log_softmax_and_prefix_logprobs(dtype, sampler_impl):
    """R10: against numpy in float64 on the same low-precision logits, and against `prefix_logprobs` on the rollout."""
    if dtype == torch.float64 and sampler_impl is Impl.FUSED:
        with pytest.raises(TypeError, match="got float64"):
            sample_tokens(torch.zeros(1, 2, dtype=dtype), SamplerState.create(1, 1, eos_ids=()), impl=sampler_impl)
        return
    num_rows, prompt, horizon = 8, 3, 4
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(num_rows, prompt + horizon, VOCAB_SIZE, generator=generator)).to(dtype)
    state = SamplerState.create(num_rows, horizon, eos_ids=[1, 4, 9], sampling_temperature=0.8, top_k=12, seed=1)
    for position in range(horizon):
        sample_tokens(logits[:, prompt - 1 + position], state, impl=sampler_impl)

    z = logits.double().numpy()
    for row in range(num_rows):
        for slot in range(int(state.lengths_B[row])):
            scores = z[row, prompt - 1 + slot]
            expected = scores[state.token_ids_B_K[row, slot]] - np.log(np.exp(scores).sum())
            assert state.logprobs_B_K[row, slot].item() == pytest.approx(expected, abs=1e-5)

    token_ids = torch.cat([torch.zeros(num_rows, prompt, dtype=torch.int64), state.token_ids_B_K], dim=1)
    starts = torch.full((num_rows,), prompt)
    result = prefix_logprobs(
        logits, token_ids, starts, horizon, lengths_B=state.lengths_B, impl=Impl.REFERENCE
    ).logprobs_B_K
    torch.testing.assert_close(state.logprobs_B_K, result.float(), rtol=0, atol=1e-5)


def test_sampling_logprob_by_hand(sampler_impl):
    """Temperature 2 turns (4, 1, 4, 16)/25 into (2, 1, 2, 4)/9; top-3 leaves (2, 2, 4)/8."""
    logits = torch.tensor([4.0, 1.0, 4.0, 16.0]).log().expand(64, -1)
    state = SamplerState.create(64, 1, eos_ids=(), sampling_temperature=2.0, top_k=3)
    sample_tokens(logits, state, impl=sampler_impl)
    tokens = state.token_ids_B_K
    assert set(tokens.flatten().tolist()) == {0, 2, 3}
    torch.testing.assert_close(state.sampling_logprobs_B_K, torch.tensor([0.25, 0.0, 0.25, 0.5]).log()[tokens])
    torch.testing.assert_close(state.logprobs_B_K, (torch.tensor([4.0, 1.0, 4.0, 16.0]) / 25).log()[tokens])


BROKEN = {
    "one NaN": ([0.0, NAN, 2.0, 1.0], 2),
    "NaN first": ([NAN, -1.0, -1.0, -2.0], 1),
    "all NaN": ([NAN, NAN, NAN, NAN], 0),
    "+inf": ([0.0, 5.0, INF, INF], 2),
    "+inf and NaN": ([NAN, 5.0, 1.0, INF], 3),
    "all -inf": ([-INF, -INF, -INF, -INF], 0),
    "NaN and -inf": ([NAN, NAN, -INF, -INF], 2),
}


@pytest.mark.parametrize("parameters", [{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}, {"sampling_temperature": 0.0}])
def test_broken_rows(parameters, sampler_impl):
    """R9: a valid id, the flag, log-probs NaN; neighbours draw what they draw without broken company."""
    rows = [row for row, _ in BROKEN.values()]
    healthy = [0.0, 1.0, -INF, 2.0]
    state = SamplerState.create(len(rows) + 1, 2, eos_ids=(), **parameters)
    sample_tokens(torch.tensor([*rows, healthy]), state, impl=sampler_impl)
    alone = SamplerState.create(1, 2, eos_ids=(), request_ids=[len(rows)], **parameters)
    sample_tokens(torch.tensor([healthy]), alone, impl=sampler_impl)

    assert state.token_ids_B_K[:-1, 0].tolist() == [expected for _, expected in BROKEN.values()]
    assert state.invalid_B.tolist() == [True] * len(rows) + [False]
    assert state.logprobs_B_K[:-1, 0].isnan().all()
    assert state.sampling_logprobs_B_K[:-1, 0].isnan().all()
    for name in ("token_ids_B_K", "logprobs_B_K", "sampling_logprobs_B_K"):
        assert torch.equal(getattr(state, name)[-1], getattr(alone, name)[0])

    sample_tokens(torch.zeros(len(rows) + 1, 4), state, impl=sampler_impl)
    assert state.invalid_B.tolist() == [True] * len(rows) + [False]  # the flag stays
    assert state.logprobs_B_K[:, 1].isfinite().all()


def test_broken_row_that_falls_on_eos_stops(sampler_impl):
    state = SamplerState.create(1, 3, eos_ids=[2])
    sample_tokens(torch.tensor([[0.0, NAN, 7.0]]), state, impl=sampler_impl)
    assert state.stopped_by_eos_B.tolist() == [True]
    assert state.lengths_B.tolist() == [1]
