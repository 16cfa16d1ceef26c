"""Do the fused ops keep their accuracy at large offsets, finite masks, tiny upstreams, and where a float16 row nearly overflows?

python -m pytest tests/kernels/test_fused_regressions_numeric.py
"""

from dataclasses import replace

import pytest
import torch

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, LogitStorage, OutputHead, ReverseKL, linear_divergence
from esr_kernels.output_projection import gradients, plan, projection
from esr_kernels.output_projection.plan import logit_bytes_per_row, padded_vocab_size
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.error_budget import check_linear_divergence, check_token_divergence, relative_error_in_norm
from esr_kernels.testing.inputs import LinearInputs, LogitPair, make_linear_inputs, make_upstream
from esr_kernels.testing.oracle import (
    Results,
    converted,
    evaluate_linear_divergence,
    evaluate_token_divergence,
    linear_divergence_oracle,
    token_divergence_oracle,
)
from esr_kernels.tile_config import TileConfig
from esr_kernels.token_divergence import backward_kernel, forward_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16)}
SHAPE = Shape(rows=5, vocab_size=600, student_size=24, teacher_size=40)
ALL = ("student_hidden", "student_weight", "student_bias")
# What each schedule of linear_divergence needs to be chosen for SHAPE; recomputing takes two rows at a time.
SCHEDULES = {
    "hidden": {"trained": ("student_hidden",)},
    "keep": {"trained": ALL},
    "recompute": {"trained": ALL, "workspace_bytes": 2 * logit_bytes_per_row(600, LogitStorage.FLOAT32, 2)},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
both_16_bit_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def linear_inputs(seed: int, **options) -> LinearInputs:
    return converted(make_linear_inputs(SHAPE, seed=seed, **options), DEVICE)


def upstream_of(inputs: LogitPair | LinearInputs) -> torch.Tensor:
    return make_upstream(len(inputs[0]), seed=1, device=DEVICE)


def fused(inputs: LinearInputs, divergence, upstream_N: torch.Tensor, **options) -> Results:
    return evaluate_linear_divergence(inputs, divergence, upstream_N, impl=Impl.FUSED, **options)


@pytest.fixture
def tiles_of_128_columns(monkeypatch):
    for module in (forward_kernel, backward_kernel):
        monkeypatch.setattr(module, "choose_tile_config", lambda vocab_size: TileConfig(128, num_warps=1))


@pytest.mark.parametrize("offset", [300.0, 1e4, 2.0**20])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_stop_event_under_a_common_offset(name, offset):
    """Multiples of 1/8 stay exact; the event's log-sum-exp, added to the offset, would not."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randint(-16, 17, (2, 4, 200), generator=generator).to(DEVICE) / 8 + offset
    student[:, [3, 9]] += 3
    teacher[:, [3, 9]] += 3
    pair, ids = LogitPair(student, teacher), torch.tensor([3, 9, 4, 0], device=DEVICE)
    check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), stop_ids=(3, 9), token_ids_N=ids)


@pytest.mark.parametrize("height", [40.0, 6e4])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_stop_event_high_above_the_other_ids(name, height):
    """Two stop ids and one other id share nearly all of the probability."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randint(-16, 17, (2, 4, 200), generator=generator).to(DEVICE) / 8
    student[:, [3, 9, 50]] += height
    teacher[:, [3, 9, 50]] += height
    pair, ids = LogitPair(student, teacher), torch.tensor([3, 9, 50, 0], device=DEVICE)
    check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), stop_ids=(3, 9), token_ids_N=ids)


@every_schedule
@both_16_bit_dtypes
def test_forward_kl_of_an_id_that_the_student_all_but_excludes(dtype, schedule):
    """D near 1e35 in every row; the gradient is p - q all the same, and no larger than 1."""
    inputs = linear_inputs(3, dtype=dtype, has_bias=True)
    # float16 has no such number, but the head's bias may be wider than its weight.
    bias = inputs.student_head.bias.float() if dtype == torch.float16 else inputs.student_head.bias.clone()
    bias[7] = LOWEST[torch.bfloat16]
    inputs = inputs._replace(student_head=OutputHead(inputs.student_head.weight, bias))
    results = check_linear_divergence(inputs, ForwardKL(), upstream_of(inputs), **SCHEDULES[schedule])
    assert (results["divergence"] > 1e30).all() and (results["divergence"] < INF).all()
    assert_16_bit_gradients_are_near(
        results, linear_divergence_oracle(inputs, ForwardKL(), upstream_of(inputs), **SCHEDULES[schedule]).values
    )


def assert_16_bit_gradients_are_near(results: Results, oracle: Results) -> None:
    """dX and dW within 2e-3 in norm."""
    names = [name for name in oracle if name in ("grad_student_hidden", "grad_student_weight")]
    assert names
    for name in names:
        assert relative_error_in_norm(results[name], oracle[name]) <= 2e-3, name


@every_schedule
@both_16_bit_dtypes
def test_forward_kl_of_one_row_leaves_the_accuracy_of_the_others(dtype, schedule):
    """D = 2.5e5 in row 2, by a last hidden state that is 0 in the other rows, and below 1 there."""
    inputs = linear_inputs(5, dtype=dtype)
    rows, vocab_size = SHAPE.rows, SHAPE.vocab_size
    hidden = torch.cat([inputs.student_hidden_N_D, inputs.student_hidden_N_D.new_zeros(rows, 1)], dim=1)
    weight = torch.cat([inputs.student_head.weight, inputs.student_head.weight.new_zeros(vocab_size, 1)], dim=1)
    teacher_bias = torch.zeros(vocab_size, device=DEVICE)
    teacher_bias[7] = 4.0
    weight[7, -1] = -900.0
    hidden[2, -1] = 1.0
    inputs = inputs._replace(
        student_hidden_N_D=hidden,
        student_head=OutputHead(weight),
        teacher_head=OutputHead(inputs.teacher_head.weight, teacher_bias),
    )
    # D grows in proportion to the hidden state.
    value = fused(inputs, ForwardKL(), upstream_of(inputs), trained=())["divergence"][2].item()
    hidden[2, -1] = 2.5e5 / value
    upstream, gradients = torch.ones(rows, device=DEVICE), ("hidden",) if schedule == "hidden" else ("hidden", "weight")
    options = {**SCHEDULES[schedule], "trained": tuple(f"student_{name}" for name in gradients)}
    results = fused(inputs, ForwardKL(), upstream, **options)
    oracle = linear_divergence_oracle(inputs, ForwardKL(), upstream, **options).values
    assert (results["divergence"] > 2e5).tolist() == [False, False, True, False, False]
    # The last column, which is row 2's alone, outweighs the others.
    actual, expected = ({name: x[f"grad_student_{name}"][:, :-1] for name in gradients} for x in (results, oracle))
    for rows in ([2], [0, 1, 3, 4]):
        assert relative_error_in_norm(actual["hidden"][rows], expected["hidden"][rows]) <= 2e-3, rows
    if "weight" in gradients:
        assert relative_error_in_norm(actual["weight"], expected["weight"]) <= 2e-3


@pytest.mark.parametrize("where", ["first tile", "all but the last tile"])
@pytest.mark.parametrize("mask", [-1e31, -1e33, LOWEST[torch.float32]])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_finite_mask_before_the_largest_logit(tiles_of_128_columns, name, mask, where):
    """On either side or both. The value is the oracle's, or +inf with gradient 0 where float32 does not hold it."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 4, 500, generator=generator).to(DEVICE)
    masked = slice(0, 128 if where == "first tile" else 384)
    student[0, masked] = teacher[1, masked] = mask
    student[2, masked] = teacher[2, masked] = mask
    pair = LogitPair(student, teacher)
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.7], device=DEVICE)
    results = evaluate_token_divergence(pair, DIVERGENCES[name], upstream, impl=Impl.FUSED)
    oracle = token_divergence_oracle(pair, DIVERGENCES[name], upstream).values
    for row in range(4):
        value, expected = results["divergence"][row].double(), oracle["divergence"][row]
        gradient, expected_gradient = results["grad_student_logits"][row], oracle["grad_student_logits"][row]
        if value == INF:
            assert expected > 1e30 and (gradient == 0).all()
        else:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6)
            assert relative_error_in_norm(gradient, expected_gradient) < 1e-5
    for field in ("student_entropy", "teacher_entropy"):
        torch.testing.assert_close(results[field].double(), oracle[field], rtol=1e-5, atol=2e-6)


@every_schedule
def test_gradients_of_a_head_whose_teacher_has_a_finite_mask(tiles_of_128_columns, schedule):
    inputs = linear_inputs(6, dtype=torch.bfloat16, has_bias=True)
    inputs.teacher_head.bias[:300] = -1e33
    results = fused(inputs, ReverseKL(), upstream_of(inputs), **SCHEDULES[schedule])
    oracle = linear_divergence_oracle(inputs, ReverseKL(), upstream_of(inputs), **SCHEDULES[schedule]).values
    gradients = {name: value for name, value in results.items() if name.startswith("grad_")}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not results["divergence"].isnan().any()
    if (results["divergence"] == INF).all():
        assert all((gradient == 0).all() for gradient in gradients.values())
    else:
        torch.testing.assert_close(results["divergence"].double(), oracle["divergence"], rtol=1e-5, atol=0)
        assert_16_bit_gradients_are_near(results, oracle)


@pytest.mark.parametrize("mask", [-1e33, LOWEST[torch.bfloat16]])
@every_schedule
def test_rows_of_upstream_zero_add_nothing_whatever_the_mask(tiles_of_128_columns, schedule, mask):
    inputs = linear_inputs(7, dtype=torch.bfloat16, has_bias=True)
    inputs.teacher_head.bias[:300] = mask
    zero = torch.zeros(SHAPE.rows, device=DEVICE)
    results = fused(inputs, ReverseKL(), zero, **SCHEDULES[schedule])
    for name in SCHEDULES[schedule]["trained"]:
        assert (results[f"grad_{name}"] == 0).all(), name


@every_schedule
@pytest.mark.parametrize("size", [1e-37, 1e-38])
def test_a_tiny_upstream(size, schedule):
    """The last bits of bfloat16 are gone here, and of PyTorch's gradient with them; finite, and as near as that."""
    inputs = linear_inputs(8, dtype=torch.bfloat16, has_bias=True)
    upstream = size * torch.tensor([1.0, -0.5, 2.0, 0.7, -1.0], device=DEVICE)
    results = fused(inputs, ReverseKL(), upstream, **SCHEDULES[schedule])
    reference = evaluate_linear_divergence(
        inputs, ReverseKL(), upstream, impl=Impl.REFERENCE, trained=SCHEDULES[schedule]["trained"]
    )
    oracle = linear_divergence_oracle(inputs, ReverseKL(), upstream, trained=SCHEDULES[schedule]["trained"]).values
    for name in (f"grad_{name}" for name in SCHEDULES[schedule]["trained"]):
        assert results[name].isfinite().all(), name
        error, of_reference = (relative_error_in_norm(x[name], oracle[name]) for x in (results, reference))
        assert error < 1.2 * of_reference + 0.01, name


@pytest.fixture
def slices_of_256_ids(monkeypatch):
    """Three slices of the head, the last of them ragged, as a vocabulary above 16384 ids has."""
    monkeypatch.setattr(gradients, "SLICE_IDS", 256)
    monkeypatch.setattr(projection, "CONVERSION_ROWS", 256)


@every_schedule
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 weights"])
def test_gradients_slice_by_slice_of_the_head(slices_of_256_ids, dtypes, schedule):
    inputs = linear_inputs(
        9, dtype=torch.bfloat16 if dtypes == "bfloat16 weights" else getattr(torch, dtypes), has_bias=True
    )
    if dtypes == "bfloat16 weights":  # which are converted to float32, slice by slice too
        hidden = {name: getattr(inputs, name).float() for name in ("student_hidden_N_D", "teacher_hidden_N_E")}
        inputs = inputs._replace(**hidden)
    check_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), stop_ids=(0, 300, 599), **SCHEDULES[schedule])


def test_slices_under_a_vocabulary_cut(slices_of_256_ids):
    inputs = linear_inputs(10, dtype=torch.bfloat16, has_bias=True)
    for options in SCHEDULES.values():
        results = check_linear_divergence(inputs, ForwardKL(), upstream_of(inputs), vocab_size=515, **options)
        assert "student_weight" not in options["trained"] or (results["grad_student_weight"][515:] == 0).all()


@pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
@pytest.mark.parametrize("schedule", ["value", *SCHEDULES])
def test_log_probs_of_every_chunk_are_those_of_its_own_ids(monkeypatch, schedule, storage):
    """Two rows a chunk, the last of one; ids inside and outside of the stop event, and one outside of the vocabulary."""
    monkeypatch.setattr(plan, "POOR_CHUNK_ROWS", 1)
    inputs, ids = linear_inputs(11, dtype=torch.bfloat16), torch.tensor([17, 599, -100, 300, 130], device=DEVICE)
    budget = 2 * logit_bytes_per_row(SHAPE.vocab_size, storage, 2)
    if schedule == "keep":
        budget += SHAPE.rows * padded_vocab_size(SHAPE.vocab_size) * 2
    trained = {"value": (), "hidden": ALL[:1]}.get(schedule, ALL)
    options = {"trained": trained, "workspace_bytes": budget, "logits": storage, "stop_ids": (5, 300)}
    results = check_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), token_ids_N=ids, **options)
    # Rows differ in their ids: a chunk that took those of the first would be off by far more than the budget.
    logprobs = results["student_logprob"]
    assert logprobs.isnan().tolist() == [False, False, True, False, False] and logprobs[[0, 1, 3, 4]].std() > 0.1


def with_logits(inputs: LinearInputs, student: dict[int, float], teacher: dict[int, float], **head) -> LinearInputs:
    """Nearly flat logits but for those of some ids, by bias; `head` is scale and soft cap of both sides."""
    heads, scale = [], head.get("logit_scale", 1.0)
    for old, logits in ((inputs.student_head, student), (inputs.teacher_head, teacher)):
        bias = torch.zeros(SHAPE.vocab_size, device=DEVICE)
        for token, logit in logits.items():
            bias[token] = logit / scale
        heads.append(OutputHead(0.1 * old.weight / scale, bias, **head))
    return inputs._replace(student_head=heads[0], teacher_head=heads[1])


@pytest.mark.parametrize("stop_ids", [(), (7, 20)], ids=["plain", "stop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_certain_token_under_a_soft_cap(name, dtype, stop_ids):
    """p > 1/2 where the soft cap takes two thirds of the gradient; the teacher is less certain."""
    inputs = with_logits(linear_inputs(12, dtype=dtype), {7: 11.0}, {7: 7.0}, softcap=10.0)
    student = inputs.student_head.logits(inputs.student_hidden_N_D)
    assert (student.softmax(-1)[:, 7] > 0.5).all() and (1 - (student[:, 7] / 10) ** 2 < 0.5).all()
    options = {"stop_ids": stop_ids, "trained": ("student_hidden", "student_weight")}
    results = check_linear_divergence(inputs, DIVERGENCES[name], upstream_of(inputs), **options)
    oracle = linear_divergence_oracle(inputs, DIVERGENCES[name], upstream_of(inputs), **options).values
    error = relative_error_in_norm(results["grad_student_weight"][7], oracle["grad_student_weight"][7])
    assert error < (2e-3 if dtype == torch.bfloat16 else 1e-5)


# Divergence, logit scale / temperature, logits of ids 7 and 50 of the student and of the teacher, size of d(logits).
NEAR_THE_BOUND = {
    "forward KL": (ForwardKL(), 1.0, (15.0, 0.0), (0.0, 15.0), 1.0),
    "forward KL, slope 100": (ForwardKL(), 100.0, (15.0, 0.0), (0.0, 15.0), 1e2),
    "forward KL, slope 0.01": (ForwardKL(), 0.01, (15.0, 0.0), (0.0, 15.0), 1e-2),
    "JSD, slope 100": (GeneralizedJSD(0.5), 100.0, (15.0, 15.0), (15.0, -25.0), 1e1),
    "reverse KL, slope 100": (ReverseKL(), 100.0, (15.0, 15.0), (15.0, -25.0), 1e3),
    "reverse KL above 1e5": (ReverseKL(), 1.0, (15.0, 12.0), (15.0, -4e6), 2e5),
    "reverse KL above 1e5, slope 100": (ReverseKL(), 100.0, (15.0, 12.0), (15.0, -4e6), 2e7),
}


@both_16_bit_dtypes
@pytest.mark.parametrize("case", NEAR_THE_BOUND)
def test_gradients_near_the_bound_by_which_a_float16_row_is_scaled(case, dtype):
    """A larger scale would overflow, as would one that leaves out the slope or the divergence."""
    divergence, slope, student, teacher, size = NEAR_THE_BOUND[case]
    scale, temperature = slope**0.5, slope**-0.5
    student, teacher = ({7: a * temperature, 50: b * temperature} for a, b in (student, teacher))
    inputs = with_logits(linear_inputs(13, dtype=dtype), student, teacher, logit_scale=scale)
    inputs = inputs._replace(  # flat beside these, at any temperature
        student_head=replace(inputs.student_head, weight=inputs.student_head.weight * temperature),
        teacher_head=replace(inputs.teacher_head, weight=inputs.teacher_head.weight * temperature),
    )
    options = {"loss_temperature": temperature, "trained": ("student_hidden", "student_weight")}
    results = check_linear_divergence(inputs, divergence, upstream_of(inputs) / size, **options)
    assert (results["divergence"] > (1e5 if "above" in case else 0.1)).all()
    oracle = linear_divergence_oracle(inputs, divergence, upstream_of(inputs) / size, **options).values
    assert_16_bit_gradients_are_near(results, oracle)


@pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
def test_a_product_of_minus_infinity_below_a_soft_cap_is_minus_the_soft_cap(storage):
    """1e30 * -1e30 overflows; tanh brings it back. It is not an id that was taken out of its row."""
    hidden = torch.tensor([[1.0, 2.0, -1e30]], device=DEVICE)
    weight = torch.diag(torch.tensor([1.0, 1.0, 1e30], device=DEVICE))
    teacher = torch.tensor([[0.5, 0.1, 0.2]], device=DEVICE), torch.eye(3, device=DEVICE)
    outputs = [
        linear_divergence(hidden, OutputHead(weight, softcap=2.0), *teacher, ForwardKL(), logits=storage, impl=impl)
        for impl in (Impl.FUSED, Impl.REFERENCE)
    ]
    for name, actual, expected in zip(outputs[0]._fields, *outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
    assert 0.1 < outputs[0].divergence_N.item() < 2
