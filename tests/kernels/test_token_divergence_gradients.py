"""Is the gradient with respect to the student's logits exact, for every divergence and upstream gradient?

python -m pytest tests/kernels/test_token_divergence_gradients.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, pull_back, softmax

from esr_kernels.divergence import ForwardKL, ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.token_divergence import token_divergence


def value_of(name, teacher, **options):
    def divergence_of_student(student):
        return token_divergence(student, teacher, CASES[name].divergence, impl=Impl.REFERENCE, **options).divergence_N

    return divergence_of_student


@pytest.mark.parametrize("name", CASES)
def test_g4_finite_differences(name):
    student, teacher = make_logit_pair(3, 7, gap=1.0, seed=1, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(value_of(name, teacher), student)
    assert torch.autograd.gradcheck(value_of(name, teacher, loss_temperature=2.5, stop_ids=(1, 4, 6)), student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", CASES)
def test_g1_g6_gradient_is_the_published_formula(name, temperature):
    """upstream * J(dD/dp) / T: one factor 1/T, no T^2."""
    student, teacher = make_logit_pair(6, 21, gap=1.0, seed=2, dtype=torch.float64)
    upstream = torch.tensor([1.0, -2.0, 0.0, 1e-3, 7.5, 100.0], dtype=torch.float64)
    student.requires_grad_()
    value_of(name, teacher, loss_temperature=temperature)(student).backward(upstream)
    p, q = softmax(student.detach().numpy() / temperature), softmax(teacher.numpy() / temperature)
    expected = upstream.numpy()[:, None] * pull_back(p, CASES[name].slope(p, q)) / temperature
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-13)


def test_forward_kl_gradient_is_p_minus_q():
    student, teacher = make_logit_pair(4, 12, seed=3, dtype=torch.float64)
    student.requires_grad_()
    value_of("forward_kl", teacher)(student).sum().backward()
    np.testing.assert_allclose(
        student.grad.numpy(), softmax(student.detach().numpy()) - softmax(teacher.numpy()), rtol=1e-10, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_n9_gradient_rows_sum_to_zero(name, dtype):
    student, teacher = make_logit_pair(16, 1009, gap=0.5, seed=4, dtype=dtype)
    student.requires_grad_()
    value_of(name, teacher, stop_ids=(3, 500))(student).sum().backward()
    size = student.grad.abs().sum(-1)
    assert (size > 0).all()
    assert (student.grad.sum(-1).abs() <= 20 * torch.finfo(dtype).eps * (1 + size)).all()


def test_g2_second_backward_and_micro_batches():
    student, teacher = make_logit_pair(8, 40, seed=5, dtype=torch.float64)
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64)
    student.requires_grad_()
    loss = (weights * value_of("reverse_kl", teacher)(student)).sum()
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)
    for start in range(0, 8, 3):
        rows = slice(start, start + 3)
        (weights[rows] * value_of("reverse_kl", teacher[rows])(student[rows])).sum().backward()
    torch.testing.assert_close(student.grad, first, rtol=1e-13, atol=1e-16)


def test_second_derivative_of_forward_kl_is_the_softmax_hessian():
    """diag(p) - p p^T: the reference is differentiable twice."""
    student, teacher = make_logit_pair(1, 6, seed=6, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda z: value_of("forward_kl", teacher)(z).sum(), student)
    p = softmax(student.numpy())[0]
    np.testing.assert_allclose(hessian[0, :, 0].numpy(), np.diag(p) - np.outer(p, p), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_has_the_dtype_of_the_logits(dtype):
    student, teacher = make_logit_pair(3, 11, seed=7, dtype=dtype)
    student.requires_grad_()
    value_of("forward_kl", teacher)(student).sum().backward()
    expected = softmax(student.detach().double().numpy()) - softmax(teacher.double().numpy())
    assert student.grad.dtype == dtype
    # One rounding of the result to its dtype: half a unit in the last place, relative, plus float32 arithmetic.
    np.testing.assert_allclose(student.grad.double().numpy(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=3e-7)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=repr)
@pytest.mark.parametrize(
    ("dtype", "remainder"),
    [(torch.float32, 0.1), (torch.float32, 1e-2), (torch.float32, 1e-4), (torch.float64, 1e-7)],
)
def test_n5_confident_rows_keep_the_true_class_gradient(divergence, dtype, remainder):
    """p = 1 - remainder at one id, q = 1 - 3 remainder: the gradient there is within 1 %.

    A plain float32 softmax has an absolute error near 1e-7 there, hence float64 for the last case.
    """
    vocab_size = 64
    student, teacher = np.zeros((1, vocab_size)), np.zeros((1, vocab_size))
    student[0, 5] = np.log((1 - remainder) / remainder * (vocab_size - 1))
    teacher[0, 5] = np.log((1 - 3 * remainder) / (3 * remainder) * (vocab_size - 1))
    logits = torch.tensor(student, dtype=dtype, requires_grad=True)
    teacher_logits = torch.tensor(teacher, dtype=dtype)
    token_divergence(logits, teacher_logits, divergence, impl=Impl.REFERENCE).divergence_N.sum().backward()
    case = CASES["forward_kl" if divergence == ForwardKL() else "reverse_kl"]
    p, q = softmax(logits.detach().double().numpy()), softmax(teacher_logits.double().numpy())
    expected = pull_back(p, case.slope(p, q))[0, 5]
    assert logits.grad[0, 5].item() == pytest.approx(expected, rel=0.01)
