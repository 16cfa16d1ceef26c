"""Do rollouts by CUDA graphs give what single launches and `generate` give, without asking the device in every step?

pytest -m gpu tests/distill/test_rollout_on_gpu.py

Not run on a GPU yet.
"""

import warnings
from io import StringIO

import pytest
import torch
from rich.console import Console
from test_rollout_backends import ARCHITECTURES, EOS_IDS, RAGGED, SAMPLED, assert_same_rollouts
from tiny_models import PAD, make_model, make_prompt_batch

from esr_distill.input_error import InputError
from esr_distill.prompts import PromptBatch
from esr_distill.rollout import GREEDY, InProcessBackend, RolloutBatch, SamplerSettings, generate_rollouts
from esr_distill.rollout.hf_generate import HFGenerateBackend

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products():
    """float32 as on a CPU, so that greedy choices do not depend on the shape of a product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(batch: PromptBatch) -> PromptBatch:
    tensors = (batch.prompt_ids_B_P, batch.prompt_mask_B_P, batch.request_ids_B)
    return PromptBatch(*(tensor.cuda() for tensor in tensors), batch.samples_per_prompt)


def roll_out(model, backend, prompts=RAGGED, **changed) -> RolloutBatch:
    options = {"horizon": 12, "sampler": SAMPLED, "eos_ids": EOS_IDS, "pad_id": PAD, "seed": 7} | changed
    return generate_rollouts(model, on_gpu(make_prompt_batch(prompts)), backend=backend, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_by_graphs_equals_generate(name):
    """D1: prompts of different lengths, ids that end a row, horizons 1, 2 and 100."""
    config_class, options = ARCHITECTURES[name]
    model = make_model(3, config_class, **options).cuda()
    backend = InProcessBackend()
    for horizon in (1, 2, 100):
        expected = roll_out(model, HFGenerateBackend(), sampler=GREEDY, horizon=horizon)
        assert_same_rollouts(roll_out(model, backend, sampler=GREEDY, horizon=horizon), expected, atol=1e-4)


@pytest.mark.parametrize("steps_per_segment", [3, 128])
def test_sampled_by_graphs_equals_single_launches(steps_per_segment):
    model = make_model(2).cuda()
    expected = roll_out(model, InProcessBackend(use_graphs=False), horizon=60)
    assert expected.response_lengths_B.min() < 10
    rollouts = roll_out(model, InProcessBackend(steps_per_segment=steps_per_segment), horizon=60)
    assert_same_rollouts(rollouts, expected, atol=1e-4)


def test_a_backend_is_used_again():
    """D2: other prompts, fewer rows, changed weights and a larger cache, with graphs that stay where they can."""
    console = Console(file=StringIO(), width=200)
    model, backend = make_model(2).cuda(), InProcessBackend(console=console)
    for changed, new in (
        ({}, 1),
        ({"prompts": RAGGED[::-1], "seed": 8}, 0),
        ({"prompts": RAGGED[:3]}, 1),
        ({"prompts": [[1, *[3 + i % 15 for i in range(70)]], [1, 4]]}, 1),
    ):
        console.file.truncate(0)
        rollouts = roll_out(model, backend, **changed)
        assert_same_rollouts(rollouts, roll_out(model, InProcessBackend(use_graphs=False), **changed), atol=1e-4)
        assert console.file.getvalue().count("step captured") == new, changed
    roll_out(model, backend)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    console.file.truncate(0)
    rollouts = roll_out(model, backend)
    assert "captured" not in console.file.getvalue()
    assert_same_rollouts(rollouts, roll_out(model, InProcessBackend(use_graphs=False)), atol=1e-4)


def test_weights_are_cast_anew_under_autocast():
    """A graph must not keep the bfloat16 copy of a weight that has changed since."""
    model, backend = make_model(5).cuda(), InProcessBackend()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        first = roll_out(model, backend, sampler=SamplerSettings())
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        graphs = roll_out(model, backend, sampler=SamplerSettings())
        launches = roll_out(model, InProcessBackend(use_graphs=False), sampler=SamplerSettings())
    assert_same_rollouts(graphs, launches, atol=0.05)
    assert not torch.equal(graphs.token_ids_B_T, first.token_ids_B_T)


def test_the_host_does_not_wait_in_a_step():
    """As often in 100 steps as in 10: at the start and at the end."""
    model, backend = make_model(2).cuda(), InProcessBackend()
    waits = {}
    for horizon in (10, 100):
        roll_out(model, backend, horizon=horizon, eos_ids=())  # captures
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                roll_out(model, backend, horizon=horizon, eos_ids=())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits[horizon] = sum("synchronizing" in str(warning.message) for warning in caught)
    assert waits[100] == waits[10] > 0


def test_released_memory_is_free():
    model, backend = make_model(2).cuda(), InProcessBackend()
    before = torch.cuda.memory_allocated()
    roll_out(model, backend)
    assert torch.cuda.memory_allocated() > before
    backend.release()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_step_that_asks_the_host_is_refused_by_name():
    model = make_model(2).cuda()
    model.lm_head.register_forward_hook(lambda _, inputs, output: output * float(output.isfinite().all().item()))
    with pytest.raises(InputError, match="rollout.cuda_graphs must be false for a model whose step cannot be captured"):
        roll_out(model, InProcessBackend())
