"""Which ids do temperature 0, top-k, top-p and min-p keep, at boundaries and ties, and as Hugging Face does?

python -m pytest tests/kernels/test_sample_tokens_filters.py
"""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from esr_kernels import Impl, SamplerState, sample_tokens
from esr_kernels.sample_tokens.fixed_point import (
    fraction_bits_for,
    least_weight_of,
    scale_of_temperature,
    weights_of,
)
from esr_kernels.sample_tokens.reference import kept_ids


def drawn_ids(sampler_impl: Impl, logits: list[float], **parameters) -> set[int]:
    """The ids seen in 600 draws; an id of probability 1/16 is missed with probability 1e-17."""
    state = SamplerState.create(600, 1, eos_ids=(), **parameters)
    sample_tokens(torch.tensor(logits).expand(600, -1), state, impl=sampler_impl)
    return set(state.token_ids_B_K.flatten().tolist())


def log(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -math.inf for p in probabilities]


@pytest.mark.parametrize("parameters", [{"sampling_temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-8}])
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 3.0, 1.0], 1),
        ([2.0, 2.0, 2.0], 0),  # ties to the lowest id
        ([-1.0, 5.0, 0.0, 5.0], 1),
        ([-math.inf, -7.0, -7.0, -math.inf], 1),
    ],
)
def test_greedy_settings_are_argmax_with_the_lowest_id(logits, expected, parameters, sampler_impl):
    """R6 and R7 at top_p = 0: one id, whatever the random number, with sampling log-prob 0."""
    state = SamplerState.create(50, 1, eos_ids=(), **parameters)
    sample_tokens(torch.tensor(logits).expand(50, -1), state, impl=sampler_impl)
    assert (state.token_ids_B_K == expected).all()
    assert (state.sampling_logprobs_B_K == 0).all()


def test_temperature_zero_ignores_filters_and_keeps_the_raw_logprob(sampler_impl):
    state = SamplerState.create(1, 1, eos_ids=(), sampling_temperature=0.0, top_k=3, top_p=0.9, min_p=0.5)
    sample_tokens(torch.tensor([log(0.2, 0.5, 0.3)]), state, impl=sampler_impl)
    assert state.token_ids_B_K.item() == 1
    assert state.sampling_logprobs_B_K.item() == 0
    assert state.logprobs_B_K.item() == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e-300])
def test_tiny_temperature_is_nearly_greedy(scale, sampler_impl):
    assert drawn_ids(sampler_impl, [1.0, 2.0, 0.0], sampling_temperature=scale) == {1}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 3}, {0, 1, 2}),  # ids 0, 3 and 4 tie for rank 2: exactly k are kept, the lower id
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.4}, {1}),  # the mass reaches 0.4 exactly
        ({"top_p": 0.41}, {1, 2}),  # the crossing token is kept
        ({"top_p": 0.75}, {0, 1, 2}),  # of the ids tied at the boundary the lowest alone is needed
        ({"top_p": 0.85}, {0, 1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        # top-2 renormalised is (4/7, 3/7): top-p 0.5 keeps one id; on the full distribution it would keep two
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {1, 2}),
        ({"min_p": 0.7}, {1, 2}),  # relative to 0.4: at least 0.28
        ({"min_p": 0.2}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.76}, {1}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 4, "min_p": 0.2}, {0, 1, 2, 3}),
        ({"sampling_temperature": 2.0, "min_p": 0.49}, {0, 1, 2, 3, 4}),  # sqrt(0.1 / 0.4) = 0.5
        ({"sampling_temperature": 0.5, "min_p": 0.2}, {1, 2}),  # (0.1 / 0.4)^2 = 0.0625
    ],
)
def test_kept_ids_by_hand(parameters, expected, sampler_impl):
    # the 1e-5 makes "reaches 0.4" safe from the rounding of the float32 logarithm
    assert drawn_ids(sampler_impl, log(0.1, 0.4 + 1e-5, 0.3, 0.1, 0.1), **parameters) == expected


@pytest.mark.parametrize(("min_p", "expected"), [(0.0, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3}), (0.5, {0, 1, 2, 3})])
def test_min_p_on_a_flat_row_keeps_all(min_p, expected, sampler_impl):
    assert drawn_ids(sampler_impl, [0.0] * 4, min_p=min_p) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2}), (0.99, {0, 1, 2, 3})])
def test_top_p_ties_on_a_flat_row_keep_the_lower_ids(top_p, expected, sampler_impl):
    assert drawn_ids(sampler_impl, [0.0] * 4, top_p=top_p) == expected


@pytest.mark.parametrize("parameters", [{"top_k": 3}, {"top_p": 3 / 512}])
def test_ties_in_a_wide_row_keep_the_lower_ids(parameters, sampler_impl):
    assert drawn_ids(sampler_impl, [0.0] * 512, **parameters) == {0, 1, 2}


def test_top_k_beyond_the_finite_logits_draws_finite_ids_only(sampler_impl):
    assert drawn_ids(sampler_impl, log(0.0, 0.5, 0.0, 0.5), top_k=3) == {1, 3}


def test_equals_hugging_face_warpers(sampler_impl):
    """R8: 1000 random rows with random parameters: same kept set, same probabilities, and the draw's log-prob."""
    num_rows, vocab_size = 1000, 40
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    temperature = 0.2 + 2 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    top_k = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    top_p = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    min_p = 0.3 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    for switched_off, parameter, off in ((0, top_k, 0), (1, top_p, 1.0), (2, min_p, 0.0)):
        parameter[torch.arange(num_rows) % 4 == switched_off] = off

    expected = torch.empty_like(logits, dtype=torch.float64)
    for row in range(num_rows):
        warpers = [TemperatureLogitsWarper(temperature[row].item())]
        if top_k[row] > 0:
            warpers.append(TopKLogitsWarper(top_k[row].item()))
        warpers += [TopPLogitsWarper(top_p[row].item()), MinPLogitsWarper(min_p[row].item())]
        scores = logits[row : row + 1].double()
        for warper in warpers:
            scores = warper(None, scores)
        expected[row] = scores[0].softmax(-1)

    fraction_bits = fraction_bits_for(vocab_size)
    weights = weights_of(logits, logits.amax(-1), scale_of_temperature(temperature), fraction_bits)
    kept = kept_ids(logits, weights, top_k, top_p) & (weights >= least_weight_of(min_p, fraction_bits)[:, None])
    # an id below 2^-45 of the likeliest has no weight; no filter of these rows would have kept one
    assert torch.equal(kept & (weights > 0), expected > 0.5**45)
    weights = torch.where(kept, weights, 0).double()
    # 24 bits of the logits' distance times up to 45 octaves
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected, rtol=5e-6, atol=2.0**-45)

    state = SamplerState.create(
        num_rows, 1, eos_ids=(), sampling_temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    sample_tokens(logits, state, impl=sampler_impl)
    drawn = expected.gather(1, state.token_ids_B_K).log().float()
    torch.testing.assert_close(state.sampling_logprobs_B_K, drawn, rtol=1e-6, atol=1e-6)
