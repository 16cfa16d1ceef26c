"""Do the sampler's CUDA kernels, emulated, give the bits of its CPU half, without a race or a bad access?

python -m pytest tests/csrc/test_emulated_sampler_smoke.py
"""

from dataclasses import replace

import pytest
import torch
from emulated import (
    CHANGED,
    DTYPES,
    Build,
    EmulatedDevice,
    EmulatedLaunch,
    LaunchPlan,
    Order,
    run_emulated,
    start_builds,
)

from esr_kernels import SamplerState

PLANS = [
    (LaunchPlan(1, 64, 0), Order.ASCENDING),
    (LaunchPlan(1, 32, 1), Order.DESCENDING),
    (LaunchPlan(2, 96, 1), Order.RANDOM),
    (LaunchPlan(4, 64, 0), Order.DESCENDING),
    (LaunchPlan(8, 32, 1), Order.ASCENDING),
    (LaunchPlan(), Order.RANDOM),
]


@pytest.fixture(scope="module", autouse=True)
def builds():
    start_builds("emulated_sampler")


def launches(dtype: torch.dtype) -> list[EmulatedLaunch]:
    """The same calls for each plan: rows that start unaligned, every filter on and off, greedy, an end by EOS."""
    generator = torch.Generator().manual_seed(0)
    logits = (2.2 * torch.randn(6, 203, generator=generator)).to(dtype)
    logits[4] = logits[4].round()  # ties
    logits[5, 17] = 20.0
    state = SamplerState.create(
        6,
        3,
        eos_ids=[17],
        sampling_temperature=torch.tensor([1.0, 0.7, 1.3, 0.0, 2.0, 1.0]),
        top_k=torch.tensor([0, 40, 0, 0, 7, 0]),
        top_p=torch.tensor([1.0, 0.9, 0.8, 1.0, 0.95, 1.0]),
        min_p=torch.tensor([0.0, 0.01, 0.0, 0.0, 0.0, 0.1]),
        seed=2**63 + 5,
        request_ids=[3, 1, 4, 159, 26, 5],
        pad_id=0,
    )
    common = EmulatedLaunch(logits, state, num_calls=3, row_stride=205, first_row_offset=4)
    return [replace(common, plan=plan, order=order, order_seed=7) for plan, order in PLANS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", Build)
def test_emulated_kernels_give_the_bits_of_the_cpu_half(build, dtype):
    on_device = launches(dtype)
    expected = run_emulated([replace(on_device[0], is_cpu_half=True)])[0]
    assert (expected["token_ids_B_K"] != on_device[0].state.token_ids_B_K).any(dim=1).all()
    for launch, outcome in zip(on_device, run_emulated(on_device, build), strict=True):
        assert outcome["error"] == 0
        for name in CHANGED:
            found, wanted = (values[name].reshape(-1).view(torch.uint8) for values in (outcome, expected))
            assert torch.equal(found, wanted), (launch.plan, launch.order, name)


def test_a_refused_launch_gives_its_error_and_changes_nothing():
    whole = launches(torch.float32)[0]
    too_large = replace(whole, plan=LaunchPlan(1, 64, 1), device=EmulatedDevice(shared_bytes_per_block=16 * 1024))
    no_clusters = replace(whole, plan=LaunchPlan(2, 64, 0), device=EmulatedDevice(compute_capability_major=8))
    for launch, error in zip((too_large, no_clusters), (1, 801), strict=True):
        outcome = run_emulated([launch])[0]
        assert outcome["error"] == error
        assert all(torch.equal(outcome[name], getattr(launch.state, name)) for name in CHANGED)
