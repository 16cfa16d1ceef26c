"""Do the sampler's CUDA kernels, emulated, give the reference's tokens and log-probs bit for bit on mixed rows?

python -m pytest tests/csrc/test_emulated_sampler.py
"""

import copy

import pytest
import torch
from emulated import CHANGED, DTYPES, Build, EmulatedLaunch, LaunchPlan, Order, run_emulated, start_builds

from esr_kernels import Impl, sample_tokens
from esr_kernels.testing.sampler_inputs import mixed_rows, mixed_state

NUM_CALLS = 2


@pytest.fixture(scope="module", autouse=True)
def builds():
    start_builds("emulated_sampler")


def assert_emulation_equals_reference(dtype, num_rows, vocab_size, plan, order, build) -> None:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    logits = mixed_rows(num_rows, vocab_size, generator).to(dtype)
    state = mixed_state(num_rows, vocab_size, NUM_CALLS, generator)
    expected = copy.deepcopy(state)
    for _ in range(NUM_CALLS):
        sample_tokens(logits, expected, impl=Impl.REFERENCE)
    launch = EmulatedLaunch(
        logits, state, plan=plan, order=order, order_seed=3, num_calls=NUM_CALLS, row_stride=vocab_size + 1
    )
    (outcome,) = run_emulated([launch], build)
    assert outcome["error"] == 0
    for name in CHANGED:
        one, other = outcome[name], getattr(expected, name)
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), name
        assert torch.equal(one.isnan(), other.isnan()), name
    assert expected.invalid_B.any()
    assert len(expected.token_ids_B_K.unique()) > min(vocab_size // 3, num_rows // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "plan", "order"),
    [
        (3200, 67, LaunchPlan(1, 32, 1), Order.RANDOM),
        (160, 1003, LaunchPlan(4, 64, 1), Order.ASCENDING),
        (160, 1003, LaunchPlan(1, 64, 0), Order.DESCENDING),
    ],
    ids=["one-warp", "cluster", "several-passes"],
)
def test_same_bits_as_the_reference(dtype, num_rows, vocab_size, plan, order):
    assert_emulation_equals_reference(dtype, num_rows, vocab_size, plan, order, Build.MEMORY)


@pytest.mark.parametrize("plan", [LaunchPlan(1, 64, 1), LaunchPlan(2, 64, 0)], ids=["block", "cluster"])
def test_no_race_on_mixed_rows(plan):
    assert_emulation_equals_reference(torch.bfloat16, 120, 259, plan, Order.RANDOM, Build.RACES)
