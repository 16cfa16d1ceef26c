"""Do schedules, chunks, compilation, autocast and repetition of the fused top-k divergence give one result and exact gradients?

python -m pytest tests/kernels/test_fused_topk_execution.py
"""

import math
from dataclasses import replace

import pytest
import torch
from test_fused_execution import BACKEND, RecordedCalls, assert_same
from test_fused_gradients import UPSTREAMS, largest_allocation
from test_fused_topk_divergence import EVENTS, every_storage, topk_inputs

from esr_kernels import (
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Impl,
    LogitStorage,
    OutputHead,
    ReverseKL,
    gather_logprobs,
    select_topk_ids,
    topk_divergence,
)
from esr_kernels.output_projection import plan
from esr_kernels.output_projection.plan import Schedule, logit_bytes_per_row, padded_vocab_size, plan_linear_op
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.error_budget import check_against, check_error, relative_error_in_norm
from esr_kernels.testing.inputs import make_linear_inputs, make_upstream
from esr_kernels.testing.logprob_inputs import TopkInputs
from esr_kernels.testing.logprob_oracle import evaluate_topk_divergence, topk_divergence_oracle
from esr_kernels.testing.oracle import FLOAT32_BOUND, Results, converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ROWS = 5
SHAPE = Shape(rows=ROWS, vocab_size=300, student_size=24, teacher_size=40)
ALL = ("hidden", "weight", "bias")
every_dtype = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs_of(seed: int, **options) -> TopkInputs:
    return topk_inputs(SHAPE, 7, seed=seed, **options)


def upstream_of(inputs: TopkInputs) -> torch.Tensor:
    return make_upstream(len(inputs.student_hidden_N_D), seed=3, device=DEVICE)


def workspace_for(rows: int, chunk_rows: int, schedule: Schedule, storage: LogitStorage, dtype: torch.dtype) -> int:
    """The budget that makes the op take `chunk_rows` of `rows` at a time under `schedule`; one side is projected."""
    itemsize = 2 if dtype.itemsize == 2 else 4
    kept = rows * padded_vocab_size(SHAPE.vocab_size) * itemsize if schedule is Schedule.KEEP else 0
    budget = kept + chunk_rows * logit_bytes_per_row(SHAPE.vocab_size, storage, itemsize, num_sides=1)
    chosen = plan_linear_op(
        "topk_divergence",
        rows,
        SHAPE.vocab_size,
        num_sides=1,
        needs_hidden_gradient=schedule is not Schedule.VALUE,
        needs_head_gradient=schedule in (Schedule.KEEP, Schedule.RECOMPUTE),
        gradient_itemsize=itemsize,
        storage=storage,
        workspace_bytes=budget,
    )
    assert chosen == (schedule, storage, chunk_rows)
    return budget


TRAINED = {Schedule.VALUE: (), Schedule.HIDDEN: ("hidden",), Schedule.KEEP: ALL, Schedule.RECOMPUTE: ALL}


def run(inputs: TopkInputs, chunk_rows: int, schedule: Schedule, storage: LogitStorage, divergence, events) -> Results:
    hidden = inputs.student_hidden_N_D
    workspace = workspace_for(len(hidden), chunk_rows, schedule, storage, hidden.dtype)
    return evaluate_topk_divergence(
        inputs,
        divergence,
        upstream_of(inputs),
        impl=Impl.FUSED,
        trained=TRAINED[schedule],
        logits=storage,
        workspace_bytes=workspace,
        **EVENTS[events],
    )


@pytest.mark.parametrize(
    ("events", "dtype", "storage"),
    [
        ("tail", FLOAT32, LogitStorage.FLOAT32),
        ("tail", BFLOAT16, LogitStorage.TILE_RELATIVE_FP16),
        ("renormalized", BFLOAT16, LogitStorage.FLOAT32),
        ("truncated", FLOAT32, LogitStorage.TILE_RELATIVE_FP16),
    ],
    ids=str,
)
def test_n7_schedules_and_chunks_agree(monkeypatch, events, dtype, storage):
    """VALUE, HIDDEN, KEEP, RECOMPUTE in chunks of 1, 2 and all 3 rows. d(logits) are kept however few rows then fit."""
    inputs = topk_inputs(replace(SHAPE, rows=3), 7, seed=1, dtype=dtype, has_bias=True)
    options = storage, GeneralizedJSD(0.4), events
    whole = run(inputs, 3, Schedule.KEEP, *options)
    monkeypatch.setattr(plan, "POOR_CHUNK_ROWS", 1)
    chunked = [run(inputs, 2, Schedule.KEEP, *options)]
    monkeypatch.undo()
    for schedule, chunk_rows in (
        (Schedule.VALUE, 2),
        (Schedule.HIDDEN, 3 if events == "tail" else 1),
        (Schedule.RECOMPUTE, 1 if events == "tail" else 2),
    ):
        chunked.append(run(inputs, chunk_rows, schedule, *options))
        assert [n for n in chunked[-1] if n.startswith("grad_")] == [f"grad_{n}" for n in TRAINED[schedule]]
    for results in chunked:
        assert_agree(results, whole, dtype, storage)


def assert_agree(actual: Results, expected: Results, dtype: torch.dtype, storage: LogitStorage) -> None:
    """Within float32 rounding, where a matrix product of another height may round another way, times about 30 for a divergence
    of 0.03 nats; in float16 storage one such rounding may move a stored logit by a unit in its last place, and a 16-bit gradient
    by one in its own.
    """
    is_float32 = storage is LogitStorage.FLOAT32
    norm_error = 1e-3 if dtype.itemsize == 2 else 1e-5 if is_float32 else 3e-4
    tolerance = {"rtol": 2e-6, "atol": 5e-7} if is_float32 else {"rtol": 2e-4, "atol": 2e-5}
    for name, value in actual.items():
        if name.startswith("grad_"):
            assert relative_error_in_norm(value, expected[name]) < norm_error, name
        else:
            torch.testing.assert_close(value, expected[name], **tolerance)


# One for each schedule with a trained head: d(logits) kept, or a row or two of logits at a time, recomputed in backward.
WORKSPACES = {"keep": None, "recompute": 3200}
every_workspace = pytest.mark.parametrize("workspace", WORKSPACES)


@pytest.mark.parametrize(("dtype", "workspace"), [(FLOAT32, "keep"), (BFLOAT16, "recompute")], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_g1_any_upstream_gradient(upstream, dtype, workspace):
    """Also where d(logits) and the upstream gradient meet in 16 bits."""
    inputs, upstream_N = inputs_of(2, dtype=dtype), torch.tensor(UPSTREAMS[upstream], device=DEVICE)
    options = {"workspace_bytes": WORKSPACES[workspace]}
    results = check_against(
        topk_divergence_oracle, evaluate_topk_divergence, inputs, ReverseKL(), upstream_N, **options
    )
    assert (results["grad_hidden"][upstream_N == 0] == 0).all()
    assert upstream != "all zero" or (results["grad_weight"] == 0).all()


@every_workspace
@pytest.mark.parametrize("trained", [ALL, ("hidden",)], ids=["all", "hidden"])
@every_dtype
def test_g2_second_backward(dtype, trained, workspace):
    """Kept d(logits) must not be scaled in place by the first backward."""
    inputs, upstream = inputs_of(3, dtype=dtype, has_bias=True), make_upstream(ROWS, device=DEVICE)
    head = inputs.student_head
    leaves = {"hidden": inputs.student_hidden_N_D, "weight": head.weight, "bias": head.bias}
    leaves = [leaf.requires_grad_() for name, leaf in leaves.items() if name in trained]
    divergence_N = topk_divergence(*inputs, GeneralizedJSD(0.5), workspace_bytes=WORKSPACES[workspace]).divergence_N
    first = torch.autograd.grad(divergence_N, leaves, upstream, retain_graph=True)
    other = torch.autograd.grad(divergence_N, leaves, -4.0 * upstream, retain_graph=True)
    second = torch.autograd.grad(divergence_N, leaves, upstream)
    for one, scaled, again in zip(first, other, second, strict=True):
        assert torch.equal(one, again) and one.abs().sum() > 0
        assert torch.equal(scaled, -4.0 * one)  # a power of two: exact


@every_workspace
def test_g2_micro_batches_accumulate_to_one_batch(workspace):
    inputs, upstream = inputs_of(4, has_bias=True), make_upstream(ROWS, device=DEVICE)
    options = {"workspace_bytes": WORKSPACES[workspace]}
    whole = evaluate_topk_divergence(inputs, ForwardKL(), upstream, impl=Impl.FUSED, **options)
    hidden, head, ids, logprobs = inputs
    weight, bias = (t.clone().requires_grad_() for t in (head.weight, head.bias))
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        parts = hidden[rows], OutputHead(weight, bias), ids[rows], logprobs[rows]
        topk_divergence(*parts, ForwardKL(), **options).divergence_N.backward(upstream[rows])
    torch.testing.assert_close(weight.grad, whole["grad_weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad, whole["grad_bias"], rtol=1e-5, atol=1e-6)


@every_workspace
@pytest.mark.parametrize("subset", ["hidden", "weight", "bias", "hidden weight", "hidden bias", "weight bias"])
def test_g3_every_subset_of_gradients(subset, workspace):
    trained = tuple(subset.split())
    options = {"trained": trained, "workspace_bytes": WORKSPACES[workspace], "logits": LogitStorage.TILE_RELATIVE_FP16}
    inputs = topk_inputs(replace(SHAPE, rows=3), 7, seed=5, dtype=BFLOAT16, has_bias=True)
    results = check_against(
        topk_divergence_oracle, evaluate_topk_divergence, inputs, ReverseKL(), upstream_of(inputs), **options
    )
    assert [name for name in results if name.startswith("grad_")] == [f"grad_{name}" for name in trained]


def test_g3_a_frozen_head_allocates_no_weight_gradient():
    inputs = topk_inputs(Shape(2, 640, 64, 65), 7, seed=6)

    def bytes_allocated(trained):
        upstream = upstream_of(inputs)
        return largest_allocation(
            lambda: evaluate_topk_divergence(inputs, ReverseKL(), upstream, impl=Impl.FUSED, trained=trained)
        )

    assert bytes_allocated(("hidden",)) < 4 * 640 * 64 / 2
    assert bytes_allocated(("hidden", "weight")) >= 4 * 640 * 64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_g3_without_grad_mode_there_is_no_graph_and_the_same_value(mode):
    """And what was made in inference mode, as a teacher's log-probs are, may meet a student with gradient."""
    inputs = inputs_of(7)
    expected = topk_divergence(inputs.student_hidden_N_D.requires_grad_(), *inputs[1:])
    assert [field for field, value in expected._asdict().items() if value.requires_grad] == ["divergence_N"]
    with mode():
        output = topk_divergence(*inputs)
        ids, logprobs = inputs.teacher_ids_N_K.clone(), inputs.teacher_logprobs_N_K.clone()
    assert not output.divergence_N.requires_grad
    torch.testing.assert_close(output.divergence_N, expected.divergence_N.detach(), rtol=1e-6, atol=1e-7)
    for workspace in WORKSPACES.values():
        weight = inputs.student_head.weight.clone().requires_grad_()
        topk_divergence(inputs[0], weight, ids, logprobs, workspace_bytes=workspace).divergence_N.sum().backward()
        assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("storage", "workspace"), [("float32", "keep"), ("tile_relative_fp16", "recompute")])
def test_x5_two_runs_agree_bit_by_bit(storage, workspace):
    """With repeated and foreign ids, whose slots all write to one place or to none."""
    inputs = inputs_of(8, dtype=BFLOAT16, has_bias=True)
    inputs.teacher_ids_N_K[:, 3] = inputs.teacher_ids_N_K[:, 1]
    inputs.teacher_ids_N_K[2, 0] = -7
    options = {"impl": Impl.FUSED, "logits": storage, "workspace_bytes": WORKSPACES[workspace]}
    assert_same(*(evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), **options) for _ in range(2)))


@pytest.mark.parametrize(("workspace", "autocast_dtype"), [("keep", BFLOAT16), ("recompute", torch.float16)], ids=str)
def test_x4_autocast_changes_nothing(autocast_dtype, workspace):
    """An autocast region would project, and so store the logits, in 16 bits."""
    inputs, options = inputs_of(9, has_bias=True), {"impl": Impl.FUSED, "workspace_bytes": WORKSPACES[workspace]}
    expected = evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
    with torch.autocast(DEVICE, dtype=autocast_dtype):
        actual = evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
    assert_same(actual, expected)


def test_x2_compiles_to_one_graph():
    """The head, its projection and that of the backward in one graph with the layer below; two batch sizes."""

    def loss(inputs_N_D, layer, weight, bias, ids, logprobs, temperature):
        head = OutputHead(weight, bias, logit_scale=0.5, softcap=8.0)
        options = {"loss_temperature": temperature, "workspace_bytes": WORKSPACES["recompute"]}
        output = topk_divergence(inputs_N_D @ layer, head, ids, logprobs, GeneralizedJSD(0.5), **options)
        return 3.0 * output.divergence_N, output.student_entropy_N, output.top1_agreement_N

    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    layer = torch.eye(SHAPE.student_size, device=DEVICE) + 0.1
    for rows in (3, 4):
        inputs = topk_inputs(replace(SHAPE, rows=rows), 7, seed=rows, has_bias=True)
        results = []
        for function in (loss, compiled):
            leaves = [layer, inputs.student_head.weight, inputs.student_head.bias]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            value_N, *statistics = function(inputs.student_hidden_N_D, *leaves, *inputs[2:], 0.7)
            results.append((value_N, *statistics, *torch.autograd.grad(value_N, leaves, upstream_of(inputs))))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


def test_x2_every_registered_op_passes_opcheck():
    """Schema (nothing is written to or aliased), fake against real results, tracing with symbolic sizes. Whole tiles: opcheck
    takes the padding of kept d(logits) for a difference.
    """
    inputs = topk_inputs(Shape(3, 384, 16, 24), 5, seed=10, dtype=BFLOAT16, has_bias=True)
    with RecordedCalls() as recorded:
        for trained, workspace in ((ALL[:1], "keep"), (ALL[1:], "keep"), (ALL[:2], "recompute")):
            options = {"impl": Impl.FUSED, "trained": trained, "workspace_bytes": WORKSPACES[workspace]}
            evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
        with torch.no_grad():
            topk_divergence(*inputs, tail_bucket=False, logits=LogitStorage.TILE_RELATIVE_FP16)
    names = {function.name().removeprefix("esr_kernels::").split(".")[0] for function, _ in recorded.calls}
    of_op = {"topk_divergence_forward", "topk_divergence_backward_by_recomputing"}
    assert names == of_op | {"linear_backward_of_kept"}
    for function, args in recorded.calls:
        torch.library.opcheck(function, args)


def test_results_do_not_depend_on_what_ran_before():
    """Another vocabulary, K, dtype and head in between: no buffer of a call outlives it."""
    inputs = inputs_of(11, dtype=BFLOAT16)
    first = evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), impl=Impl.FUSED)
    other = topk_inputs(Shape(3, 517, 9, 11), 33, seed=12, has_bias=True, softcap=3.0)
    evaluate_topk_divergence(other, GeneralizedJSD(0.1), upstream_of(other), impl=Impl.FUSED)
    assert_same(first, evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), impl=Impl.FUSED))
    assert not math.isnan(first["divergence"].sum().item())


@every_storage
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_the_documented_recipe_for_two_models_at_hand(dtype, storage):
    """Ids of both models, the teacher's log-probs at them, Jensen-Shannon: a formula over K + 1 events of the full softmax."""
    linear = converted(make_linear_inputs(SHAPE, seed=13, dtype=dtype, has_bias=True, softcap=9.0), DEVICE)
    student, teacher = linear[:2], linear[2:]
    options, temperature = {"logits": storage}, 1.4
    ids = select_topk_ids(*student, 9, united_with_N_K=select_topk_ids(*teacher, 9))
    logprobs = gather_logprobs(*teacher, ids, temperature=temperature, **options)
    hidden = student[0].clone().requires_grad_()
    output = topk_divergence(
        hidden, student[1], ids, logprobs, GeneralizedJSD(0.5), loss_temperature=temperature, **options
    )
    (gradient,) = torch.autograd.grad(output.divergence_N, hidden, upstream_of(TopkInputs(*student, ids, logprobs)))

    exact = converted(linear, torch.float64)
    leaf = exact.student_hidden_N_D.clone().requires_grad_()
    p, q = (
        (head.logits(h) / temperature).softmax(-1)
        for h, head in ((leaf, exact.student_head), (exact.teacher_hidden_N_E, exact.teacher_head))
    )
    is_id = (ids[:, :, None] == torch.arange(SHAPE.vocab_size, device=DEVICE)).any(1)
    assert ((ids >= 0).sum(-1) == is_id.sum(-1)).all() and (ids == -1).any()
    p, q = (torch.cat([x * is_id, (x * ~is_id).sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    m, zero = 0.5 * (p + q), 1e-300  # an event of probability 0 adds 0, and has a derivative of 0
    expected_N = 0.5 * sum((x * ((x + zero) / (m + zero)).log()).sum(-1) for x in (p, q))
    (expected_gradient,) = torch.autograd.grad(expected_N, leaf, make_upstream(ROWS, seed=3, device=DEVICE).double())
    # Two ops in float32, or in 11 bits of the logits outside the ids; the gradient rounded to its dtype
    is_float32 = storage == LogitStorage.FLOAT32
    bound = 8 * FLOAT32_BOUND if is_float32 else 2.0**-12
    check_error(
        "divergence", output.divergence_N, oracle=expected_N, same_dtype=expected_N.detach().float(), bound=bound
    )
    norm_error = 2e-3 if dtype == BFLOAT16 or not is_float32 else 1e-5
    assert relative_error_in_norm(gradient, expected_gradient) < norm_error


NUMBERS = {
    "student_hidden_N_D": torch.zeros(4, 3),
    "student_head": torch.zeros(10, 3),
    "teacher_ids_N_K": torch.arange(2).expand(4, -1),
    "teacher_logprobs_N_K": torch.full((4, 2), -1.0),
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"student_hidden_N_D": torch.zeros(4, 3).double()}, TypeError, r"student_hidden_N_D must .* got float64; .*impl=Impl"),
        ({"student_head": torch.zeros(10, 3).double()}, TypeError, r"student_head\.weight must have dtype .*, got float64"),
        (
            {"student_head": OutputHead(torch.zeros(10, 3), torch.zeros(10).double())},
            TypeError,
            r"student_head\.bias must have dtype .*, got float64",
        ),
        (
            {"teacher_logprobs_N_K": torch.zeros(4, 2).double()},
            TypeError,
            r"teacher_logprobs_N_K must have dtype .*, got float64; .*impl=Impl\.REFERENCE",
        ),
        (
            {"teacher_ids_N_K": torch.zeros(4, 1025, dtype=torch.int64), "teacher_logprobs_N_K": torch.zeros(4, 1025)},
            ValueError,
            r"teacher_ids_N_K must have at most 1024 ids per row with impl=Impl\.FUSED, got 1025; .*REFERENCE",
        ),
        ({"logits": "bfloat16"}, ValueError, r"logits must be one of .*, got 'bfloat16'"),
        ({"workspace_bytes": 0}, ValueError, r"workspace_bytes must be > 0 or None, got 0"),
        ({"workspace_bytes": 511}, ValueError, r"workspace_bytes must be at least 512, the logits of one row of 10 ids, got 511"),
    ],
)  # fmt: skip
def test_fused_refuses(changed, error, message):
    """512: one row of 10 ids padded to a tile of 128, in float32 (tile-relative takes more for so few)."""
    with pytest.raises(error, match="topk_divergence: " + message):
        topk_divergence(**{name: to_device(value) for name, value in {**NUMBERS, **changed}.items()})


def to_device(value):
    if isinstance(value, OutputHead):
        return OutputHead(value.weight.to(DEVICE), value.bias.to(DEVICE))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def test_a_divergence_without_a_kernel_and_a_second_derivative_are_refused():
    class Halved(Divergence):
        def terms(self, student_logprobs, teacher_logprobs):
            return 0.5 * ReverseKL().terms(student_logprobs, teacher_logprobs)

    inputs = inputs_of(14)
    half = topk_divergence(*inputs, Halved(), impl=Impl.REFERENCE).divergence_N
    torch.testing.assert_close(half, 0.5 * topk_divergence(*inputs, ReverseKL()).divergence_N, rtol=1e-5, atol=1e-7)
    with pytest.raises(NotImplementedError, match=r"topk_divergence: Halved .* impl=Impl\.REFERENCE"):
        topk_divergence(*inputs, Halved())
    hidden = inputs.student_hidden_N_D.requires_grad_()
    value = topk_divergence(*inputs).divergence_N.sum()
    with pytest.raises(RuntimeError, match=r"topk_divergence: impl=Impl\.FUSED has no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)
