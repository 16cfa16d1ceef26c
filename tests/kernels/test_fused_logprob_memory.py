"""Do the fused log-prob ops hold the memory that their docstrings say, in forward, between the passes and in backward?

python -m pytest tests/kernels/test_fused_logprob_memory.py

Peaks are counted from all allocations. Without a CUDA device no kernel runs: it allocates nothing there, while Triton's
interpreter keeps tensors alive for longer than a launch. What it would write does not matter here.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from esr_kernels import LogitStorage, gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.gather_logprobs import forward_kernel
from esr_kernels.output_projection import gradients, picked_logits_kernel, plan, projection, tile_relative_kernel
from esr_kernels.output_projection.plan import logit_bytes_per_row
from esr_kernels.prefix_logprobs import backward_kernel
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import make_upstream
from esr_kernels.testing.logprob_inputs import make_gather_inputs, make_prefix_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 16 rollouts of 8 slots, 128 rows; slices much smaller than the vocabulary, as in a large one.
B, T, HORIZON, N, VOCAB, SIZE, IDS = 16, 10, 8, 128, 3000, 64, 4
WIDTH, SLICE, COLUMNS = 3072, 256, 128
FLOAT32_STORAGE, TILE_RELATIVE = LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16
# A CPU converts 16-bit operands of a product first, and makes a 16-bit result in float32.
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
every_storage = pytest.mark.parametrize("storage", [FLOAT32_STORAGE, TILE_RELATIVE])


class NoLaunch:
    def __getitem__(self, grid) -> Callable:
        return lambda *arguments, **options: None


@pytest.fixture(autouse=True)
def small_slices_and_no_launches(monkeypatch):
    monkeypatch.setattr(gradients, "SLICE_IDS", SLICE)
    for module in (projection, plan):
        monkeypatch.setattr(module, "PROJECTION_COLUMNS", COLUMNS)
    if DEVICE == "cpu":
        for module, kernel in (
            (forward_kernel, "logprob_row_kernel"),
            (backward_kernel, "logprob_gradient_kernel"),
            (picked_logits_kernel, "pick_logits_kernel"),
            (tile_relative_kernel, "store_tile_relative_kernel"),
        ):
            monkeypatch.setattr(module, kernel, NoLaunch())


class Held(NamedTuple):
    peak: int
    after: int


@pytest.fixture
def bytes_held_by(tmp_path) -> Callable[[Callable], tuple[Held, object]]:
    """The most bytes that a function held at one time beyond what there was before, those left after it, and its result."""

    def on_cpu(function: Callable) -> tuple[Held, object]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as run:
            result = function()
        trace: Path = tmp_path / "trace.json"
        run.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        held = peak = 0
        for _, change in changes:
            held += change
            peak = max(peak, held)
        return Held(peak, held), result

    def on_cuda(function: Callable) -> tuple[Held, object]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Held(peak - before, after - before), result

    return on_cuda if DEVICE == "cuda" else on_cpu


def assert_about(measured: int, expected: int) -> None:
    """At most 2 % more and what 128 rows need for ids, results and sums; and no less, or the count would be broken."""
    small = 400 * N
    assert 0.98 * expected - small <= measured <= 1.02 * expected + small


def test_the_count_sees_what_is_held_for_a_moment(bytes_held_by):
    def function() -> torch.Tensor:
        kept = torch.ones(1000, 100, device=DEVICE)
        return kept + torch.ones(1000, 100, device=DEVICE).exp()[0]

    held, _ = bytes_held_by(function)
    assert held == (1_200_000 + held.peak % 100_000, 400_000 + held.after % 100_000)
    assert held.after < 410_000


class Call:
    """A linear op with its leaves, and the sizes of its formulas."""

    def __init__(
        self, op: str, trained: tuple[str, ...], dtype: torch.dtype, storage: LogitStorage, chunk: int
    ) -> None:
        self.op, self.storage = op, storage
        if op == "gather":
            inputs = make_gather_inputs(Shape(N, VOCAB, SIZE, SIZE + 1), IDS, seed=1, dtype=dtype, device=DEVICE)
            self.where, num_upstream = (inputs.token_ids_N_K,), N * IDS
        else:
            inputs = make_prefix_inputs(B, T, VOCAB, SIZE, horizon=HORIZON, seed=1, dtype=dtype, device=DEVICE)
            ones = torch.ones(B, dtype=torch.int64)
            self.where, num_upstream = (inputs.token_ids_B_T, ones, HORIZON), N
        leaves = {"hidden": inputs[0], "weight": inputs.head.weight}
        self.tensors = [x.requires_grad_(name in trained) for name, x in leaves.items()]
        self.leaves = [x for x in self.tensors if x.requires_grad]
        self.upstream = make_upstream(num_upstream, device=DEVICE)
        self.is_half = dtype.itemsize == 2
        self.itemsize, self.gradient_itemsize = dtype.itemsize, 2 if self.is_half else 4
        row_bytes = logit_bytes_per_row(VOCAB, storage, self.gradient_itemsize, num_sides=1)
        self.workspace_bytes = 2**30 if chunk == N else chunk * row_bytes
        of_storage = 4 * WIDTH if storage == FLOAT32_STORAGE else 2 * WIDTH + 4 * WIDTH // 128
        self.stored = N * of_storage
        self.logits = chunk * (of_storage + (0 if storage == FLOAT32_STORAGE else 4 * COLUMNS))
        # float32 d(logits) take the place of float32 logits, float16 ones that of either
        self.beside_logits = chunk * 4 * WIDTH if storage == TILE_RELATIVE and not self.is_half else 0

    def __call__(self) -> torch.Tensor:
        options = {"logits": self.storage, "workspace_bytes": self.workspace_bytes}
        function = gather_logprobs if self.op == "gather" else linear_prefix_logprobs
        result = function(*self.tensors, *self.where, **options)
        return (result if self.op == "gather" else result.logprobs_B_K).flatten()

    def backward(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(value, self.leaves, self.upstream)

    def compacted(self) -> int:
        return self.itemsize * N * SIZE if self.op == "linear" else 0

    def results(self) -> int:
        """The gradients, for the prefix op also that of the compacted rows."""
        return sum(x.numel() for x in self.leaves) * self.itemsize + self.compacted()

    def slices(self) -> int:
        """Of the weight's gradient in float32 and of the converted weight, one after the other."""
        return SLICE * SIZE * (4 if len(self.leaves) > 1 else 2 * self.is_half)

    def rows(self) -> int:
        """Sums of the input gradient in float32, or the weighted rows for the weight's gradient."""
        return 4 * N * SIZE


@every_storage
@every_dtype
@pytest.mark.parametrize("op", ["linear", "gather"])
def test_x8_without_gradient_there_are_the_logits_of_a_chunk(bytes_held_by, op, dtype, storage):
    for chunk in (N, 32):
        call = Call(op, (), dtype, storage, chunk)
        call()
        held, _ = bytes_held_by(call)
        assert_about(held.peak, call.logits + call.compacted())
        assert_about(held.after, 0)


@every_storage
@every_dtype
def test_x8_a_frozen_head_keeps_the_input_gradient_alone(bytes_held_by, dtype, storage):
    for chunk in (N, 32):
        call = Call("linear", ("hidden",), dtype, storage, chunk)
        call()
        held, value = bytes_held_by(call)
        converted = 2 * SLICE * SIZE * call.is_half
        assert_about(held.peak, call.logits + call.beside_logits + call.compacted() + call.rows() + converted)
        assert_about(held.after, call.rows())
        held, _ = bytes_held_by(lambda call=call, value=value: call.backward(value))
        assert_about(held.peak, call.results() + call.rows() * call.is_half)


@every_storage
@every_dtype
def test_x8_a_trained_head_keeps_d_logits_where_they_fit(bytes_held_by, dtype, storage):
    call = Call("linear", ("hidden", "weight"), dtype, storage, N)
    call()
    held, value = bytes_held_by(call)
    kept = call.gradient_itemsize * N * WIDTH + call.compacted()
    assert_about(held.peak, call.logits + kept)
    assert_about(held.after, kept)
    held, _ = bytes_held_by(lambda: call.backward(value))
    assert_about(held.peak, call.results() + call.rows() + call.slices())


@every_storage
@every_dtype
def test_x8_gather_keeps_the_logits_of_all_rows_where_they_fit(bytes_held_by, dtype, storage):
    for trained in (("hidden",), ("hidden", "weight")):
        call = Call("gather", trained, dtype, storage, N)
        call()
        held, value = bytes_held_by(call)
        assert_about(held.peak, call.logits)
        assert_about(held.after, call.stored)
        held, _ = bytes_held_by(lambda call=call, value=value: call.backward(value))
        of_gradient = call.gradient_itemsize * N * WIDTH
        assert_about(held.peak, of_gradient + call.results() + call.rows() + call.slices())


@every_storage
@every_dtype
@pytest.mark.parametrize("op", ["linear", "gather"])
def test_x8_where_they_do_not_fit_a_chunk_at_a_time_and_the_weights_gradient_in_float32(
    bytes_held_by, op, dtype, storage
):
    call = Call(op, ("hidden", "weight"), dtype, storage, 32)
    call()
    held, value = bytes_held_by(call)
    assert_about(held.peak, call.logits + call.compacted())
    assert_about(held.after, call.compacted())
    held, _ = bytes_held_by(lambda: call.backward(value))
    in_float32, chunk = 4 * VOCAB * SIZE, call.logits + call.beside_logits
    # The last chunk may be gone when the sum becomes the gradient.
    least, most = in_float32 + call.results(), in_float32 + chunk + call.results() + call.rows()
    assert least <= held.peak <= 1.02 * most


@every_dtype
def test_x8_prefix_logprobs_holds_one_gradient(bytes_held_by, dtype):
    """Forward: tens of bytes a slot; at the slots of the docstring 20, and the rows of the logits as int64."""
    inputs = make_prefix_inputs(B, T, VOCAB, SIZE, horizon=HORIZON, seed=2, dtype=dtype, device=DEVICE)
    logits, upstream = inputs.logits().requires_grad_(), torch.ones(B, HORIZON, device=DEVICE)

    def forward() -> torch.Tensor:
        return prefix_logprobs(logits, *inputs[2:4], HORIZON).logprobs_B_K

    forward()
    held, value = bytes_held_by(forward)
    assert 0 < held.after <= held.peak <= 150 * N + 512 * 20 * (DEVICE == "cuda")
    held, _ = bytes_held_by(lambda: torch.autograd.grad(value, logits, upstream))
    assert_about(held.peak, logits.numel() * dtype.itemsize)
    assert math.isclose(held.after, 0, abs_tol=logits.numel() * dtype.itemsize * 1.02)
