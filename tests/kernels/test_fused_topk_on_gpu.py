"""Does the top-k divergence hold on a CUDA device: real vocabularies and K, near convergence, graphs, memory, no recompilation?

python -m pytest -m gpu tests/kernels/test_fused_topk_on_gpu.py

Not run on a GPU yet. Inputs are made on the device.
"""

import pytest
import torch
from graph_replay import assert_all_equal, assert_graph_replays
from test_fused_on_gpu import (
    ROUNDING,
    compiled_kernels,
    peak_bytes_beyond_inputs,
    synchronisation_is_an_error,  # noqa: F401 (a fixture)
)

from esr_kernels import (
    ForwardKL,
    GeneralizedJSD,
    Impl,
    LogitStorage,
    ReverseKL,
    gather_logprobs,
    select_topk_ids,
    topk_divergence,
)
from esr_kernels.testing.cases import ONE_OF_EACH_CLASS, VOCAB_SIZES, Shape
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.inputs import make_linear_inputs, make_upstream
from esr_kernels.testing.logprob_inputs import TopkInputs, make_topk_inputs
from esr_kernels.testing.logprob_oracle import evaluate_topk_divergence, topk_divergence_oracle
from esr_kernels.testing.oracle import Results

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BFLOAT16 = torch.bfloat16
SMALL = Shape(rows=256, vocab_size=2501, student_size=64, teacher_size=96)
EVENTS = {
    "tail": {},
    "renormalized": {"tail_bucket": False},
    "truncated": {"tail_bucket": False, "renormalize": False},
}
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])


def topk_inputs(shape: Shape, num_ids: int, **options) -> TopkInputs:
    return make_topk_inputs(shape, num_ids, dtype=BFLOAT16, device=DEVICE, **options)


def upstream_of(inputs: TopkInputs, seed: int = 0) -> torch.Tensor:
    return make_upstream(len(inputs.student_hidden_N_D), seed=seed, device=DEVICE)


def check(inputs: TopkInputs, divergence, **options) -> Results:
    return check_against(
        topk_divergence_oracle, evaluate_topk_divergence, inputs, divergence, upstream_of(inputs), **options
    )


@pytest.mark.parametrize("num_ids", [1, 20, 64, 256, 1024])
@pytest.mark.parametrize("vocabulary", ["qwen3", "gpt2"])
def test_s1_published_vocabularies_and_every_number_of_ids(vocabulary, num_ids):
    """Two kinds of events and storages, an empty slot, a repeated id and the last id of the vocabulary."""
    vocab_size = VOCAB_SIZES[vocabulary]
    inputs = topk_inputs(Shape(40, vocab_size, 128, 192), num_ids, seed=1)
    if num_ids > 1:
        inputs.teacher_ids_N_K[3, 0] = -1
        inputs.teacher_ids_N_K[5, 0] = inputs.teacher_ids_N_K[5, -1]
        inputs.teacher_ids_N_K[7, 0] = vocab_size - 1
    check(inputs, ReverseKL(), logits=LogitStorage.TILE_RELATIVE_FP16)
    check(inputs, ForwardKL(), logits=LogitStorage.FLOAT32, **EVENTS["truncated"])


@every_storage
@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_every_class_with_every_part_of_a_head(name, events, storage):
    if events == "truncated" and name not in ("forward_kl", "reverse_kl", "jsd_0.5"):
        pytest.skip("a sum over a part of the events is not defined")
    inputs = topk_inputs(SMALL, 20, temperature=0.8, seed=2, has_bias=True, logit_scale=0.9, softcap=9.0)
    check(inputs, ONE_OF_EACH_CLASS[name], logits=storage, loss_temperature=0.8, **EVENTS[events])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_of_models_and_log_probs(dtype):
    inputs = make_topk_inputs(Shape(16, VOCAB_SIZES["qwen3"], 64, 96), 20, seed=3, dtype=dtype, device=DEVICE)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 bounds need float32 products
    try:
        check(inputs._replace(teacher_logprobs_N_K=inputs.teacher_logprobs_N_K.to(dtype)), ReverseKL())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@every_storage
@pytest.mark.parametrize("workspace", [None, 2**27])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trained head", "frozen head"])
def test_n1_near_equal_models_at_full_size(frozen_head, workspace, storage):
    """1,200 rows of a real head, in several chunks under a small workspace: dX and dW within 2e-3 of float64."""
    inputs = topk_inputs(Shape(1200, VOCAB_SIZES["gpt2"], 768, 1600), 64, gap=0.05, seed=4)
    trained = ("hidden",) if frozen_head else ("hidden", "weight")
    options = {"trained": trained, "logits": storage, "workspace_bytes": workspace}
    for divergence in (ReverseKL(), GeneralizedJSD(0.5)):
        oracle = topk_divergence_oracle(inputs, divergence, upstream_of(inputs), trained=trained).values
        actual = evaluate_topk_divergence(inputs, divergence, upstream_of(inputs), impl=Impl.FUSED, **options)
        for name in trained:
            assert relative_error_in_norm(actual[f"grad_{name}"], oracle[f"grad_{name}"]) <= 2e-3


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=repr)
def test_n1_near_equal_models_of_the_vocabulary_of_qwen3(divergence):
    inputs = topk_inputs(Shape(300, VOCAB_SIZES["qwen3"], 1024, 2048), 20, gap=0.05, seed=5)
    options = {"trained": ("hidden", "weight")}
    actual = check(inputs, divergence, logits=LogitStorage.TILE_RELATIVE_FP16, **options)
    oracle = topk_divergence_oracle(inputs, divergence, upstream_of(inputs), **options).values
    for name in ("grad_hidden", "grad_weight"):
        assert relative_error_in_norm(actual[name], oracle[name]) <= 2e-3


def test_s2_more_kept_gradients_than_32_bits_can_count():
    """2.16e9 entries of d(logits): the first and last rows give what they give alone, and the head nothing else."""
    rows, shape = 14200, Shape(8, VOCAB_SIZES["qwen3"], 64, 96)
    assert rows * shape.vocab_size > 2**31
    few = topk_inputs(shape, 20, seed=6)
    hidden = few.student_hidden_N_D.new_zeros(rows, shape.student_size)
    ids, logprobs = few.teacher_ids_N_K.new_full((rows, 20), -1), few.teacher_logprobs_N_K.new_zeros(rows, 20)
    for tensor, part in zip((hidden, ids, logprobs), (few[0], *few[2:]), strict=True):
        tensor[:8], tensor[-8:] = part, part
    upstream = torch.zeros(rows, device=DEVICE)
    upstream[:8] = upstream[-8:] = upstream_of(few)
    options = {"impl": Impl.FUSED, "logits": LogitStorage.FLOAT32, "workspace_bytes": 8 * 2**30}
    many = TopkInputs(hidden, few.student_head, ids, logprobs)
    whole = evaluate_topk_divergence(many, ReverseKL(), upstream, **options)
    alone = evaluate_topk_divergence(few, ReverseKL(), upstream_of(few), **options)
    for name in ("divergence", "student_entropy", "top1_agreement", "grad_hidden"):
        for end in (whole[name][:8], whole[name][-8:]):  # a product of another height may round another way
            torch.testing.assert_close(end, alone[name], rtol=1e-2 if name == "grad_hidden" else 1e-4, atol=1e-6)
        assert whole[name][8:-8].count_nonzero() == 0
    assert relative_error_in_norm(whole["grad_weight"], 2 * alone["grad_weight"]) < 2e-3


# Workspaces in bytes that select the schedules for SMALL: d(logits) of 256 rows kept, or 85 rows recomputed at a time.
WORKSPACES = {"keep": None, "recompute": 85 * 4 * 2560}


class Step:
    """One call, forward and backward, with its inputs in fixed memory: what is captured, replayed and run on streams."""

    def __init__(self, events: str, seed: int, workspace: int | None = None) -> None:
        self.options = {"workspace_bytes": workspace, "loss_temperature": 0.8, **EVENTS[events]}
        hidden, head, ids, logprobs = topk_inputs(SMALL, 20, seed=seed)
        self.tensors = [hidden, head.weight, ids, logprobs]
        self.leaves = [t.requires_grad_() for t in self.tensors[:2]]
        self.upstream = make_upstream(SMALL.rows, seed=seed, device=DEVICE)

    def __call__(self) -> list[torch.Tensor]:
        output = topk_divergence(*self.tensors, ReverseKL(), **self.options)
        gradients = torch.autograd.grad(output.divergence_N, self.leaves, self.upstream)
        names = ("divergence_N", "student_entropy_N", "teacher_entropy_N", "top1_agreement_N")
        return [*(getattr(output, name).detach() for name in names), *gradients]

    def copy_from(self, other: "Step") -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.tensors, other.tensors, strict=True):
                mine.copy_(theirs)
            self.upstream.copy_(other.upstream)


every_step = pytest.mark.parametrize(
    ("events", "workspace"),
    [("tail", "keep"), ("tail", "recompute"), ("renormalized", "keep"), ("truncated", "keep")],
)


@every_step
def test_x1_no_host_synchronisation(synchronisation_is_an_error, events, workspace):  # noqa: F811
    step = Step(events, seed=7, workspace=WORKSPACES[workspace])
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    actual = step()
    torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(actual, expected)


@every_step
def test_x1_forward_and_backward_in_a_cuda_graph_replayed_with_changed_inputs(events, workspace):
    """Other hidden states, weight, ids and log-probs in the same memory."""
    step, other = (Step(events, seed=seed, workspace=WORKSPACES[workspace]) for seed in (8, 9))
    assert_graph_replays(step, other)


def recipe(inputs, num_ids: int) -> list[torch.Tensor]:
    """Two models at hand: the ids of both, the teacher's log-probs at them, Jensen-Shannon; `inputs` are `LinearInputs`."""
    student, teacher = inputs[:2], inputs[2:]
    ids = select_topk_ids(*student, num_ids, united_with_N_K=select_topk_ids(*teacher, num_ids))
    logprobs = gather_logprobs(*teacher, ids)
    return [ids, logprobs, topk_divergence(*student, ids, logprobs, GeneralizedJSD(0.5)).divergence_N]


def test_x1_the_recipe_for_two_models_never_waits(synchronisation_is_an_error):  # noqa: F811
    inputs = make_linear_inputs(SMALL, seed=10, dtype=BFLOAT16, device=DEVICE)
    expected = recipe(inputs, 20)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    actual = recipe(inputs, 20)
    torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(actual, expected)


@every_step
def test_x4_two_streams_at_once(events, workspace):
    """Each stream has its own inputs; 20 rounds interleaved, no wait between them. Repetition is bit by bit (X5)."""
    steps = [Step(events, seed=seed, workspace=WORKSPACES[workspace]) for seed in (11, 12)]
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


def test_x6_no_recompilation_when_rows_chunks_or_temperatures_change():
    """20 values of N with 1 and multiples of 16 among them, 20 temperatures, chunks of other heights."""
    hidden, head, ids, logprobs = topk_inputs(SMALL, 20, seed=13)

    def run(rows: int, temperature: float) -> None:
        some = TopkInputs(hidden[:rows], head, ids[:rows], logprobs[:rows])
        for workspace in (None, rows * 5120 + 20480):
            options = {"impl": Impl.FUSED, "logits": LogitStorage.FLOAT32, "workspace_bytes": workspace}
            evaluate_topk_divergence(some, ReverseKL(), upstream_of(some), loss_temperature=temperature, **options)

    run(7, 1.0)
    before = compiled_kernels()
    assert before > 0
    for index, rows in enumerate([1, 2, 3, 5, 8, 11, 15, 16, 17, 23, 24, 31, 32, 33, 40, 47, 48, 55, 63, 64]):
        run(rows, [0.5, 0.7, 1.0, 2.0][index % 4] + 0.01 * index)
    assert compiled_kernels() == before


@every_storage
@pytest.mark.parametrize("workspace", [2**30, 2**27])
@pytest.mark.parametrize("trained", ["nothing", "hidden", "all"])
def test_x8_memory_stays_within_the_workspace(trained, workspace, storage):
    """Forward: the workspace, and 4 bytes an id. Backward beyond it: the gradients, a float32 sum of dW when chunked, slices of
    the head. Nothing of the teacher has size (N, V).
    """
    shape, num_ids = Shape(rows=1024, vocab_size=50257, student_size=768, teacher_size=1600), 64
    inputs = topk_inputs(shape, num_ids, seed=14)
    options = {"logits": storage, "workspace_bytes": workspace}
    hidden, weight = inputs.student_hidden_N_D, inputs.student_head.weight
    leaves = {"nothing": [], "hidden": [hidden], "all": [hidden, weight]}[trained]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = upstream_of(inputs)
    first = topk_divergence(*inputs, **options).divergence_N  # cuBLAS takes its own workspace at the first product
    if leaves:
        torch.autograd.grad(first, leaves, upstream)
    del first

    rows_bytes = 4 * shape.rows * shape.student_size
    slice_bytes = 4 * 16384 * shape.student_size
    id_bytes = 4 * shape.rows * num_ids
    peak, output = peak_bytes_beyond_inputs(lambda: topk_divergence(*inputs, **options))
    assert peak <= workspace + (2 * rows_bytes + slice_bytes if leaves else 0) + id_bytes + ROUNDING
    if not leaves:
        return
    peak, _ = peak_bytes_beyond_inputs(lambda: torch.autograd.grad(output.divergence_N, leaves, upstream))
    head_bytes = weight.numel() * (2 + 4) if trained == "all" else 0
    recomputed = workspace if trained == "all" and workspace < 2**30 else 0
    assert peak <= recomputed + head_bytes + 5 * rows_bytes + 4 * slice_bytes + id_bytes + ROUNDING
    if trained == "hidden":
        assert peak < weight.numel() * 2  # no weight gradient


def test_x8_selected_ids_take_one_chunk_of_logits():
    """4 V bytes a row, and what `torch.topk` takes for itself: not those of all rows (206 MB)."""
    inputs = topk_inputs(Shape(1024, 50257, 768, 1600), 1, seed=15)
    student, workspace = inputs[:2], 64 * 4 * 50257
    select_topk_ids(*student, 64, workspace_bytes=workspace)
    peak, ids = peak_bytes_beyond_inputs(lambda: select_topk_ids(*student, 64, workspace_bytes=workspace))
    assert peak <= 6 * workspace + 8 * 1024 * 64 + ROUNDING
    exact = student[0].double() @ student[1].weight.double().T
    held = exact.gather(-1, ids).amin(-1)
    # The 64th of float64, but for products that float32 cannot tell apart
    assert (held >= exact.topk(64).values[:, -1] - 1e-4).all()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
