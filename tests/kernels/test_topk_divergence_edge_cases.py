"""Are empty slots, vanishing tails, masked rows and rounded log-probabilities defined in value and gradient?

python -m pytest tests/kernels/test_topk_divergence_edge_cases.py
"""

import math

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, softmax

from esr_kernels.divergence import AlphaDivergence, ForwardKL, GeneralizedJSD, ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import make_hidden_pair, make_logit_pair
from esr_kernels.topk_divergence import topk_divergence

INF, NAN = math.inf, math.nan
every_divergence = pytest.mark.parametrize("name", CASES)
both_modes = pytest.mark.parametrize("tail_bucket", [True, False])
every_events = pytest.mark.parametrize(
    "events",
    [{}, {"tail_bucket": False}, {"tail_bucket": False, "renormalize": False}],
    ids=["tail", "renormalized", "truncated"],
)
three_divergences = pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.5)], ids=repr)


def run(logits, ids, logprobs, divergence, **options):
    """Output and gradient with respect to the logits, through an identity head."""
    hidden = logits.clone().requires_grad_()
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    output = topk_divergence(hidden, head, ids, logprobs, divergence, impl=Impl.REFERENCE, **options)
    output.divergence_N.sum().backward()
    return output, hidden.grad


@both_modes
@every_divergence
def test_empty_slots_are_no_events(name, tail_bucket):
    """Whatever their log-probability: NaN, a real one, -inf. The last id of the vocabulary must not be mistaken."""
    student, teacher = make_logit_pair(3, 10, gap=1.0, seed=1, dtype=torch.float64)
    ids = torch.tensor([[2, 9], [0, 5], [7, 1]])
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids)
    expected, expected_grad = run(student, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket)
    empty = torch.full((3, 1), -1)
    padded_ids = torch.cat([empty, ids[:, :1], empty, ids[:, 1:], empty], dim=-1)
    ignored = [torch.full((3, 1), value, dtype=torch.float64) for value in (NAN, -0.5, -INF)]
    padded = torch.cat([ignored[0], logprobs[:, :1], ignored[1], logprobs[:, 1:], ignored[2]], dim=-1)
    output, grad = run(student, padded_ids, padded, CASES[name].divergence, tail_bucket=tail_bucket)
    assert output.divergence_N.min() > 0
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-15, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


@both_modes
@every_divergence
def test_s3_rows_with_only_empty_slots_are_zero(name, tail_bucket):
    student, teacher = make_logit_pair(3, 10, gap=1.0, seed=2)
    ids = torch.tensor([[2, 9], [-1, -1], [7, 1]])
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids.clamp(min=0))
    output, grad = run(student, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket)
    assert [field[1].item() for field in output[:3]] == [0.0, 0.0, 0.0] and output.top1_agreement_N[1] == 0.0
    assert (grad[1] == 0).all()
    assert (output.divergence_N[::2] > 0).all() and (grad[::2] != 0).any(-1).all()


@both_modes
@every_divergence
def test_s3_a_fully_masked_student_is_zero(name, tail_bucket):
    """Through a bias of -inf at every id."""
    hidden, weight, _, _ = make_hidden_pair(3, 10, 4, 5, seed=2)
    hidden.requires_grad_()
    head = OutputHead(weight.requires_grad_(), bias=torch.full((10,), -INF))
    ids, logprobs = torch.tensor([[2, 9]]).expand(3, -1), torch.full((3, 2), -1.0)
    output = topk_divergence(
        hidden, head, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket, impl=Impl.REFERENCE
    )
    output.divergence_N.sum().backward()
    for field in (*output[:3], output.top1_agreement_N):
        assert field.tolist() == [0.0, 0.0, 0.0]
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@both_modes
@every_divergence
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_s3_any_number_of_rows(name, rows, tail_bucket):
    student, teacher = make_logit_pair(rows, 10, seed=3)
    ids = torch.arange(4).expand(rows, -1)
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids)
    output, grad = run(student, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket)
    assert all(field.shape == (rows,) for field in output)
    assert grad.shape == (rows, 10) and grad.isfinite().all() and (output.divergence_N > 0).all()


@every_divergence
@pytest.mark.parametrize("total", [1.0, 1.0 + 2e-7, 1.01])
def test_log_probabilities_that_sum_to_one_or_more_still_give_a_proper_divergence(name, total):
    """Served log-probs are rounded: the teacher's tail is then 2^-23, and its events are renormalised."""
    given = np.array([0.6, 0.3, 0.1])
    logprobs = torch.tensor(np.log(total * given), dtype=torch.float32)[None]
    student, _ = make_logit_pair(1, 8, seed=4)
    output, grad = run(student, torch.tensor([[4, 1, 6]]), logprobs, CASES[name].divergence)
    p = softmax(student.double().numpy())[:, [4, 1, 6]]
    p = np.append(p, 1 - p.sum(-1, keepdims=True), axis=-1)
    q = np.append(total * given, 2.0**-23)[None]
    expected = CASES[name].value(p, q / q.sum())
    np.testing.assert_allclose(output.divergence_N.detach().numpy(), expected, rtol=2e-5)
    assert grad.isfinite().all()


@every_divergence
def test_a_student_equal_to_a_rounded_teacher_has_divergence_zero(name):
    """In bfloat16 the log-probs are off by up to 0.4 %; renormalised, the divergence is small and not negative."""
    student, _ = make_logit_pair(32, 50, seed=5)
    top = torch.log_softmax(student, -1).topk(8, dim=-1)
    output, _ = run(student, top.indices, top.values.bfloat16(), CASES[name].divergence)
    assert output.divergence_N.min() > -2e-7
    assert output.divergence_N.max() < (2e-2 if name == "total_variation" else 2e-4)


def test_the_students_tail_is_exact_where_one_minus_the_sum_would_cancel():
    """P_tail = 2e-12: 1 - sum(p) would be 0 in float32."""
    student = torch.tensor([[30.0, 29.0, 2.0, 2.0, 1.0]])
    logprobs = torch.tensor([[0.5, 0.4]]).log()
    output, grad = run(student, torch.tensor([[0, 1]]), logprobs, ForwardKL())
    p = softmax(student.double().numpy())[0]
    expected = 0.5 * np.log(0.5 / p[0]) + 0.4 * np.log(0.4 / p[1]) + 0.1 * np.log(0.1 / p[2:].sum())
    assert output.divergence_N.item() == pytest.approx(expected, rel=1e-6)
    expected_grad = -0.1 * p[2:] / p[2:].sum() + p[2:]
    np.testing.assert_allclose(grad[0, 2:].numpy(), expected_grad, rtol=1e-5)


def test_a_small_teacher_tail_keeps_its_digits():
    """Q_tail = 1e-5 from log-probs in float32: half an ulp of the sum is 3e-8 of 1, so 0.3 % of the tail at most."""
    given = np.array([0.7, 0.3 - 1e-5])
    student = torch.zeros(1, 4)
    logprobs = torch.tensor(np.log(given), dtype=torch.float32)[None]
    output, _ = run(student, torch.tensor([[0, 1]]), logprobs, ReverseKL())
    expected = 0.25 * np.log(0.25 / given).sum() + 0.5 * np.log(0.5 / 1e-5)
    assert output.divergence_N.item() == pytest.approx(expected, abs=0.5 * 0.02)


def test_a_teacher_that_gives_no_mass_to_the_ids_has_all_of_it_in_the_tail():
    """Forward KL is then -log P_tail, and reverse KL infinite with gradient 0; renormalised, nothing is left to compare."""
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    ids, logprobs = torch.tensor([[0, 3]]), torch.full((1, 2), -INF)
    output, grad = run(student, ids, logprobs, ForwardKL())
    assert output.divergence_N.item() == pytest.approx(-math.log(0.4), rel=1e-6)
    np.testing.assert_allclose(grad[0].numpy(), [0.5, 0.2 - 0.5, 0.2 - 0.5, 0.1], rtol=1e-5)
    output, grad = run(student, ids, logprobs, ReverseKL())
    assert output.divergence_N.item() == INF and (grad == 0).all()
    output, grad = run(student, ids, logprobs, ReverseKL(), tail_bucket=False)
    assert output.divergence_N.item() == 0.0 and (grad == 0).all()


@both_modes
def test_n2_ids_impossible_for_the_student(tail_bucket):
    """Through a head whose bias is -inf: forward KL infinite with gradient 0, alpha = 0.5 finite, others untouched."""
    student, teacher = make_logit_pair(2, 6, gap=1.0, seed=6)
    bias = torch.zeros(6)
    bias[4] = -INF
    ids = torch.tensor([[4, 1, 2], [0, 1, 2]])
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids)
    for divergence, first_is_infinite in [(ForwardKL(), True), (ReverseKL(), False), (AlphaDivergence(0.5), False)]:
        hidden = student.clone().requires_grad_()
        head = OutputHead(torch.eye(6), bias)
        output = topk_divergence(hidden, head, ids, logprobs, divergence, tail_bucket=tail_bucket, impl=Impl.REFERENCE)
        output.divergence_N.sum().backward()
        assert output.divergence_N.isposinf().tolist() == [first_is_infinite, False]
        assert output.divergence_N.min() > 0
        assert (hidden.grad[0] == 0).all().item() == first_is_infinite
        assert hidden.grad.isfinite().all() and (hidden.grad[1] != 0).any()


@both_modes
@pytest.mark.parametrize("foreign", [10, 151936, -2, -100])
def test_ids_outside_the_vocabulary_make_their_row_nan(foreign, tail_bucket):
    student, teacher = make_logit_pair(3, 10, gap=1.0, seed=7)
    ids = torch.tensor([[2, 9, 4], [0, 5, 1], [7, 1, 3]])
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids)
    expected, expected_grad = run(student, ids, logprobs, ForwardKL(), tail_bucket=tail_bucket)
    ids[1, 2] = foreign
    output, grad = run(student, ids, logprobs, ForwardKL(), tail_bucket=tail_bucket)
    assert output.divergence_N[1].isnan() and output.top1_agreement_N[1].isnan()
    assert torch.equal(output.divergence_N[::2], expected.divergence_N[::2])
    assert torch.equal(grad[::2], expected_grad[::2])


@both_modes
@every_divergence
def test_n8_a_nan_log_probability_poisons_only_its_row(name, tail_bucket):
    student, teacher = make_logit_pair(3, 10, gap=1.0, seed=8)
    ids = torch.tensor([[2, 9, 4], [0, 5, 1], [7, 1, 3]])
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids)
    expected, expected_grad = run(student, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket)
    logprobs[1, 0] = NAN
    output, grad = run(student, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket)
    assert output.divergence_N.isnan().tolist() == [False, True, False]
    assert torch.equal(output.divergence_N[::2], expected.divergence_N[::2])
    assert torch.equal(grad[::2], expected_grad[::2])


@every_events
@three_divergences
def test_a_repeated_id_counts_once_by_its_first_slot(divergence, events):
    """Whatever the later slots' log-probs: as if they were empty, in value, statistics and gradient."""
    student, teacher = make_logit_pair(3, 10, gap=1.0, seed=9, dtype=torch.float64)
    ids = torch.tensor([[2, 9, 4, 2, 2], [0, 5, 5, 1, 0], [7, 1, 3, 6, 3]])
    later = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    logprobs = torch.log_softmax(teacher, -1).gather(-1, ids)
    expected, expected_grad = run(student, ids.masked_fill(later, -1), logprobs, divergence, **events)
    for ignored in (-0.01, -INF, NAN):
        output, grad = run(student, ids, logprobs.masked_fill(later, ignored), divergence, **events)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(grad, expected_grad)
    assert (expected_grad != 0).any(-1).all()


def test_repeats_by_hand():
    """p = (.4, .3, .2, .1); ids 1, 1, 0 with q = .5, .2, .1: the events are 1, 0 and a tail of .3 against .4."""
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    logprobs = torch.tensor([[0.5, 0.2, 0.1]], dtype=torch.float64).log()
    output, grad = run(student, torch.tensor([[1, 1, 0]]), logprobs, ForwardKL())
    expected = 0.5 * math.log(0.5 / 0.3) + 0.1 * math.log(0.1 / 0.4) + 0.4 * math.log(0.4 / 0.3)
    assert output.divergence_N.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(grad[0], [0.4 - 0.1, 0.3 - 0.5, 0.2 - 0.4 * 2 / 3, 0.1 - 0.4 / 3], rtol=1e-10)


@every_events
@three_divergences
def test_a_row_of_nothing_but_foreign_ids_is_nan(divergence, events):
    student, _ = make_logit_pair(2, 9, seed=10)
    ids = torch.tensor([[9, -2, -1], [0, 1, 2]])
    output, _ = run(student, ids, torch.full((2, 3), -2.0), divergence, **events)
    assert output.divergence_N.isnan().tolist() == output.top1_agreement_N.isnan().tolist() == [True, False]


@every_events
@pytest.mark.parametrize("offset", [2.0**20, 1e4, -1e4])
def test_n4_a_common_offset_changes_nothing(offset, events):
    """Even integers stay exact in float32 after adding it; so should their sums, relative to the largest of them."""
    student = 2.0 * torch.randint(-4, 5, (3, 150), generator=torch.Generator().manual_seed(11))
    ids, logprobs = torch.tensor([[3, 149, 80]] * 3), torch.tensor([[0.3, 0.2, 0.1]] * 3).log()
    expected, expected_grad = run(student, ids, logprobs, ReverseKL(), **events)
    output, grad = run(student + offset, ids, logprobs, ReverseKL(), **events)
    for actual, plain in zip((*output, grad), (*expected, expected_grad), strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=2e-6, equal_nan=True)
