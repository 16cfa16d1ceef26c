"""Is linear_divergence under FUSED within the error budget, for every divergence, dtype, storage, shape and head?

python -m pytest tests/kernels/test_fused_linear_divergence.py
"""

import math
from dataclasses import replace

import pytest
import torch

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, LogitStorage, OutputHead, ReverseKL, linear_divergence
from esr_kernels.testing.cases import DIVERGENCES, ONE_OF_EACH_CLASS, SMALL_SHAPES, Shape
from esr_kernels.testing.error_budget import check_linear_divergence, relative_error_in_norm
from esr_kernels.testing.inputs import LinearInputs, LogitPair, make_linear_inputs, make_upstream
from esr_kernels.testing.oracle import (
    converted,
    evaluate_linear_divergence,
    evaluate_token_divergence,
    linear_divergence_oracle,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SMALL = Shape(rows=4, vocab_size=643, student_size=24, teacher_size=40)
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def linear_inputs(shape: Shape, **options) -> LinearInputs:
    return converted(make_linear_inputs(shape, **options), DEVICE)


def upstream_of(inputs: LinearInputs, seed: int = 0) -> torch.Tensor:
    return make_upstream(len(inputs.student_hidden_N_D), seed=seed, device=DEVICE)


def fused(inputs: LinearInputs, divergence=ReverseKL(), **options):  # noqa: B008 (a frozen value)
    return evaluate_linear_divergence(inputs, divergence, upstream_of(inputs), impl=Impl.FUSED, **options)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_in_bfloat16(name):
    """With everything that an op and a head can have, all at once.

    Alpha far outside [0, 1] weighs ids by a power of q / p: 11 bits of a logit in the tail are 1e-3 of its gradient.
    """
    inputs = linear_inputs(SMALL, gap=0.5, seed=1, dtype=BFLOAT16, has_bias=True, logit_scale=0.8, softcap=7.0)
    ids = torch.tensor([5, 642, -100, 7], device=DEVICE)
    options = {"token_ids_N": ids, "stop_ids": (0, 5, 300), "loss_temperature": 0.7}
    storage = LogitStorage.FLOAT32 if name in ("alpha_2", "alpha_-1.5") else LogitStorage.TILE_RELATIVE_FP16
    check_linear_divergence(inputs, DIVERGENCES[name], upstream_of(inputs), logits=storage, **options)


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (FLOAT32, LogitStorage.FLOAT32),
        (FLOAT32, LogitStorage.TILE_RELATIVE_FP16),
        (FLOAT16, LogitStorage.TILE_RELATIVE_FP16),
        (BFLOAT16, LogitStorage.FLOAT32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_every_class_dtype_and_storage(name, dtype, storage):
    inputs = linear_inputs(SMALL, gap=0.5, seed=2, dtype=dtype)
    if dtype == FLOAT32 and storage == LogitStorage.TILE_RELATIVE_FP16:
        check_float32_inputs_stored_tile_relative(inputs, DIVERGENCES[name])
    else:
        check_linear_divergence(inputs, DIVERGENCES[name], upstream_of(inputs), logits=storage)


def check_float32_inputs_stored_tile_relative(inputs: LinearInputs, divergence) -> None:
    """The caller asks for 11 bits of the distance to the tile's maximum: 16-bit bars hold, float32 ones cannot."""
    actual = fused(inputs, divergence, logits=LogitStorage.TILE_RELATIVE_FP16)
    oracle = linear_divergence_oracle(inputs, divergence, upstream_of(inputs)).values
    for name in ("grad_student_hidden", "grad_student_weight"):
        assert relative_error_in_norm(actual[name], oracle[name]) < 2e-3, name
    torch.testing.assert_close(actual["divergence"].double(), oracle["divergence"], rtol=1e-3, atol=1e-6)


@every_storage
@pytest.mark.parametrize("gap", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_n1_near_equal_models_where_16_bit_logits_fail(name, dtype, gap, storage):
    """KL of 5e-4 and 0.05 nats: dX and dW within 2e-3 of float64, while PyTorch on 16-bit logits is far outside.

    The second half is how peers compute: one matrix product with 16-bit output, the loss in float32.
    """
    shape = Shape(rows=8, vocab_size=1000, student_size=64, teacher_size=96)
    inputs, divergence = linear_inputs(shape, gap=gap, seed=3, dtype=dtype), DIVERGENCES[name]
    actual = check_linear_divergence(inputs, divergence, upstream_of(inputs), logits=storage)
    oracle = linear_divergence_oracle(inputs, divergence, upstream_of(inputs)).values
    assert oracle["divergence"].mean() < (0.002 if gap == 0.05 else 0.2)

    rounded = gradients_from_logits_rounded_to(dtype, inputs, divergence)
    far_outside = {(0.05, BFLOAT16): 0.4, (0.05, FLOAT16): 0.04, (0.5, BFLOAT16): 0.04, (0.5, FLOAT16): 0.004}
    for gradient in ("grad_student_hidden", "grad_student_weight"):
        assert relative_error_in_norm(actual[gradient], oracle[gradient]) <= 2e-3
        assert relative_error_in_norm(rounded[gradient], oracle[gradient]) > far_outside[gap, dtype]


def gradients_from_logits_rounded_to(dtype, inputs: LinearInputs, divergence) -> dict[str, torch.Tensor]:
    exact = converted(inputs, torch.float64)
    hidden, weight = exact.student_hidden_N_D, exact.student_head.weight
    student = (hidden @ weight.T).to(dtype).float()
    teacher = (exact.teacher_hidden_N_E @ exact.teacher_head.weight.T).to(dtype).float()
    results = evaluate_token_divergence(
        LogitPair(student, teacher), divergence, upstream_of(inputs), impl=Impl.REFERENCE
    )
    gradient = results["grad_student_logits"].double()
    return {"grad_student_hidden": gradient @ weight, "grad_student_weight": gradient.T @ hidden}


@every_storage
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_s1_s3_shapes(name, storage):
    """V aligned to nothing, D and E not multiples of 8, one row, no row; several tiles of a program."""
    shape = replace(SMALL_SHAPES[name], rows=min(SMALL_SHAPES[name].rows, 9))
    inputs = linear_inputs(shape, gap=0.5, seed=4, dtype=BFLOAT16, has_bias=True)
    results = check_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), logits=storage)
    assert results["grad_student_weight"].shape == (shape.vocab_size, shape.student_size)
    if shape.rows == 0:
        assert (results["grad_student_weight"] == 0).all() and (results["grad_student_bias"] == 0).all()


HEADS = {
    "bias": {"has_bias": True},
    "logit scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 2.0},
    "bias, softcap and scale": {"has_bias": True, "softcap": 5.0, "logit_scale": 1.5},
}


@every_storage
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_s5_heads(head, dtype, storage):
    if dtype == FLOAT32:
        storage = LogitStorage.FLOAT32 if storage == LogitStorage.TILE_RELATIVE_FP16 else LogitStorage.AUTO
    inputs = linear_inputs(SMALL, gap=0.5, seed=5, dtype=dtype, **HEADS[head])
    check_linear_divergence(inputs, GeneralizedJSD(0.3), upstream_of(inputs), logits=storage, loss_temperature=1.3)


def test_s5_the_two_sides_may_differ_in_everything():
    """Hidden size, dtype, bias, scale, soft cap: a bfloat16 student with a bias, a float16 teacher with a soft cap."""
    student = linear_inputs(SMALL, seed=6, dtype=BFLOAT16, has_bias=True, logit_scale=0.5)
    teacher = linear_inputs(SMALL, seed=6, dtype=FLOAT16, softcap=6.0)
    inputs = LinearInputs(*student[:2], *teacher[2:])
    results = check_linear_divergence(inputs, ReverseKL(), upstream_of(inputs))
    assert {results[f"grad_student_{name}"].dtype for name in ("hidden", "weight", "bias")} == {BFLOAT16}


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)], ids=str)
def test_hidden_states_and_head_may_differ_in_dtype(hidden_dtype, weight_dtype):
    """As under autocast, or with a float32 master head. Each gradient has the dtype of its own tensor."""
    inputs = linear_inputs(SMALL, seed=7, dtype=BFLOAT16)
    head = OutputHead(inputs.student_head.weight.to(weight_dtype))
    inputs = inputs._replace(student_hidden_N_D=inputs.student_hidden_N_D.to(hidden_dtype), student_head=head)
    actual = fused(inputs)
    oracle = linear_divergence_oracle(inputs, ReverseKL(), upstream_of(inputs)).values
    for name, dtype in (("grad_student_hidden", hidden_dtype), ("grad_student_weight", weight_dtype)):
        assert actual[name].dtype == dtype
        assert relative_error_in_norm(actual[name], oracle[name]) < 2e-3, name
    torch.testing.assert_close(actual["divergence"].double(), oracle["divergence"], rtol=1e-5, atol=2e-6)


def test_s5_a_tied_embedding_gets_both_gradients():
    """hidden = embedding[ids], head = embedding: the gradient is the sum of the two untied ones."""
    inputs = linear_inputs(SMALL, seed=8)
    weight, ids = inputs.student_head.weight, torch.tensor([3, 3, 0, 642], device=DEVICE)

    def gradients(embedding, head):
        output = linear_divergence(embedding[ids], head, inputs.teacher_hidden_N_E, inputs.teacher_head)
        leaves = [embedding] if embedding is head else [embedding, head]
        return torch.autograd.grad(output.divergence_N, leaves, upstream_of(inputs))

    tied = weight.clone().requires_grad_()
    of_embedding, of_head = gradients(weight.clone().requires_grad_(), weight.clone().requires_grad_())
    torch.testing.assert_close(gradients(tied, tied)[0], of_embedding + of_head, rtol=1e-6, atol=1e-7)


@every_storage
@pytest.mark.parametrize("teacher_vocab_size", [500, 643])
def test_s4_unequal_vocabularies_meet_at_their_intersection(teacher_vocab_size, storage):
    """Rows of the heads beyond the cut are not projected (they hold NaN) and get gradient exactly 0."""
    inputs = linear_inputs(SMALL, seed=9, dtype=BFLOAT16, has_bias=True)
    student, teacher = inputs.student_head, inputs.teacher_head
    cut = inputs._replace(
        student_head=OutputHead(student.weight[:500].clone(), student.bias[:500].clone()),
        teacher_head=OutputHead(teacher.weight[:500].clone(), teacher.bias[:500].clone()),
    )
    for tensor in (student.weight, student.bias, teacher.weight, teacher.bias):
        tensor[500:] = NAN
    whole = inputs._replace(
        teacher_head=OutputHead(teacher.weight[:teacher_vocab_size], teacher.bias[:teacher_vocab_size])
    )
    expected = fused(cut, ForwardKL(), logits=storage)
    actual = fused(whole, ForwardKL(), logits=storage, vocab_size=500)
    for name in ("grad_student_weight", "grad_student_bias"):
        assert (actual[name][500:] == 0).all()
        actual[name] = actual[name][:500]
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7, equal_nan=True)


LAYOUTS = {
    "rows of a wider tensor": lambda x: torch.cat([x.new_full((len(x), 3), NAN), x, x], dim=1)[:, 3 : 3 + x.shape[1]],
    "every second row": lambda x: torch.stack([x, x.new_full(x.shape, NAN)], dim=1).flatten(0, 1)[::2],
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_s2_strided_inputs_give_the_same_result(layout):
    inputs = linear_inputs(SMALL, seed=10, dtype=BFLOAT16)
    move = LAYOUTS[layout]
    strided = LinearInputs(
        move(inputs.student_hidden_N_D),
        OutputHead(move(inputs.student_head.weight)),
        move(inputs.teacher_hidden_N_E),
        OutputHead(move(inputs.teacher_head.weight)),
    )
    assert not strided.student_hidden_N_D.is_contiguous() and not strided.student_head.weight.is_contiguous()
    expected, actual = fused(inputs), fused(strided)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_x7_inputs_are_not_written_to():
    inputs = linear_inputs(SMALL, seed=11, dtype=BFLOAT16, has_bias=True)
    tensors = [inputs.student_hidden_N_D, inputs.teacher_hidden_N_E]
    for head in (inputs.student_head, inputs.teacher_head):
        tensors += [head.weight, head.bias]
    before = [tensor.clone() for tensor in tensors]
    for storage in LogitStorage:
        fused(inputs, GeneralizedJSD(0.5), logits=storage, stop_ids=(3, 9))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_g6_equals_the_token_divergence_of_the_projected_logits():
    """One definition for both ops: temperature, stop event and cut mean the same."""
    inputs = linear_inputs(SMALL, seed=12, has_bias=True, softcap=8.0)
    options = {"loss_temperature": 2.0, "stop_ids": (1, 2), "vocab_size": 600}
    student, teacher = inputs.student_head, inputs.teacher_head
    logits = LogitPair(student.logits(inputs.student_hidden_N_D), teacher.logits(inputs.teacher_hidden_N_E))
    of_logits = evaluate_token_divergence(logits, ReverseKL(), upstream_of(inputs), impl=Impl.REFERENCE, **options)
    of_hidden = fused(inputs, **options)
    for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement"):
        torch.testing.assert_close(of_hidden[name], of_logits[name], rtol=1e-5, atol=2e-6)
