"""Does the CUDA half of the sampler give the bits of its CPU half, in graphs, on streams, and whatever the batch size is?

python -m pytest -m gpu tests/kernels/test_sample_tokens_on_gpu.py

Not run on a GPU yet. Where the CUDA half is not built, every test fails and says how to build it.
"""

import os
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from test_sample_tokens_rows import BROKEN
from torch import Tensor

from esr_kernels import Impl, SamplerState, sample_tokens
from esr_kernels.sample_tokens import native
from esr_kernels.testing.sampler_inputs import assert_same_states, mixed_rows, mixed_state

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", autouse=True)
def loaded_sampler_and_many_threads() -> Iterator[None]:
    """The CPU half takes up to 20 ms for the widest rows on one thread."""
    native.load_native_sampler(DEVICE)
    before = torch.get_num_threads()
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copy_of(state: SamplerState, device: torch.device | str = DEVICE) -> SamplerState:
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return replace(
        state, **{name: value.to(device, copy=True) for name, value in values.items() if isinstance(value, Tensor)}
    )


def rows_of(state: SamplerState, rows: Tensor) -> SamplerState:
    names = [field.name for field in fields(state) if field.name.endswith(("_B", "_B_K"))]
    part = replace(state, **{name: getattr(state, name)[rows] for name in names})
    part.active = (~part.finished_B).sum()
    return part


def fill(state: SamplerState, values: SamplerState) -> None:
    """Another state's values in the same memory."""
    for field in fields(state):
        if isinstance(getattr(state, field.name), Tensor):
            getattr(state, field.name).copy_(getattr(values, field.name))


def assert_same_bits(state: SamplerState, expected_on_cpu: SamplerState) -> None:
    assert_same_states(copy_of(state, "cpu"), expected_on_cpu)


# Everything that a launch is made of: one warp to 16, one block to clusters of 8, and rows that no shared memory holds.
@every_dtype
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"),
    [
        (3000, 2),
        (3000, 33),
        (2500, 1000),
        (1200, 4099),
        (300, 32_000),
        (64, 151_936),
        (24, 262_144),
        (16, 1_000_003),
    ],
)
def test_same_bits_as_the_cpu_half_on_mixed_rows(num_rows, vocab_size, dtype):
    """10,104 rows of each dtype, two tokens each."""
    on_cpu = mixed_state(num_rows, vocab_size, 2, seeded(vocab_size))
    state = copy_of(on_cpu)
    generator = seeded(num_rows)
    for _ in range(2):
        logits = mixed_rows(num_rows, vocab_size, generator).to(dtype)
        sample_tokens(logits, on_cpu)
        sample_tokens(logits.to(DEVICE), state)
        assert_same_bits(state, on_cpu)
    assert 0 < int(on_cpu.invalid_B.sum()) < num_rows / 6
    if vocab_size > 2:
        assert len(on_cpu.token_ids_B_K.unique()) > min(vocab_size, num_rows) // 4


@every_dtype
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1000, 33), (200, 4099), (20, 151_936)])
def test_same_bits_as_the_reference_on_the_same_device(num_rows, vocab_size, dtype):
    states = [copy_of(mixed_state(num_rows, vocab_size, 2, seeded(vocab_size))) for _ in Impl]
    generator = seeded(num_rows)
    for _ in range(2):
        logits = mixed_rows(num_rows, vocab_size, generator).to(DEVICE, dtype)
        for impl, state in zip(Impl, states, strict=True):
            sample_tokens(logits, state, impl=impl)
    assert_same_states(*states)


@every_dtype
@pytest.mark.parametrize("vocab_size", [127, 40_000], ids=["block", "cluster"])
def test_rows_that_are_strided_unaligned_or_one_row_repeated(vocab_size, dtype):
    """Rows that start at every place of a vector of 16 bytes, columns that are not adjacent, and a row stride of 0."""
    wide = mixed_rows(8, 2 * (vocab_size + 11), seeded(1)).reshape(8, 2, -1).to(dtype)
    views = [lambda t, first=first: t[:, 1, first : first + vocab_size] for first in range(9)]
    views += [lambda t: t[:, 0], lambda t: t.flatten(1)[:, 1:201:2], lambda t: t[:1, 0].expand(8, -1)]
    wide_on_device = wide.to(DEVICE)
    for view in views:
        logits = view(wide)
        on_cpu = mixed_state(8, logits.shape[1], 1, seeded(2))
        state = copy_of(on_cpu)
        sample_tokens(logits, on_cpu)
        sample_tokens(view(wide_on_device), state)
        assert_same_bits(state, on_cpu)


def test_rows_further_apart_than_32_bits_can_count():
    few = mixed_rows(2, 999, seeded(3)).bfloat16()
    memory = torch.empty(2**31 + 1000, dtype=few.dtype, device=DEVICE)
    logits = memory.as_strided((2, 999), (2**31 + 1, 1)).copy_(few)
    on_cpu = mixed_state(2, 999, 1, seeded(4))
    state = copy_of(on_cpu)
    sample_tokens(few, on_cpu)
    sample_tokens(logits, state)
    assert_same_bits(state, on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [4099, 32_000, 151_936])
def test_r4_batch_size_slot_neighbours_and_cluster_split_do_not_matter(vocab_size, dtype):
    """On 132 multiprocessors 32,000 bfloat16 logits are read by clusters of 8 blocks up to 16 rows, of 4 up to 33, of 2 up to
    66, and by single blocks beyond.
    """
    most = 512
    generator = seeded(vocab_size)
    start = copy_of(mixed_state(most, vocab_size, 2, generator))
    different = mixed_rows(40, vocab_size, generator).to(DEVICE, dtype)
    logits = different[torch.arange(most, device=DEVICE) % len(different)]
    whole = copy_of(start)
    for _ in range(2):
        sample_tokens(logits, whole)
    for size in (1, 2, 8, 16, 33, 66, 132, 133, most):
        rows = torch.randperm(most, generator=generator)[:size].to(DEVICE)
        part = rows_of(start, rows)
        for _ in range(2):
            sample_tokens(logits[rows], part)
        assert_same_states(part, rows_of(whole, rows))
    assert len(whole.token_ids_B_K.unique()) > 100


class Rollout:
    """Logits of every step, on which some rows stop early, and the states after each step by the CPU half."""

    num_rows, horizon = 24, 10

    def __init__(self, vocab_size: int, seed: int, *, changing: bool) -> None:
        generator = seeded(seed)
        steps = [2 * torch.randn(self.num_rows, vocab_size, generator=generator) for _ in range(self.horizon + 2)]
        for logits in steps:
            logits[:, :33] += 14  # where the EOS ids are
        self.steps = steps if changing else steps[:1] * len(steps)
        self.start = SamplerState.create(
            self.num_rows, self.horizon, eos_ids=[3, 17, 32], top_p=0.98, seed=seed, pad_id=0
        )
        state = copy_of(self.start, "cpu")
        self.states = []
        for logits in self.steps:
            sample_tokens(logits, state)
            self.states.append(copy_of(state, "cpu"))
        assert state.active == 0 and 0 < state.stopped_by_eos_B.sum() < self.num_rows
        assert len(state.lengths_B.unique()) > 3


def capture(logits: Tensor, state: SamplerState) -> torch.cuda.CUDAGraph:
    sample_tokens(logits, copy_of(state))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_tokens(logits, state)
    return graph


@pytest.mark.parametrize("changing", [False, True], ids=["same logits", "other logits at every step"])
@pytest.mark.parametrize("vocab_size", [50, 32_000], ids=["block", "cluster"])
def test_r3_replays_of_a_graph_are_eager_steps(vocab_size, changing):
    """The stream advances, rows stop, the running ones are counted; then a second rollout in the same memory."""
    first, second = (Rollout(vocab_size, seed, changing=changing) for seed in (5, 6))
    assert not torch.equal(first.states[0].token_ids_B_K, second.states[0].token_ids_B_K)
    logits, state = first.steps[0].to(DEVICE), copy_of(first.start)
    graph = capture(logits, state)
    assert_same_bits(state, first.start)
    for rollout in (first, second):
        fill(state, rollout.start)
        for step, expected in zip(rollout.steps, rollout.states, strict=True):
            logits.copy_(step)
            graph.replay()
            assert_same_bits(state, expected)


def test_r3_replays_in_a_row_without_a_wait():
    rollout = Rollout(32_000, 7, changing=False)
    logits, state = rollout.steps[0].to(DEVICE), copy_of(rollout.start)
    graph = capture(logits, state)
    for _ in range(4):
        graph.replay()
    assert_same_bits(state, rollout.states[3])
    sample_tokens(logits, state)  # an eager step goes on where the replays ended
    assert_same_bits(state, rollout.states[4])


@every_dtype
def test_x1_the_host_waits_for_nothing(dtype):
    logits = mixed_rows(20, 32_000, seeded(8)).to(DEVICE, dtype)
    start = copy_of(mixed_state(20, 32_000, 2, seeded(9)))
    expected, state = copy_of(start), copy_of(start)
    sample_tokens(logits, expected)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(300_000_000)  # more than a tenth of a second
        sample_tokens(logits, state)
        is_device_behind = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_device_behind
    assert_same_states(state, expected)


def test_x4_another_stream_than_the_default_one():
    """The kernel must come after what its stream still does: the right logits arrive late there."""
    right = mixed_rows(20, 4099, seeded(10))
    on_cpu = mixed_state(20, 4099, 1, seeded(11))
    state, logits, right_on_device = copy_of(on_cpu), torch.zeros(20, 4099, device=DEVICE), right.to(DEVICE)
    sample_tokens(right, on_cpu)
    sample_tokens(logits, copy_of(state))  # loading the kernel might wait for all streams
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        logits.copy_(right_on_device)
        sample_tokens(logits, state)
    stream.synchronize()
    assert_same_bits(state, on_cpu)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_x4_another_device_than_the_current_one():
    logits = mixed_rows(20, 32_000, seeded(12))
    on_cpu = mixed_state(20, 32_000, 1, seeded(13))
    state = copy_of(on_cpu, "cuda:1")
    sample_tokens(logits, on_cpu)
    sample_tokens(logits.to("cuda:1"), state)
    assert torch.cuda.current_device() == 0
    assert_same_bits(state, on_cpu)


@pytest.mark.parametrize("parameters", [{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}, {"sampling_temperature": 0.0}])
def test_r9_broken_rows_by_hand(parameters):
    rows, expected = [row for row, _ in BROKEN.values()], [token for _, token in BROKEN.values()]
    state = SamplerState.create(len(rows) + 1, 2, eos_ids=(), device=DEVICE, **parameters)
    sample_tokens(torch.tensor([*rows, [-INF, -INF, 1.0, -INF]], device=DEVICE), state)
    assert state.token_ids_B_K[:, 0].tolist() == [*expected, 2]
    assert state.invalid_B.tolist() == [True] * len(rows) + [False]
    assert state.logprobs_B_K[:-1, 0].isnan().all() and state.sampling_logprobs_B_K[:-1, 0].isnan().all()
    assert state.logprobs_B_K[-1, 0] == 0 and state.sampling_logprobs_B_K[-1, 0] == 0
    sample_tokens(torch.zeros(len(rows) + 1, 4, device=DEVICE), state)
    assert state.invalid_B.tolist() == [True] * len(rows) + [False]  # the flag stays
    assert state.logprobs_B_K[:, 1].isfinite().all()


@every_dtype
def test_r9_broken_rows_spread_over_a_cluster(dtype):
    """One NaN or infinity anywhere in a row that 8 blocks read; the last row is healthy."""
    vocab_size, likeliest = 151_936, 50_000
    places = (0, 1, 75_968, vocab_size - 1)
    logits = torch.zeros(2 * len(places) + 4, vocab_size, dtype=dtype, device=DEVICE)
    logits[:, likeliest] = 5.0
    for row, place in enumerate(places):
        logits[row, place], logits[len(places) + row, place] = NAN, INF
    logits[-4], logits[-3], logits[-2], logits[-1] = NAN, -INF, NAN, -INF
    logits[-2, -1], logits[-1, -2] = -7.0, -7.0
    state = SamplerState.create(len(logits), 1, eos_ids=(), top_k=50, top_p=0.9, device=DEVICE)
    sample_tokens(logits, state)
    assert state.token_ids_B_K[:, 0].tolist() == [likeliest] * 4 + [*places, 0, 0, vocab_size - 1, vocab_size - 2]
    assert state.invalid_B.tolist() == [True] * (len(logits) - 1) + [False]
    assert state.logprobs_B_K[:, 0].isnan().tolist() == state.invalid_B.tolist()
    assert state.logprobs_B_K[-1, 0] == 0


def test_empty_batch_and_vocabulary_of_one():
    empty = SamplerState.create(0, 3, eos_ids=(), device=DEVICE)
    sample_tokens(torch.zeros(0, 50, device=DEVICE), empty)
    assert empty.active.item() == 0
    single = SamplerState.create(3, 1, eos_ids=(), top_k=4, top_p=0.5, device=DEVICE)
    sample_tokens(torch.full((3, 1), -3.0, device=DEVICE), single)
    assert single.token_ids_B_K.tolist() == [[0]] * 3
    assert single.logprobs_B_K.tolist() == [[0.0]] * 3


def test_operator_passes_opcheck():
    state = SamplerState.create(3, 2, eos_ids=[1], device=DEVICE)
    tensors = [getattr(state, name) for name in native._STATE_TENSORS]
    operator = torch.ops.esr_kernels.sample_tokens.default
    torch.library.opcheck(operator, (torch.randn(3, 50, device=DEVICE), *tensors, 0))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_into_one_graph(backend):
    start = copy_of(mixed_state(20, 1000, 3, seeded(14)))
    expected, state = copy_of(start), copy_of(start)
    torch.compiler.reset()
    step = torch.compile(lambda logits: sample_tokens(2 * logits, state), fullgraph=True, backend=backend)
    for seed in (15, 16, 17):
        logits = mixed_rows(20, 1000, seeded(seed)).to(DEVICE)
        step(logits)
        sample_tokens(2 * logits, expected)
    assert_same_states(state, expected)


def test_logits_and_state_on_two_devices_are_refused():
    on_device, on_cpu = torch.zeros(3, 50, device=DEVICE), torch.zeros(3, 50)
    state = SamplerState.create(3, 2, eos_ids=[1])
    with pytest.raises(ValueError, match=r"all tensors must be on one device, got logits_B_V: cuda:0, state: cpu"):
        sample_tokens(on_device, state)
    with pytest.raises(ValueError, match=r"all tensors must be on one device, got logits_B_V: cpu, state: cuda:0"):
        sample_tokens(on_cpu, copy_of(state))
    mixed = copy_of(state)
    mixed.top_p_B = state.top_p_B
    with pytest.raises(RuntimeError, match="top_p_B must be contiguous, on the device of logits_B_V"):
        sample_tokens(on_device, mixed)
    assert mixed.lengths_B.tolist() == state.lengths_B.tolist() == [0, 0, 0]


@every_dtype
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(10, 1003), (10, 151_936), (2, 1_000_003)])
def test_sanitizer_selection(num_rows, vocab_size, dtype):
    """What .ci/gpu runs under compute-sanitizer: few rows, no kernel but the sampler's; the last row ends an allocation."""
    on_cpu = mixed_state(num_rows, vocab_size, 1, seeded(18))
    state = copy_of(on_cpu)
    logits = mixed_rows(num_rows, vocab_size, seeded(19)).to(dtype)
    sample_tokens(logits, on_cpu)
    sample_tokens(logits.to(DEVICE), state)
    assert_same_bits(state, on_cpu)
