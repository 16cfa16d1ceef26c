"""Are tokens drawn with the probabilities that temperature and filters define?

python -m pytest tests/kernels/test_sample_tokens_distribution.py
"""

import numpy as np
import pytest
import torch

from esr_kernels import Impl, SamplerState, sample_tokens
from esr_kernels.sample_tokens.reference import draw

LOGITS = {
    "flat": np.zeros(16),
    "peaked": np.array([6.0, 2.0, 1.0, 0.0, -1.0, -np.inf, 2.0, -3.0]),
    "zipf": -1.1 * np.log(np.random.default_rng(0).permutation(128) + 1.0),  # language-model-like
}
NUM_DRAWS = {Impl.REFERENCE: 20_000, Impl.FUSED: 1_000_000}
# temperature, top_k, top_p, min_p
SETTINGS = {
    "T0.2": (0.2, 0, 1.0, 0.0),
    "T1": (1.0, 0, 1.0, 0.0),
    "T5": (5.0, 0, 1.0, 0.0),
    "top_k": (1.0, 5, 1.0, 0.0),
    "top_p": (1.0, 0, 0.6, 0.0),
    "min_p": (1.0, 0, 1.0, 0.1),
    "all": (1.7, 6, 0.8, 0.05),
}


def exact_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The definition as a loop over ranked ids, in numpy."""
    p = np.exp((logits - logits.max()) / temperature)
    ranked = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    if top_k:
        ranked = ranked[:top_k]
    total, mass, kept = p[ranked].sum(), 0.0, []
    for i in ranked:
        if kept and mass >= top_p * total and top_p < 1:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= min_p * p.max()]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


def chi_squared_bound(degrees: int) -> float:
    """Critical value at p = 1e-6 (z = 4.75) by Wilson and Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LOGITS)
def test_chi_squared(name, setting, sampler_impl):
    """R1: the draws are rows of 2 positions; rare ids are pooled into one class."""
    logits, (temperature, top_k, top_p, min_p) = LOGITS[name], SETTINGS[setting]
    num_draws, num_positions = NUM_DRAWS[sampler_impl], 2
    num_rows = num_draws // num_positions
    state = SamplerState.create(
        num_rows,
        num_positions,
        eos_ids=(),
        sampling_temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=7,
    )
    for _ in range(num_positions):
        sample_tokens(torch.tensor(logits).float().expand(num_rows, -1), state, impl=sampler_impl)
    counts = np.bincount(state.token_ids_B_K.numpy().ravel(), minlength=len(logits))
    expected = exact_probabilities(logits, temperature, top_k, top_p, min_p) * num_draws
    assert (counts[expected == 0] == 0).all()
    common, rare = expected >= 10, (expected > 0) & (expected < 10)
    observed = np.append(counts[common], counts[rare].sum() + 0.0)
    predicted = np.append(expected[common], expected[rare].sum())
    used = predicted > 1
    statistic = ((observed - predicted)[used] ** 2 / predicted[used]).sum()
    if used.sum() == 1:  # a single possible id
        assert statistic < 1e-6 * num_draws
    else:
        assert statistic < chi_squared_bound(int(used.sum()) - 1)
        # E[total variation] <= sqrt(classes / draws) / 2
        assert np.abs(counts - expected).sum() / (2 * num_draws) < 2 * (len(logits) / num_draws) ** 0.5


def test_rows_with_different_parameters_in_one_call(sampler_impl):
    """Row r of each setting draws from that setting's distribution: its support and its log-prob are the row's own."""
    logits, repeats = LOGITS["zipf"], 50
    parameters = np.repeat(np.array(list(SETTINGS.values())), repeats, axis=0)
    state = SamplerState.create(
        len(parameters),
        1,
        eos_ids=(),
        sampling_temperature=torch.tensor(parameters[:, 0]),
        top_k=torch.tensor(parameters[:, 1]).long(),
        top_p=torch.tensor(parameters[:, 2]),
        min_p=torch.tensor(parameters[:, 3]),
    )
    sample_tokens(torch.tensor(logits).float().expand(len(parameters), -1), state, impl=sampler_impl)
    for row, (temperature, top_k, top_p, min_p) in enumerate(parameters):
        exact = exact_probabilities(logits, temperature, int(top_k), top_p, min_p)
        probability = exact[state.token_ids_B_K[row, 0]]
        assert probability > 0
        assert state.sampling_logprobs_B_K[row, 0].item() == pytest.approx(np.log(probability), abs=1e-6)


@pytest.mark.parametrize("gap", [18.0, 20.5])
def test_tail_mass(gap, sampler_impl):
    """R2: 262144 tail ids, each below 2^-25 of the head: z of the number of tail draws within 4.

    A uniform of 24 bits, or weights below 2^-24 cut off, would reach too few of them. The reference draws less often.
    """
    tail, num_draws = 262_144, {Impl.REFERENCE: 48, Impl.FUSED: 100_000}[sampler_impl]
    logits = torch.full((1, 1 + tail), -gap)
    logits[0, 100] = 0.0
    num_rows = min(num_draws, 1000)
    state = SamplerState.create(num_rows, -(-num_draws // num_rows), eos_ids=(), seed=3)
    for _ in range(state.horizon):
        sample_tokens(logits.expand(num_rows, -1), state, impl=sampler_impl)
    p = tail * np.exp(-gap) / (1 + tail * np.exp(-gap))
    hits = int((state.token_ids_B_K != 100).sum())
    assert abs(hits - num_draws * p) < 4 * (num_draws * p * (1 - p)) ** 0.5
    logprob = state.logprobs_B_K[state.token_ids_B_K == 100]
    torch.testing.assert_close(logprob, torch.full_like(logprob, np.log1p(-p)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("random", "expected"),
    [
        (0, 1),  # id 0 has weight 0
        (2**52 - 1, 1),
        (2**52, 3),  # strictly greater: u * total = cumulative goes to the next id
        (2**53 - 2**13, 3),
        (2**53 - 8, 4),  # a tail of mass 2^-50 is reached: a float32 uniform never would
        (2**53 - 1, 4),
    ],
)
def test_inverse_cdf_by_hand(random, expected):
    weights = torch.tensor([[0, 2**49, 0, 2**49 - 1, 1, 0]])
    token, mass = draw(weights, torch.tensor([random]))
    assert token.item() == expected
    assert mass.item() == 2**50


def test_inverse_cdf_never_passes_the_last_id():
    weights = torch.tensor([[1, 2**61, 0]])
    assert draw(weights, torch.tensor([2**53 - 1]))[0].item() == 1


def test_positions_requests_and_seeds_differ(sampler_impl):
    """R5: with 4096 equally likely ids, two independent draws agree once in 4096."""
    num_rows, num_positions = 64, 16
    runs = []
    for seed in (0, 1, 2**32):
        state = SamplerState.create(num_rows, num_positions, eos_ids=(), seed=seed)
        for _ in range(num_positions):
            sample_tokens(torch.zeros(num_rows, 4096), state, impl=sampler_impl)
        runs.append(state.token_ids_B_K)
    all_tokens = torch.stack(runs).flatten()
    # 3072 draws of 4096 ids: 4096 (1 - (1 - 1/4096)^3072) = 2161 distinct expected, sigma below 31
    assert abs(len(all_tokens.unique()) - 2161) < 140
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (runs[a] == runs[b]).float().mean() < 0.01
