"""Do the fused ops hold on a CUDA device: real vocabularies, 2^32 logits, graphs, streams, memory, no recompilation?

python -m pytest -m gpu tests/kernels/test_fused_on_gpu.py

Not run on a GPU yet. Most of the time goes into compiling about 30 kernels, so the tests share their specialisations.
Inputs are made on the device.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from graph_replay import assert_all_equal, assert_graph_replays

from esr_kernels import (
    Impl,
    LogitStorage,
    OutputHead,
    ReverseKL,
    linear_divergence,
    token_divergence,
)
from esr_kernels.testing.cases import MODEL_SHAPES, ONE_OF_EACH_CLASS, VOCAB_SIZES, Shape
from esr_kernels.testing.error_budget import check_linear_divergence, check_token_divergence, relative_error_in_norm
from esr_kernels.testing.inputs import LinearInputs, LogitPair, make_linear_inputs, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import evaluate_linear_divergence, evaluate_token_divergence, linear_divergence_oracle

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BFLOAT16 = torch.bfloat16
SMALL = Shape(rows=256, vocab_size=2501, student_size=64, teacher_size=96)


def logit_pair(rows: int, vocab_size: int, **options) -> LogitPair:
    return make_logit_pair(rows, vocab_size, device=DEVICE, **options)


def linear_inputs(shape: Shape, **options) -> LinearInputs:
    return make_linear_inputs(shape, device=DEVICE, **options)


def upstream_of(inputs: LogitPair | LinearInputs, seed: int = 0) -> torch.Tensor:
    return make_upstream(len(inputs[0]), seed=seed, device=DEVICE)


def call_options(rows: int) -> dict:
    """Token ids and a stop event in every call: both are specialisations of the kernel."""
    return {"token_ids_N": torch.arange(rows, device=DEVICE), "stop_ids": (3, 500, 2000), "loss_temperature": 0.8}


@pytest.mark.parametrize("vocabulary", [*VOCAB_SIZES, "odd"])
def test_s1_published_vocabularies(vocabulary):
    pair = logit_pair(16, VOCAB_SIZES.get(vocabulary, 100003), seed=1, dtype=BFLOAT16)
    check_token_divergence(pair, ReverseKL(), upstream_of(pair), **call_options(16))


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_s1_every_class_at_the_vocabulary_of_qwen3(name):
    pair = logit_pair(16, VOCAB_SIZES["qwen3"], seed=2, dtype=BFLOAT16)
    check_token_divergence(pair, ONE_OF_EACH_CLASS[name], upstream_of(pair), **call_options(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_s1_other_dtypes_at_the_vocabulary_of_qwen3(dtype):
    pair = logit_pair(16, VOCAB_SIZES["qwen3"], gap=0.05, seed=3, dtype=dtype)
    check_token_divergence(pair, ReverseKL(), upstream_of(pair), **call_options(16))


@pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
@pytest.mark.parametrize("shape", ["qwen3-0.6b<-1.7b", "gpt2<-gpt2-xl"])
def test_s1_model_shapes_with_few_rows(shape, storage):
    """Full heads, 40 rows; both storages, KL near convergence, gradients of hidden states and head."""
    full = MODEL_SHAPES[shape]
    inputs = linear_inputs(
        Shape(40, full.vocab_size, full.student_size, full.teacher_size), gap=0.05, seed=4, dtype=BFLOAT16
    )
    check_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), logits=storage, **call_options(40))


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained head", "frozen head"])
def test_n1_near_equal_models_at_full_size(frozen_head):
    """1,200 rows of a real head in several chunks under a small workspace: dX and dW within 2e-3 of float64."""
    shape = Shape(rows=1200, vocab_size=50257, student_size=768, teacher_size=1600)
    inputs = linear_inputs(shape, gap=0.05, seed=5, dtype=BFLOAT16)
    trained = ("student_hidden",) if frozen_head else ("student_hidden", "student_weight")
    options = {"trained": trained, **call_options(shape.rows)}
    oracle = linear_divergence_oracle(inputs, ReverseKL(), upstream_of(inputs), **options).values
    for storage in (LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16):
        for workspace in (None, 2**27):
            actual = evaluate_linear_divergence(
                inputs,
                ReverseKL(),
                upstream_of(inputs),
                impl=Impl.FUSED,
                logits=storage,
                workspace_bytes=workspace,
                **options,
            )
            for name in trained:
                assert relative_error_in_norm(actual[f"grad_{name}"], oracle[f"grad_{name}"]) <= 2e-3


@pytest.mark.parametrize("rows", [14200, 28300])  # 2.16e9 > 2^31 and 4.30e9 > 2^32 logits
def test_s2_more_logits_than_32_bits_can_count(rows):
    """The last rows, beyond the limit, give what they give alone; nothing else is touched."""
    vocab_size = VOCAB_SIZES["qwen3"]
    assert rows * vocab_size > (2**32 if rows > 20000 else 2**31)
    few = logit_pair(8, vocab_size, seed=6, dtype=BFLOAT16)
    student = torch.zeros(rows, vocab_size, dtype=BFLOAT16, device=DEVICE)
    teacher = torch.zeros(rows, vocab_size, dtype=BFLOAT16, device=DEVICE)
    student[-8:], teacher[-8:] = few
    student[:8], teacher[:8] = few
    upstream = torch.zeros(rows, device=DEVICE)
    upstream[-8:] = upstream[:8] = upstream_of(few)
    pair = LogitPair(student, teacher)
    whole = evaluate_token_divergence(pair, ReverseKL(), upstream, impl=Impl.FUSED, **call_options(rows))
    alone = evaluate_token_divergence(few, ReverseKL(), upstream_of(few), impl=Impl.FUSED, **call_options(8))
    for name in ("divergence", "student_entropy", "grad_student_logits"):
        assert torch.equal(whole[name][-8:], alone[name]) and torch.equal(whole[name][:8], alone[name]), name
    assert (whole["divergence"][8:-8] == 0).all()
    assert whole["grad_student_logits"][8:-8].count_nonzero() == 0


def test_s2_row_strides_beyond_32_bits():
    """Rows 200 vocabularies apart: the offset of the last one does not fit in 32 bits."""
    vocab_size = VOCAB_SIZES["qwen3"]
    few = logit_pair(80, vocab_size, seed=7, dtype=BFLOAT16)
    wide = torch.full((80, 200 * vocab_size), torch.nan, dtype=BFLOAT16, device=DEVICE)
    wide[:, :vocab_size] = few.student_N_V
    assert wide.stride(0) * 79 > 2**31
    far_apart, options = LogitPair(wide[:, :vocab_size], few.teacher_N_V), {"impl": Impl.FUSED, **call_options(80)}
    strided = evaluate_token_divergence(far_apart, ReverseKL(), upstream_of(few), **options)
    plain = evaluate_token_divergence(few, ReverseKL(), upstream_of(few), **options)
    for name in ("divergence", "teacher_entropy", "grad_student_logits"):
        assert torch.equal(strided[name], plain[name]), name


# Workspaces in bytes that select the schedules for SMALL: d(logits) of 256 rows kept, or 85 rows recomputed at a time.
WORKSPACES = {"keep": None, "recompute": 85 * 2 * 4 * 2560}


class Step:
    """One op with its inputs in fixed memory: what is captured, replayed and run on streams."""

    def __init__(self, op: str, seed: int, workspace: int | None = None) -> None:
        self.op, self.workspace = op, workspace
        if op == "token":
            pair = logit_pair(SMALL.rows, SMALL.vocab_size, seed=seed, dtype=BFLOAT16)
            self.tensors = [*pair]
            self.leaves = [pair.student_N_V.requires_grad_()]
        else:
            inputs = linear_inputs(SMALL, seed=seed, dtype=BFLOAT16)
            weight, teacher_weight = inputs.student_head.weight, inputs.teacher_head.weight
            self.tensors = [inputs.student_hidden_N_D, weight, inputs.teacher_hidden_N_E, teacher_weight]
            self.leaves = [t.requires_grad_() for t in self.tensors[:2]]
        self.options = call_options(SMALL.rows)
        self.upstream = make_upstream(SMALL.rows, seed=seed, device=DEVICE)

    def __call__(self) -> list[torch.Tensor]:
        if self.op == "token":
            output = token_divergence(*self.tensors, ReverseKL(), **self.options)
        else:
            output = linear_divergence(*self.tensors, ReverseKL(), workspace_bytes=self.workspace, **self.options)
        gradients = torch.autograd.grad(output.divergence_N, self.leaves, self.upstream)
        return [*(field.detach() for field in output), *gradients]

    def copy_from(self, other: "Step") -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine.copy_(theirs)
            self.upstream.copy_(other.upstream)


STEPS = [("token", "keep"), ("linear", "keep"), ("linear", "recompute")]
every_step = pytest.mark.parametrize(("op", "workspace"), STEPS)


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    """Only around what the test runs inside it: set by the test, taken back here whatever happens."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@every_step
def test_x1_no_host_synchronisation(synchronisation_is_an_error, op, workspace):
    step = Step(op, seed=8, workspace=WORKSPACES[workspace])
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    actual = step()
    torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(actual, expected)


def test_x1_synchronisation_would_be_seen(synchronisation_is_an_error):
    value = torch.ones(1, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        value.item()


@every_step
def test_x1_forward_and_backward_in_a_cuda_graph_replayed_with_changed_inputs(op, workspace):
    step, other = (Step(op, seed=seed, workspace=WORKSPACES[workspace]) for seed in (9, 10))
    assert_graph_replays(step, other)


@every_step
def test_x4_two_streams_at_once(op, workspace):
    """Each stream has its own inputs; 20 rounds interleaved, no wait between them."""
    steps = [Step(op, seed=seed, workspace=WORKSPACES[workspace]) for seed in (11, 12)]
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_x4_tensors_on_a_device_that_is_not_current():
    pair = logit_pair(8, 2501, seed=13)
    inputs = linear_inputs(SMALL, seed=13)
    expected = evaluate_token_divergence(pair, ReverseKL(), upstream_of(pair), impl=Impl.FUSED)
    second = LogitPair(*(logits.to("cuda:1") for logits in pair))
    actual = evaluate_token_divergence(second, ReverseKL(), upstream_of(pair).to("cuda:1"), impl=Impl.FUSED)
    for name, value in actual.items():
        assert value.device.index == 1
        torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=0, atol=0, equal_nan=True)
    arguments = (inputs.student_hidden_N_D, inputs.student_head, inputs.teacher_hidden_N_E, inputs.teacher_head)
    moved = [OutputHead(a.weight.to("cuda:1")) if isinstance(a, OutputHead) else a.to("cuda:1") for a in arguments]
    there, here = linear_divergence(*moved).divergence_N, linear_divergence(*arguments).divergence_N
    torch.testing.assert_close(there.cpu(), here.cpu(), rtol=1e-5, atol=1e-6)


def compiled_kernels() -> int:
    """How many specialisations of this library's kernels Triton holds in memory."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("esr_kernels")]
    kernels = {id(v): v for module in modules for v in vars(module).values() if isinstance(v, JITFunction)}
    return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())


def test_x6_no_recompilation_when_sizes_or_temperatures_change():
    """20 values of N with 1 and multiples of 16 among them, 20 temperatures, chunks of other heights, other stop ids."""
    pair = logit_pair(64, 2501, seed=14, dtype=BFLOAT16)
    inputs = linear_inputs(SMALL, seed=14, dtype=BFLOAT16)

    def run(rows: int, temperature: float, stop_ids: tuple[int, int, int]) -> None:
        few = LogitPair(pair.student_N_V[:rows], pair.teacher_N_V[:rows])
        options = {"impl": Impl.FUSED, "loss_temperature": temperature, "stop_ids": stop_ids}
        options["token_ids_N"] = torch.arange(rows, device=DEVICE)
        evaluate_token_divergence(few, ReverseKL(), upstream_of(few), **options)
        some = inputs._replace(
            student_hidden_N_D=inputs.student_hidden_N_D[:rows], teacher_hidden_N_E=inputs.teacher_hidden_N_E[:rows]
        )
        for workspace in (None, rows * 10240 + 40960):
            evaluate_linear_divergence(
                some, ReverseKL(), upstream_of(some), workspace_bytes=workspace, logits=LogitStorage.FLOAT32, **options
            )

    run(7, 1.0, (3, 500, 2000))
    before = compiled_kernels()
    assert before > 0
    for index, rows in enumerate([1, 2, 3, 5, 8, 11, 15, 16, 17, 23, 24, 31, 32, 33, 40, 47, 48, 55, 63, 64]):
        run(rows, [0.5, 0.7, 1.0, 2.0][index % 4] + 0.01 * index, (index, 1000 + index, 2000))
    assert compiled_kernels() == before


def peak_bytes_beyond_inputs(function) -> tuple[int, object]:
    """Most memory that `function` held at one time beyond what was allocated before, and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


ROUNDING = 2**21  # the allocator's blocks, cuBLAS's own workspace apart


def test_x8_token_divergence_holds_one_gradient():
    rows, vocab_size = 512, VOCAB_SIZES["llama3"]
    pair = logit_pair(rows, vocab_size, seed=15, dtype=BFLOAT16)
    student, upstream, options = pair.student_N_V.requires_grad_(), upstream_of(pair), call_options(rows)
    peak, output = peak_bytes_beyond_inputs(lambda: token_divergence(student, pair.teacher_N_V, **options))
    assert peak <= 64 * rows + ROUNDING
    peak, _ = peak_bytes_beyond_inputs(lambda: torch.autograd.grad(output.divergence_N, student, upstream))
    assert peak <= 2 * rows * vocab_size + 64 * rows + ROUNDING


@pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
@pytest.mark.parametrize("workspace", [2**30, 2**27])
@pytest.mark.parametrize("trained", ["all", "hidden"])
def test_x8_linear_divergence_stays_within_its_workspace(trained, workspace, storage):
    """Forward: the workspace. Backward beyond it: the gradients, a float32 sum of dW when chunked, slices of the head."""
    shape = Shape(rows=1024, vocab_size=50257, student_size=768, teacher_size=1600)
    inputs = linear_inputs(shape, seed=16, dtype=BFLOAT16)
    options = {"logits": storage, **call_options(shape.rows)}
    linear_divergence(*inputs, **options)  # cuBLAS takes its own workspace at the first product
    hidden, weight = inputs.student_hidden_N_D.requires_grad_(), inputs.student_head.weight
    leaves = [hidden, weight.requires_grad_()] if trained == "all" else [hidden]
    upstream = upstream_of(inputs)

    rows_bytes = 4 * shape.rows * shape.student_size
    slice_bytes = 4 * 16384 * shape.student_size
    peak, output = peak_bytes_beyond_inputs(lambda: linear_divergence(*inputs, workspace_bytes=workspace, **options))
    assert peak <= workspace + 2 * rows_bytes + slice_bytes + ROUNDING
    peak, _ = peak_bytes_beyond_inputs(lambda: torch.autograd.grad(output.divergence_N, leaves, upstream))
    head_bytes = weight.numel() * (2 + 4) if trained == "all" else 0
    recomputed = workspace if trained == "all" and workspace < 2**30 else 0
    assert peak <= recomputed + head_bytes + 5 * rows_bytes + 4 * slice_bytes + ROUNDING
    if trained == "hidden":
        assert peak < weight.numel() * 2  # no weight gradient
