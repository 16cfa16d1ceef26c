"""Do chunk sizes, schedules and storages of linear_divergence give one result, and do hostile rows stay in their row?

python -m pytest tests/kernels/test_fused_linear_schedules.py
"""

import math

import pytest
import torch

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, LogitStorage, OutputHead, ReverseKL
from esr_kernels.output_projection import plan
from esr_kernels.output_projection.plan import Schedule, logit_bytes_per_row, padded_vocab_size, plan_linear_op
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.error_budget import check_linear_divergence, relative_error_in_norm
from esr_kernels.testing.inputs import LinearInputs, make_linear_inputs, make_upstream
from esr_kernels.testing.oracle import Results, converted, evaluate_linear_divergence, linear_divergence_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
# The interpreter takes milliseconds for a row: few rows there, and the same chunk sizes relative to them.
ROWS = 260 if DEVICE == "cuda" else 7
CHUNKS = [1, 127, 128, ROWS, ROWS + 1, 4224] if DEVICE == "cuda" else [1, 3, 4, ROWS + 1]
SHAPE = Shape(rows=ROWS, vocab_size=300, student_size=24, teacher_size=40)
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def linear_inputs(shape: Shape = SHAPE, **options) -> LinearInputs:
    return converted(make_linear_inputs(shape, **options), DEVICE)


def upstream_of(inputs: LinearInputs) -> torch.Tensor:
    return make_upstream(len(inputs.student_hidden_N_D), seed=3, device=DEVICE)


def workspace_for(chunk_rows: int, schedule: Schedule, storage: LogitStorage, dtype: torch.dtype) -> int:
    """The budget that makes the op take `chunk_rows` rows at a time under `schedule`."""
    itemsize = 2 if dtype.itemsize == 2 else 4
    kept = ROWS * padded_vocab_size(SHAPE.vocab_size) * itemsize if schedule is Schedule.KEEP else 0
    budget = kept + chunk_rows * logit_bytes_per_row(SHAPE.vocab_size, storage, itemsize)
    chosen = plan_linear_op(
        "linear_divergence",
        ROWS,
        SHAPE.vocab_size,
        num_sides=2,
        needs_hidden_gradient=True,
        needs_head_gradient=schedule in (Schedule.KEEP, Schedule.RECOMPUTE),
        gradient_itemsize=itemsize,
        storage=storage,
        workspace_bytes=budget,
    )
    assert chosen == (schedule, storage, min(chunk_rows, ROWS))
    return budget


def run(inputs: LinearInputs, chunk_rows: int, schedule: Schedule, storage: LogitStorage, divergence) -> Results:
    return evaluate_linear_divergence(
        inputs,
        divergence,
        upstream_of(inputs),
        impl=Impl.FUSED,
        trained=("student_hidden",)
        if schedule is Schedule.HIDDEN
        else ("student_hidden", "student_weight", "student_bias"),
        logits=storage,
        workspace_bytes=workspace_for(chunk_rows, schedule, storage, inputs.student_head.weight.dtype),
    )


@pytest.fixture
def any_chunk_may_be_kept(monkeypatch):
    """d(logits) are kept however few rows of logits then fit beside them: small shapes would else not be chunked."""
    monkeypatch.setattr(plan, "POOR_CHUNK_ROWS", 1)


@every_storage
@pytest.mark.parametrize("schedule", [Schedule.HIDDEN, Schedule.KEEP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_n7_chunk_sizes_agree(any_chunk_may_be_kept, dtype, schedule, storage):
    inputs = linear_inputs(seed=1, dtype=dtype, has_bias=True)
    whole = run(inputs, ROWS, schedule, storage, ReverseKL())
    for chunk_rows in CHUNKS:
        assert_agree(run(inputs, chunk_rows, schedule, storage, ReverseKL()), whole, dtype, storage)


@every_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_n7_recomputed_and_kept_gradients_agree(dtype, storage):
    """The 5-unit path and the 8-unit path, one result."""
    inputs = linear_inputs(seed=2, dtype=dtype, has_bias=True)
    kept = run(inputs, ROWS, Schedule.KEEP, storage, GeneralizedJSD(0.5))
    for chunk_rows in CHUNKS[:2]:
        recomputed = run(inputs, chunk_rows, Schedule.RECOMPUTE, storage, GeneralizedJSD(0.5))
        assert_agree(recomputed, kept, dtype, storage)


def assert_agree(actual: Results, expected: Results, dtype: torch.dtype, storage: LogitStorage) -> None:
    """Within float32 rounding, where a matrix product of another height may round another way; in float16 storage one such
    rounding may move a stored logit by a unit in its last place, and a 16-bit gradient by one in its own.
    """
    is_float32 = storage is LogitStorage.FLOAT32
    norm_error = 1e-3 if dtype.itemsize == 2 else 3e-6 if is_float32 else 3e-4
    tolerance = {"rtol": 2e-6, "atol": 5e-7} if is_float32 else {"rtol": 2e-4, "atol": 2e-5}
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if name.startswith("grad_"):
            assert relative_error_in_norm(value, expected[name]) < norm_error, name
        else:
            torch.testing.assert_close(value, expected[name], **tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_n7_the_weight_gradients_error_does_not_grow_with_the_number_of_chunks(dtype):
    """One row a chunk: sums kept in 16 bits would lose more with every chunk, sums in float32 lose nothing."""
    inputs = linear_inputs(seed=4, dtype=dtype, has_bias=True)
    oracle = linear_divergence_oracle(inputs, ForwardKL(), upstream_of(inputs)).values["grad_student_weight"]
    chunked = run(inputs, 1, Schedule.RECOMPUTE, LogitStorage.FLOAT32, ForwardKL())["grad_student_weight"]
    whole = run(inputs, ROWS, Schedule.KEEP, LogitStorage.FLOAT32, ForwardKL())["grad_student_weight"]
    error, error_of_whole = relative_error_in_norm(chunked, oracle), relative_error_in_norm(whole, oracle)
    assert error < 2e-3 and error < 1.1 * error_of_whole


@pytest.mark.parametrize("name", ["forward_kl", "jsd_0.9", "alpha_0.3"])
def test_n7_recomputing_is_within_the_error_budget(name):
    inputs = linear_inputs(seed=5, dtype=torch.bfloat16, has_bias=True, softcap=6.0, logit_scale=0.7)
    check_linear_divergence(
        inputs,
        DIVERGENCES[name],
        upstream_of(inputs),
        stop_ids=(0, 5, 299),
        loss_temperature=1.4,
        workspace_bytes=workspace_for(3, Schedule.RECOMPUTE, LogitStorage.FLOAT32, torch.bfloat16),
        logits=LogitStorage.FLOAT32,
    )


def test_auto_gives_the_result_of_the_storage_that_it_picks():
    inputs = linear_inputs(seed=6, dtype=torch.bfloat16)
    options = {"impl": Impl.FUSED, "trained": ("student_hidden", "student_weight")}
    auto = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
    named = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), logits=LogitStorage.FLOAT32, **options)
    assert all(torch.equal(auto[name], named[name]) for name in auto if not name.endswith("logprob"))


def scaled_to(inputs: LinearInputs, largest: float) -> LinearInputs:
    """The same models with logits whose largest magnitude is `largest`."""
    top = max(
        inputs.student_head.logits(inputs.student_hidden_N_D).abs().max(),
        inputs.teacher_head.logits(inputs.teacher_hidden_N_E).abs().max(),
    )
    student, teacher = (
        OutputHead(h.weight, logit_scale=largest / top.item()) for h in (inputs.student_head, inputs.teacher_head)
    )
    return inputs._replace(student_head=student, teacher_head=teacher)


@every_storage
@pytest.mark.parametrize("largest", [1e3, 6e4, 3e6])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "total_variation"])
def test_n8_large_finite_logits(name, largest, storage):
    """Beyond float16's largest number too: no NaN, no infinity that the oracle does not have."""
    inputs = scaled_to(linear_inputs(Shape(4, 300, 24, 40), seed=7, gap=0.3), largest)
    results = evaluate_linear_divergence(
        inputs, DIVERGENCES[name], upstream_of(inputs), impl=Impl.FUSED, logits=storage
    )
    oracle = linear_divergence_oracle(inputs, DIVERGENCES[name], upstream_of(inputs)).values
    for field, value in results.items():
        assert field.endswith("logprob") or value.isfinite().all(), field
    # 11 bits of a distance, or 24 bits of a logit, of this size
    digits = 2e-3 if storage == LogitStorage.TILE_RELATIVE_FP16 else 1e-6
    atol = min(largest * digits, 100.0)
    torch.testing.assert_close(results["divergence"].double(), oracle["divergence"], rtol=digits, atol=atol)


@every_storage
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "skew_reverse_0.1"])
def test_n8_a_nan_hidden_state_poisons_only_its_row(name, side, storage):
    inputs = linear_inputs(Shape(4, 300, 24, 40), seed=8)
    names = {"trained": ("student_hidden",), "logits": storage, "impl": Impl.FUSED}
    expected = evaluate_linear_divergence(inputs, DIVERGENCES[name], upstream_of(inputs), **names)
    (inputs.student_hidden_N_D if side == "student" else inputs.teacher_hidden_N_E)[2, 5] = NAN
    results = evaluate_linear_divergence(inputs, DIVERGENCES[name], upstream_of(inputs), **names)
    assert results["divergence"].isnan().tolist() == [False, False, True, False]
    assert results["grad_student_hidden"][2].isnan().any()
    others = [0, 1, 3]
    for field in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "grad_student_hidden"):
        torch.testing.assert_close(results[field][others], expected[field][others], rtol=1e-6, atol=1e-7)


@every_storage
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "alpha_0.5"])
def test_n2_ids_masked_by_a_bias_of_minus_infinity(name, storage):
    """On both sides (a padded vocabulary, a whole tile of 128 columns among it): as if the ids did not exist."""
    inputs = linear_inputs(Shape(4, 400, 24, 40), seed=9, has_bias=True)
    masked = [0, 7, *range(128, 256), 399]
    for head in (inputs.student_head, inputs.teacher_head):
        head.bias[masked] = -INF
    results = evaluate_linear_divergence(
        inputs, DIVERGENCES[name], upstream_of(inputs), impl=Impl.FUSED, logits=storage
    )
    kept = [column for column in range(400) if column not in masked]
    without = inputs._replace(
        student_head=OutputHead(inputs.student_head.weight[kept], inputs.student_head.bias[kept]),
        teacher_head=OutputHead(inputs.teacher_head.weight[kept], inputs.teacher_head.bias[kept]),
    )
    oracle = linear_divergence_oracle(without, DIVERGENCES[name], upstream_of(inputs)).values
    tolerance = 1e-5 if storage == LogitStorage.FLOAT32 else 2e-3
    torch.testing.assert_close(results["divergence"].double(), oracle["divergence"], rtol=tolerance, atol=2e-6)
    assert relative_error_in_norm(results["grad_student_hidden"], oracle["grad_student_hidden"]) < tolerance
    assert relative_error_in_norm(results["grad_student_weight"][kept], oracle["grad_student_weight"]) < tolerance
    assert (results["grad_student_weight"][masked] == 0).all() and (results["grad_student_bias"][masked] == 0).all()


@every_storage
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()], ids=repr)
def test_n2_ids_masked_on_one_side_make_the_kl_infinite_or_not(divergence, storage):
    """Reverse KL does not allow the teacher to exclude what the student has; forward KL does, and stays finite."""
    inputs = linear_inputs(Shape(3, 300, 24, 40), seed=10, has_bias=True)
    inputs.teacher_head.bias[7] = -INF
    results = evaluate_linear_divergence(inputs, divergence, upstream_of(inputs), impl=Impl.FUSED, logits=storage)
    gradients = [results[f"grad_student_{name}"] for name in ("hidden", "weight", "bias")]
    assert all(gradient.isfinite().all() for gradient in gradients)
    if divergence == ReverseKL():
        assert results["divergence"].isposinf().all() and all((gradient == 0).all() for gradient in gradients)
    else:
        assert results["divergence"].isfinite().all() and all((gradient != 0).any() for gradient in gradients)


@every_storage
def test_s3_all_rows_fully_masked(storage):
    inputs = linear_inputs(Shape(3, 300, 24, 40), seed=11, has_bias=True)
    inputs.student_head.bias[:] = -INF
    results = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), impl=Impl.FUSED, logits=storage)
    for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement"):
        assert (results[name] == 0).all(), name
    for name in ("hidden", "weight", "bias"):
        assert (results[f"grad_student_{name}"] == 0).all(), name


@pytest.mark.parametrize("remainder", [1e-2, 1e-4, 1e-6])
@every_storage
def test_n5_confident_rows_keep_their_gradient(storage, remainder):
    """p = 1 - remainder by a large bias, q = 1 - 3 remainder: the bias gradient of the true class within 1 % of the oracle."""
    inputs = linear_inputs(Shape(2, 300, 24, 40), seed=12, gap=0.3, has_bias=True)
    true_class = 130
    for head, hidden, rest in (
        (inputs.student_head, inputs.student_hidden_N_D, remainder),
        (inputs.teacher_head, inputs.teacher_hidden_N_E, 3 * remainder),
    ):
        head.weight[true_class] = 0.0
        head.bias[true_class] = -INF
        head.bias[true_class] = head.logits(hidden)[0].logsumexp(-1) + math.log((1 - rest) / rest)
    upstream = torch.tensor([1.7, 0.0], device=DEVICE)
    results = evaluate_linear_divergence(inputs, ReverseKL(), upstream, impl=Impl.FUSED, logits=storage)
    oracle = linear_divergence_oracle(inputs, ReverseKL(), upstream).values
    actual, expected = (x["grad_student_bias"][true_class].item() for x in (results, oracle))
    assert actual == pytest.approx(expected, rel=0.01)
