"""Is topk_divergence under FUSED within the error budget, for every divergence, kind of events, dtype, storage, K and head?

python -m pytest tests/kernels/test_fused_topk_divergence.py
"""

import math
from dataclasses import replace

import pytest
import torch

from esr_kernels import (
    ForwardKL,
    GeneralizedJSD,
    Impl,
    LogitStorage,
    OutputHead,
    ReverseKL,
    linear_divergence,
    topk_divergence,
)
from esr_kernels.testing.cases import DIVERGENCES, ONE_OF_EACH_CLASS, SMALL_SHAPES, Shape
from esr_kernels.testing.error_budget import check_against, check_error, relative_error_in_norm
from esr_kernels.testing.inputs import make_linear_inputs, make_upstream
from esr_kernels.testing.logprob_inputs import TopkInputs, make_topk_inputs
from esr_kernels.testing.logprob_oracle import evaluate_topk_divergence, topk_divergence_oracle
from esr_kernels.testing.oracle import Results, converted, evaluate_linear_divergence, linear_divergence_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SMALL = Shape(rows=3, vocab_size=643, student_size=24, teacher_size=40)
EVENTS = {
    "tail": {},
    "renormalized": {"tail_bucket": False},
    "truncated": {"tail_bucket": False, "renormalize": False},
}
# Every class has a kernel for the first two; a sum over a part of the events is defined for these.
CLASSES_AND_EVENTS = [(name, events) for name in ONE_OF_EACH_CLASS for events in ("tail", "renormalized")]
CLASSES_AND_EVENTS += [(name, "truncated") for name in ("forward_kl", "reverse_kl", "jsd_0.5")]
every_class_and_events = pytest.mark.parametrize(("name", "events"), CLASSES_AND_EVENTS)
every_class = pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def topk_inputs(shape: Shape = SMALL, num_ids: int = 11, **options) -> TopkInputs:
    return converted(make_topk_inputs(shape, num_ids, **options), DEVICE)


def upstream_of(inputs: TopkInputs, seed: int = 0) -> torch.Tensor:
    return make_upstream(len(inputs.student_hidden_N_D), seed=seed, device=DEVICE)


def with_float32_bias(inputs: TopkInputs) -> TopkInputs:
    """Of three rows, one entry may hold 0.86 of the norm of a bias gradient; if the gradient is rounded to bfloat16 and that
    entry lies between two numbers, neither of them is within any budget (5e-3).
    """
    bias = inputs.student_head.bias
    return inputs._replace(student_head=replace(inputs.student_head, bias=None if bias is None else bias.float()))


def check(inputs: TopkInputs, divergence, **options) -> Results:
    """FUSED within the error of PyTorch at the same dtype plus the bound of the float64 oracle."""
    return check_against(
        topk_divergence_oracle, evaluate_topk_divergence, inputs, divergence, upstream_of(inputs), **options
    )


def fused(inputs: TopkInputs, divergence, **options) -> Results:
    return evaluate_topk_divergence(inputs, divergence, upstream_of(inputs), impl=Impl.FUSED, **options)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_in_bfloat16(name):
    """With everything that an op and a head can have, all at once; K is no power of 2.

    Alpha far outside [0, 1] weighs ids by a power of q / p: 11 bits of a logit in the tail are 1e-3 of its gradient.
    """
    inputs = topk_inputs(
        num_ids=13, temperature=0.7, seed=1, dtype=BFLOAT16, has_bias=True, logit_scale=0.8, softcap=7.0
    )
    storage = LogitStorage.FLOAT32 if name in ("alpha_2", "alpha_-1.5") else LogitStorage.TILE_RELATIVE_FP16
    check(with_float32_bias(inputs), DIVERGENCES[name], logits=storage, loss_temperature=0.7)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.1", "jsd_0.5", "jsd_0.9", "jsd_0", "jsd_1"])
def test_every_truncated_divergence_in_bfloat16(name):
    inputs = topk_inputs(
        num_ids=13, temperature=1.6, seed=1, dtype=BFLOAT16, has_bias=True, logit_scale=1.3, softcap=7.0
    )
    check(with_float32_bias(inputs), DIVERGENCES[name], loss_temperature=1.6, **EVENTS["truncated"])


@pytest.mark.parametrize(
    ("dtype", "storage"), [(FLOAT32, LogitStorage.FLOAT32), (BFLOAT16, LogitStorage.FLOAT32)], ids=str
)
@every_class_and_events
def test_every_class_dtype_and_storage(name, events, dtype, storage):
    check(topk_inputs(seed=2, dtype=dtype), DIVERGENCES[name], logits=storage, **EVENTS[events])


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_float16_models_stored_tile_relative(name, events):
    check(topk_inputs(seed=2, dtype=FLOAT16), DIVERGENCES[name], logits="tile_relative_fp16", **EVENTS[events])


@pytest.mark.parametrize(
    ("name", "events"),
    [("forward_kl", "tail"), ("skew_reverse_0.1", "tail"), ("jsd_0.5", "renormalized"), ("reverse_kl", "truncated")],
)
def test_float32_models_stored_tile_relative(name, events):
    """The caller asks for 11 bits of the tail's logits: the bars of 16 bits hold, float32 ones cannot.

    2^-14 of the sizes is what `esr_kernels.testing.oracle` allows for values in this storage; renormalised, the ids alone are
    compared, and they are float32 in every storage.
    """
    inputs = topk_inputs(seed=3)
    actual = fused(inputs, DIVERGENCES[name], logits=LogitStorage.TILE_RELATIVE_FP16, **EVENTS[events])
    oracle = topk_divergence_oracle(inputs, DIVERGENCES[name], upstream_of(inputs), **EVENTS[events])
    for gradient in ("grad_hidden", "grad_weight"):
        error = relative_error_in_norm(actual[gradient], oracle.values[gradient])
        assert error < (1e-5 if events == "renormalized" else 2e-3), gradient
    bound = oracle.bounds["divergence"] * (2 if events == "renormalized" else 128)  # of 4 eps: 8 eps, or 2^-14
    assert ((actual["divergence"].double() - oracle.values["divergence"]).abs() <= bound).all()


@every_storage
@pytest.mark.parametrize("num_ids", [1, 2, 3, 17, 100])
def test_any_number_of_ids(num_ids, storage):
    """1 is legal with a tail, and not silently zero; 3, 17 and 100 leave lanes of the kernel without an id."""
    inputs = topk_inputs(Shape(2, 643, 24, 40), num_ids, seed=4, dtype=BFLOAT16)
    results = check(inputs, ForwardKL(), logits=storage)
    assert (results["divergence"] > 1e-4).all()
    check(inputs, GeneralizedJSD(0.3), logits=storage, **EVENTS["truncated"])


@every_storage
@pytest.mark.parametrize("gap", [0.05, 0.5])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_n1_near_equal_models_where_16_bit_logits_fail(name, gap, storage):
    """A bfloat16 model near its teacher: dX and dW within 2e-3 of float64; with bfloat16 logits they are noise.

    The second half is how peers compute: one matrix product with bfloat16 output, the loss in float32. At a gap of 0.05 the
    rounding of logits near 8 is as large as the gap.
    """
    inputs = topk_inputs(Shape(6, 1000, 64, 96), 20, gap=gap, seed=5, dtype=BFLOAT16)
    actual = check(inputs, DIVERGENCES[name], logits=storage)
    oracle = topk_divergence_oracle(inputs, DIVERGENCES[name], upstream_of(inputs)).values
    assert oracle["divergence"].mean() < (0.002 if gap == 0.05 else 0.2)
    rounded = gradients_from_bfloat16_logits(inputs, DIVERGENCES[name])
    for gradient in ("grad_hidden", "grad_weight"):
        assert relative_error_in_norm(actual[gradient], oracle[gradient]) <= 2e-3
        assert relative_error_in_norm(rounded[gradient], oracle[gradient]) > (0.2 if gap == 0.05 else 0.02)


def gradients_from_bfloat16_logits(inputs: TopkInputs, divergence) -> dict[str, torch.Tensor]:
    exact = converted(inputs, torch.float64)
    hidden, weight = exact.student_hidden_N_D, exact.student_head.weight
    logits = (hidden @ weight.T).bfloat16().float()
    on_logits = inputs._replace(student_hidden_N_D=logits, student_head=OutputHead(torch.eye(len(weight)).to(logits)))
    results = evaluate_topk_divergence(
        on_logits, divergence, upstream_of(inputs), impl=Impl.REFERENCE, trained=("hidden",)
    )
    gradient = results["grad_hidden"].double()
    return {"grad_hidden": gradient @ weight, "grad_weight": gradient.T @ hidden}


@every_storage
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_s1_s3_shapes(name, storage):
    """V aligned to nothing, D not a multiple of 8, one row, no row; ids in several tiles and slices of a row."""
    shape = replace(SMALL_SHAPES[name], rows=min(SMALL_SHAPES[name].rows, 4))
    inputs = topk_inputs(shape, 40, seed=26, dtype=BFLOAT16, has_bias=True)
    results = check(inputs, ReverseKL(), logits=storage)
    assert results["grad_weight"].shape == (shape.vocab_size, shape.student_size)
    if shape.rows == 0:
        assert (results["grad_weight"] == 0).all() and (results["grad_bias"] == 0).all()


HEADS = {
    "bias": {"has_bias": True},
    "logit scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 2.0},
    "bias, softcap and scale": {"has_bias": True, "softcap": 5.0, "logit_scale": 1.5},
}


@pytest.mark.parametrize(
    ("events", "storage"),
    [
        ("tail", LogitStorage.FLOAT32),
        ("tail", LogitStorage.TILE_RELATIVE_FP16),
        ("renormalized", LogitStorage.FLOAT32),
        ("truncated", LogitStorage.TILE_RELATIVE_FP16),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_s5_heads(head, events, storage):
    """The ids are -inf in the stored row, which a soft cap would make -softcap: an id counted again in the tail."""
    dtype = FLOAT32 if storage == LogitStorage.FLOAT32 else BFLOAT16
    inputs = topk_inputs(temperature=1.3, seed=14, dtype=dtype, **HEADS[head])
    check(with_float32_bias(inputs), GeneralizedJSD(0.3), logits=storage, loss_temperature=1.3, **EVENTS[events])


@pytest.mark.parametrize("temperature", [0.1, 10.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "alpha_0.5"])
def test_s5_any_temperature(name, temperature):
    inputs = topk_inputs(temperature=temperature, seed=8, dtype=BFLOAT16)
    check(inputs, DIVERGENCES[name], loss_temperature=temperature)


@pytest.mark.parametrize("name", ["forward_kl", "skew_reverse_0.1"])
def test_g6_temperature_has_no_square(name):
    """logits / T: at T = 2 it is a head of half the scale, in value and in gradient. The log-probs are tempered already."""
    inputs = topk_inputs(seed=9)
    tempered = fused(inputs, DIVERGENCES[name], loss_temperature=2.0)
    halved = inputs._replace(student_head=OutputHead(inputs.student_head.weight, logit_scale=0.5))
    expected = fused(halved, DIVERGENCES[name])
    for field in expected:  # another order of one multiplication
        torch.testing.assert_close(tempered[field], expected[field], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)], ids=str)
def test_hidden_states_and_head_may_differ_in_dtype(hidden_dtype, weight_dtype):
    """As under autocast, or with a float32 master head. Each gradient has the dtype of its own tensor."""
    inputs = topk_inputs(seed=10, dtype=BFLOAT16)
    head = OutputHead(inputs.student_head.weight.to(weight_dtype))
    inputs = inputs._replace(student_hidden_N_D=inputs.student_hidden_N_D.to(hidden_dtype), student_head=head)
    actual = check(inputs, ReverseKL())
    assert actual["grad_hidden"].dtype == hidden_dtype and actual["grad_weight"].dtype == weight_dtype


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_log_probs_of_16_bits_are_read_exactly(dtype):
    """Their rounding belongs to the inputs: the oracle has it too."""
    inputs = topk_inputs(seed=11)
    inputs = inputs._replace(teacher_logprobs_N_K=inputs.teacher_logprobs_N_K.to(dtype))
    for divergence in (ForwardKL(), ReverseKL()):
        check(inputs, divergence)


@every_class
def test_all_ids_give_the_full_divergence(name):
    """K = V: no tail is left, on either side. Value, entropies and gradients are those of `linear_divergence`."""
    shape = Shape(3, 130, 24, 40)
    linear = converted(make_linear_inputs(shape, seed=12, has_bias=True), DEVICE)
    inputs = topk_inputs(shape, 130, seed=12, has_bias=True)
    assert_is_linear_divergence(fused(inputs, DIVERGENCES[name]), linear, DIVERGENCES[name])


@every_storage
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_tail_of_one_id_gives_the_full_divergence(name, storage):
    """K = V - 1: the tail is the teacher's likeliest id itself, which makes it a large one."""
    shape = Shape(3, 130, 24, 40)
    linear = converted(make_linear_inputs(shape, seed=13), DEVICE)
    inputs = topk_inputs(shape, 130, seed=13)
    best = inputs.teacher_logprobs_N_K.argmax(-1, keepdim=True)
    others = torch.ones_like(inputs.teacher_ids_N_K, dtype=torch.bool).scatter(-1, best, False)
    inputs = inputs._replace(
        teacher_ids_N_K=inputs.teacher_ids_N_K[others].view(3, 129),
        teacher_logprobs_N_K=inputs.teacher_logprobs_N_K[others].view(3, 129),
    )
    actual = fused(inputs, DIVERGENCES[name], logits=storage)
    del actual["top1_agreement"]  # of the best given id, which is not the teacher's best
    assert_is_linear_divergence(actual, linear, DIVERGENCES[name])


def assert_is_linear_divergence(actual: Results, linear, divergence) -> None:
    """Within the budget of `linear_divergence`: log-probs in float32 are as exact as its logits. In tile-relative storage a
    tail of one id is stored as its tile's maximum, so nothing is lost.
    """
    upstream = make_upstream(len(linear.student_hidden_N_D), device=DEVICE)
    oracle = linear_divergence_oracle(linear, divergence, upstream)
    same_dtype = evaluate_linear_divergence(linear, divergence, upstream, impl=Impl.REFERENCE)
    names = {f"grad_{name}": f"grad_student_{name}" for name in ("hidden", "weight", "bias")}
    for name, value in actual.items():
        full = names.get(name, name)
        check_error(name, value, oracle=oracle.values[full], same_dtype=same_dtype[full], bound=oracle.bounds[full])


@every_class
def test_the_tail_bucket_is_a_lower_bound_that_grows_with_the_ids(name):
    """One student row against its teacher known at 1, 2, ... V ids; K = 1 is already above 0 and K = V is all of it."""
    shape, divergence = Shape(1, 15, 8, 12), DIVERGENCES[name]
    full = linear_divergence(*converted(make_linear_inputs(shape, gap=1.0, seed=14), DEVICE), divergence).divergence_N
    hidden, head, ids, logprobs = topk_inputs(shape, 15, gap=1.0, seed=14)
    slots = torch.arange(15, device=DEVICE)
    values = topk_divergence(
        hidden.expand(15, -1),
        head,
        ids.masked_fill(slots > slots[:, None], -1),
        logprobs.expand(15, -1),
        divergence,
    ).divergence_N
    assert values[0] > 1e-4
    assert (values.diff() >= -1e-6 * (1 + full)).all()  # a few eps of sums near 1
    torch.testing.assert_close(values[-1:], full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("events", ["tail", "renormalized"])
@every_class
def test_equal_models_have_value_and_gradient_zero(name, events):
    """The student's own log-probs as the teacher's. Total variation has no gradient there: 0.5 p sign(p - q)."""
    inputs = topk_inputs(Shape(4, 300, 24, 40), 9, seed=15)
    logprobs = inputs.student_head.logits(inputs.student_hidden_N_D).double().log_softmax(-1)
    inputs = inputs._replace(teacher_logprobs_N_K=logprobs.gather(-1, inputs.teacher_ids_N_K).float())
    results = fused(inputs, DIVERGENCES[name], **EVENTS[events])
    assert (results["divergence"].abs() < 1e-6).all()  # a few eps of sums near 1
    if name != "total_variation":
        # a few eps of each p and q, summed over |W| and |X| of about 1
        assert all((results[name].abs() < 1e-5).all() for name in ("grad_hidden", "grad_weight"))


LAYOUTS = {
    "rows of a wider tensor": lambda x: torch.cat([x.new_full((len(x), 3), 7), x, x], dim=1)[:, 3 : 3 + x.shape[1]],
    "every second row": lambda x: torch.stack([x, x.new_full(x.shape, 7)], dim=1).flatten(0, 1)[::2],
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_s2_strided_inputs_give_the_same_result(layout):
    """Hidden states, weight, ids and log-probs."""
    inputs, move = topk_inputs(seed=16, dtype=BFLOAT16), LAYOUTS[layout]
    hidden, head, ids, logprobs = inputs
    strided = TopkInputs(move(hidden), OutputHead(move(head.weight)), move(ids), move(logprobs))
    assert not any(t.is_contiguous() for t in (strided[0], strided[1].weight, *strided[2:]))
    expected, actual = fused(inputs, ReverseKL()), fused(strided, ReverseKL())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_ids_may_be_int32_or_int64():
    inputs = topk_inputs(seed=17)
    assert inputs.teacher_ids_N_K.dtype == torch.int64
    expected = fused(inputs, ReverseKL())
    actual = fused(inputs._replace(teacher_ids_N_K=inputs.teacher_ids_N_K.int()), ReverseKL())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("events", "storage"), [("tail", "float32"), ("renormalized", "float32"), ("truncated", "tile_relative_fp16")]
)
def test_x7_inputs_are_not_written_to(events, storage):
    """The kernels write into their own copy of the logits, at the ids and then all over it."""
    inputs = topk_inputs(seed=18, dtype=BFLOAT16, has_bias=True)
    before = converted(inputs, DEVICE)  # the same tensors
    copies = [t.clone() for t in (inputs[0], inputs[1].weight, inputs[1].bias, *inputs[2:])]
    for trained in (("hidden",), ("hidden", "weight", "bias")):
        fused(inputs, ForwardKL(), trained=trained, logits=storage, **EVENTS[events])
    for tensor, copy in zip((before[0], before[1].weight, before[1].bias, *before[2:]), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_s5_a_tied_embedding_gets_both_gradients():
    """hidden = embedding[ids], head = embedding: the gradient is the sum of the two untied ones."""
    inputs = topk_inputs(seed=19)
    weight, tokens = inputs.student_head.weight, torch.tensor([3, 3, 642], device=DEVICE)

    def gradients(embedding, head):
        output = topk_divergence(embedding[tokens], head, *inputs[2:])
        leaves = [embedding] if embedding is head else [embedding, head]
        return torch.autograd.grad(output.divergence_N, leaves, upstream_of(inputs))

    tied = weight.clone().requires_grad_()
    of_embedding, of_head = gradients(weight.clone().requires_grad_(), weight.clone().requires_grad_())
    torch.testing.assert_close(gradients(tied, tied)[0], of_embedding + of_head, rtol=1e-6, atol=1e-7)
