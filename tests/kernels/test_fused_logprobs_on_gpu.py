"""Do the fused log-prob ops hold on a CUDA device: real vocabularies, 2^32 logits, graphs, streams, memory, no recompilation?

python -m pytest -m gpu tests/kernels/test_fused_logprobs_on_gpu.py

Not run on a GPU yet. Inputs are made on the device.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from graph_replay import assert_all_equal, assert_graph_replays
from torch import Tensor

from esr_kernels import Impl, LogitStorage, gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.output_projection import projection
from esr_kernels.testing.cases import MODEL_SHAPES, VOCAB_SIZES, Shape
from esr_kernels.testing.error_budget import check_against
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.testing.logprob_inputs import GatherInputs, PrefixInputs, make_gather_inputs, make_prefix_inputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_gather_logprobs,
    evaluate_linear_prefix_logprobs,
    evaluate_prefix_logprobs,
    gather_logprobs_oracle,
    linear_prefix_logprobs_oracle,
    prefix_logprobs_oracle,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BFLOAT16 = torch.bfloat16
QWEN3 = VOCAB_SIZES["qwen3"]
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])


def prefix_inputs(batch_size: int, num_columns: int, vocab_size: int, size: int, **options) -> PrefixInputs:
    return make_prefix_inputs(batch_size, num_columns, vocab_size, size, device=DEVICE, **options)


def gather_inputs(shape: Shape, num_ids: int, **options) -> GatherInputs:
    return make_gather_inputs(shape, num_ids, device=DEVICE, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("vocabulary", ["qwen3", "gpt2"])
def test_s1_logits_of_published_vocabularies(vocabulary, dtype):
    inputs = prefix_inputs(3, 9, VOCAB_SIZES[vocabulary], 64, horizon=5, seed=1, dtype=dtype)
    upstream, options = normal(3, 5), {"temperature": 0.8}
    check_against(prefix_logprobs_oracle, evaluate_prefix_logprobs, inputs.logits(), inputs, upstream, **options)


@every_storage
@pytest.mark.parametrize("shape", ["qwen3-0.6b<-1.7b", "gpt2<-gpt2-xl"])
def test_s1_heads_of_published_models(shape, storage):
    """Full heads and few rows, gradients of hidden states and head, one id per row and twenty."""
    full, options = MODEL_SHAPES[shape], {"logits": storage, "temperature": 0.8}
    size = full.student_size
    prefix = prefix_inputs(4, 12, full.vocab_size, size, horizon=8, seed=2, dtype=BFLOAT16)
    check_against(linear_prefix_logprobs_oracle, evaluate_linear_prefix_logprobs, prefix, normal(4, 8), **options)
    gather = gather_inputs(Shape(40, full.vocab_size, size, size + 1), 20, seed=3, dtype=BFLOAT16)
    check_against(gather_logprobs_oracle, evaluate_gather_logprobs, gather, normal(40, 20), **options)


def slots_of(few: Tensor, num_columns: int, vocab_size: int) -> Tensor:
    """(2, num_columns, V) logits of zeros, but for those that predict the last two columns of each rollout."""
    logits = torch.zeros(2, num_columns, vocab_size, dtype=BFLOAT16, device=DEVICE)
    logits[:, -3:-1] = few.view(2, 2, vocab_size)
    return logits


@pytest.mark.parametrize("num_columns", [7100, 14200])  # 2.16e9 > 2^31 and 4.31e9 > 2^32 logits
def test_s2_more_logits_than_32_bits_can_count(num_columns):
    """Rows beyond the limit give what they give alone, and no other element of the gradient is touched."""
    assert 2 * num_columns * QWEN3 > (2**32 if num_columns > 10000 else 2**31)
    few = make_logit_pair(4, QWEN3, seed=4, dtype=BFLOAT16, device=DEVICE).student_N_V
    tokens, upstream = torch.tensor([[5, QWEN3 - 1], [70000, 0]], device=DEVICE), normal(2, 2)
    runs = []
    for columns in (num_columns, 3):
        logits = slots_of(few, columns, QWEN3).requires_grad_()
        ids = torch.zeros(2, columns, dtype=torch.int64, device=DEVICE)
        ids[:, -2:] = tokens
        starts = torch.full((2,), columns - 2, device=DEVICE)
        result = prefix_logprobs(logits, ids, starts, 2)
        (gradient,) = torch.autograd.grad(result.logprobs_B_K, logits, upstream)
        runs.append((*(field.detach() for field in result), gradient[:, -3:-1].clone()))
        assert gradient.count_nonzero() == runs[-1][-1].count_nonzero() > 0
        del logits, gradient
    for whole, alone in zip(*runs, strict=True):
        assert torch.equal(whole, alone)


def test_s2_strides_beyond_32_bits():
    """Rows 200 vocabularies apart, and rollouts 80 such rows: neither offset fits in 32 bits."""
    inputs = prefix_inputs(2, 80, 2501, 32, horizon=60, seed=5, dtype=BFLOAT16)
    inputs = inputs._replace(
        starts_B=torch.tensor([21, 20], device=DEVICE), lengths_B=torch.tensor([59, 60], device=DEVICE)
    )
    logits, upstream = inputs.logits(), normal(2, 60)
    wide = torch.full((2, 80, 2501 * 6000), torch.nan, dtype=BFLOAT16, device=DEVICE)
    wide[..., :2501] = logits
    strided = wide[..., :2501]
    assert strided.stride(0) > 2**30 and 79 * strided.stride(1) + strided.stride(0) > 2**31
    expected = evaluate_prefix_logprobs(logits, inputs, upstream, impl=Impl.FUSED)
    actual = evaluate_prefix_logprobs(strided, inputs, upstream, impl=Impl.FUSED)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# Columns, vocabulary, hidden size, horizon of the steps below; bytes that make forward keep nothing for 96 rows of a head.
B, T, V, D, HORIZON, IDS = 16, 12, 2501, 64, 6, 8
WORKSPACES = {"keep": None, "recompute": 32 * 4 * 2560}


class Step:
    """One op with its inputs in fixed memory: what is captured, replayed and run on streams."""

    def __init__(self, op: str, seed: int, workspace: str = "keep", is_frozen: bool = False) -> None:
        self.op, self.workspace = op, WORKSPACES[workspace]
        if op == "gather":
            inputs = gather_inputs(Shape(B * HORIZON, V, D, D + 1), IDS, seed=seed, dtype=BFLOAT16)
            self.integers = [inputs.token_ids_N_K]
            self.upstream = normal(B * HORIZON, IDS, seed=seed)
        else:
            inputs = prefix_inputs(B, T, V, D, horizon=HORIZON, seed=seed, dtype=BFLOAT16)
            self.integers = [inputs.token_ids_B_T, inputs.starts_B, inputs.lengths_B]
            self.upstream = normal(B, HORIZON, seed=seed)
        self.floats = [inputs.logits()] if op == "prefix" else [inputs[0], inputs.head.weight]
        self.leaves = [x.requires_grad_() for x in self.floats[: 1 if is_frozen else None]]

    def __call__(self) -> list[Tensor]:
        if self.op == "gather":
            outputs = [gather_logprobs(*self.floats, *self.integers, workspace_bytes=self.workspace)]
        else:
            ids, starts, lengths = self.integers
            arguments, options = (*self.floats, ids, starts, HORIZON), {"lengths_B": lengths}
            if self.op == "linear":
                outputs = linear_prefix_logprobs(*arguments, workspace_bytes=self.workspace, **options)
            else:
                outputs = prefix_logprobs(*arguments, **options)
        gradients = torch.autograd.grad(outputs[0], self.leaves, self.upstream)
        return [*(x.detach() for x in outputs), *gradients]

    def copy_from(self, other: "Step") -> None:
        mine, theirs = ([*step.floats, *step.integers, step.upstream] for step in (self, other))
        with torch.no_grad():
            for x, y in zip(mine, theirs, strict=True):
                x.copy_(y)


STEPS = {
    "prefix": ("prefix",),
    "linear, keep": ("linear", "keep"),
    "linear, recompute": ("linear", "recompute"),
    "linear, frozen head": ("linear", "keep", True),
    "gather, keep": ("gather", "keep"),
    "gather, recompute": ("gather", "recompute"),
}
every_step = pytest.mark.parametrize("name", STEPS)


def make_step(name: str, seed: int) -> Step:
    op, *options = STEPS[name]
    return Step(op, seed, *options)


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    """Only around what the test runs inside it: set by the test, taken back here whatever happens."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@every_step
def test_x1_no_host_synchronisation(synchronisation_is_an_error, name):
    step = make_step(name, seed=6)
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    actual = step()
    torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(actual, expected)


@every_step
def test_x1_forward_and_backward_in_a_cuda_graph_replayed_with_changed_inputs(name):
    """Other logits or hidden states, ids, starts, lengths and upstream gradients: also other slots are valid."""
    step, other = (make_step(name, seed=seed) for seed in (7, 8))
    assert_graph_replays(step, other)


@every_step
def test_x4_two_streams_at_once(name):
    """Each stream has its own inputs; 20 rounds interleaved, no wait between them."""
    steps = [make_step(name, seed=seed) for seed in (9, 10)]
    expected = [step() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for step, stream, wanted in zip(steps, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((step(), wanted))
    torch.cuda.synchronize()
    for actual, wanted in results:
        assert_all_equal(actual, wanted)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained head", "frozen head"])
def test_starts_on_the_cpu_project_exactly_the_valid_rows(monkeypatch, synchronisation_is_an_error, is_frozen):
    """The other tensors on the device, without waiting for it; the results of starts on the device, which project more."""
    num_rows = []
    product = projection.matmul_float32

    def spy(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
        num_rows.append(len(a))
        product(a, b, out=out, accumulate=accumulate)

    monkeypatch.setattr(projection, "matmul_float32", spy)
    step = Step("linear", 11, "keep", is_frozen)
    ids, starts, lengths = step.integers
    expected = step()
    step.integers = [ids, starts.cpu(), lengths.cpu()]
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    actual = step()
    torch.cuda.set_sync_debug_mode("default")
    is_valid = torch.arange(HORIZON, device=DEVICE) < lengths[:, None]
    assert num_rows[0] == B * HORIZON and num_rows[-1] == int(is_valid.sum()) < B * HORIZON
    assert torch.equal(actual[2], is_valid) and torch.equal(actual[3], expected[3])
    for one, other in zip((*actual[:2], *actual[4:]), (*expected[:2], *expected[4:]), strict=True):
        # A product of another height may round another way, and a bfloat16 gradient then by a unit in its last place.
        tolerance = {"rtol": 8e-3, "atol": 1e-5} if one.dtype == BFLOAT16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_step
def test_x4_tensors_on_a_device_that_is_not_current(name):
    step = make_step(name, seed=12)
    expected = step()
    is_leaf = [x.requires_grad for x in step.floats]
    step.floats = [x.detach().to("cuda:1").requires_grad_(leaf) for x, leaf in zip(step.floats, is_leaf, strict=True)]
    step.leaves = [x for x in step.floats if x.requires_grad]
    step.integers, step.upstream = [x.to("cuda:1") for x in step.integers], step.upstream.to("cuda:1")
    for one, other in zip(step(), expected, strict=True):
        assert one.device.index == 1
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-5)


def compiled_kernels() -> int:
    """How many specialisations of this library's kernels Triton holds in memory."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("esr_kernels")]
    kernels = {id(v): v for module in modules for v in vars(module).values() if isinstance(v, JITFunction)}
    return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())


def test_x6_no_recompilation_when_sizes_or_temperatures_change():
    """20 batches, prompt lengths, horizons and temperatures, 1 and multiples of 16 among them; chunks of other heights."""
    whole = prefix_inputs(64, 40, V, D, horizon=39, seed=13, dtype=BFLOAT16)
    gather = gather_inputs(Shape(64, V, D, D + 1), IDS, seed=13, dtype=BFLOAT16)

    def run(batch_size: int, num_columns: int, horizon: int, temperature: float) -> None:
        starts = torch.ones(batch_size, dtype=torch.int64, device=DEVICE)
        some = PrefixInputs(
            whole.hidden_B_T_D[:batch_size, :num_columns].contiguous(),
            whole.head,
            whole.token_ids_B_T[:batch_size, :num_columns].contiguous(),
            starts,
            starts * (num_columns - 1),
            horizon,
        )
        upstream, options = normal(batch_size, horizon), {"impl": Impl.FUSED, "temperature": temperature}
        evaluate_prefix_logprobs(some.logits(), some, upstream, **options)
        rows = gather._replace(
            hidden_N_D=gather.hidden_N_D[:batch_size], token_ids_N_K=gather.token_ids_N_K[:batch_size]
        )
        for workspace in (None, batch_size * 10240 + 10240):
            options |= {"workspace_bytes": workspace, "logits": LogitStorage.FLOAT32}
            evaluate_linear_prefix_logprobs(some, upstream, **options)
            evaluate_gather_logprobs(rows, normal(batch_size, IDS), **options)

    run(7, 9, 5, 1.0)
    before = compiled_kernels()
    assert before > 0
    for index, batch_size in enumerate([1, 2, 3, 5, 8, 11, 15, 16, 17, 23, 24, 31, 32, 33, 40, 47, 48, 55, 63, 64]):
        run(
            batch_size,
            [2, 9, 16, 32, 40][index % 5],
            [1, 3, 16][index % 3],
            [0.5, 0.7, 1.0, 2.0][index % 4] + 0.01 * index,
        )
    assert compiled_kernels() == before
