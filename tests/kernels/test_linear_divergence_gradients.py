"""Are the gradients of hidden states, weight and bias exact, and accurate for 16-bit inputs?

python -m pytest tests/kernels/test_linear_divergence_gradients.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, pull_back, softmax

from esr_kernels.divergence import ForwardKL, ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.linear_divergence import linear_divergence
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import make_hidden_pair


@pytest.mark.parametrize("name", CASES)
def test_g4_finite_differences_of_hidden_weight_and_bias(name):
    x, w, y, u = make_hidden_pair(2, 7, 3, 5, gap=1.0, seed=1, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def divergence_of_student(hidden, weight, bias):
        head = OutputHead(weight, bias, logit_scale=0.5, softcap=4.0)
        return linear_divergence(
            hidden, head, y, u[:6], CASES[name].divergence, stop_ids=(1, 4), vocab_size=6, impl=Impl.REFERENCE
        ).divergence_N

    assert torch.autograd.gradcheck(divergence_of_student, [t.requires_grad_() for t in (x, w, bias)])


@pytest.mark.parametrize("name", CASES)
def test_g1_gradients_are_the_published_formula(name):
    """dX = dZ W, dW = dZ^T X, db = sum dZ with dZ = upstream J(dD/dp) / T."""
    x, w, y, u = make_hidden_pair(5, 19, 4, 6, gap=1.0, seed=2, dtype=torch.float64)
    bias = torch.zeros(19, dtype=torch.float64)
    for leaf in (x, w, bias):
        leaf.requires_grad_()
    upstream = torch.tensor([2.0, -1.0, 0.0, 0.3, 40.0], dtype=torch.float64)
    output = linear_divergence(
        x, OutputHead(w, bias), y, u, CASES[name].divergence, loss_temperature=2.0, impl=Impl.REFERENCE
    )
    output.divergence_N.backward(upstream)
    p, q = softmax((x @ w.T).detach().numpy() / 2), softmax((y @ u.T).numpy() / 2)
    grad_logits = upstream.numpy()[:, None] * pull_back(p, CASES[name].slope(p, q)) / 2
    close = {"rtol": 1e-9, "atol": 1e-13}
    np.testing.assert_allclose(x.grad.numpy(), grad_logits @ w.detach().numpy(), **close)
    np.testing.assert_allclose(w.grad.numpy(), grad_logits.T @ x.detach().numpy(), **close)
    np.testing.assert_allclose(bias.grad.numpy(), grad_logits.sum(0), **close)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("gap", [0.05, 0.5])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_n1_near_equal_models_in_bfloat16(name, gap):
    """Within 2e-3 of float64 on the same inputs, where rounding the logits to bf16 alone costs over ten times that."""
    x, w, y, u = make_hidden_pair(32, 500, 64, 96, gap=gap, seed=3, dtype=torch.bfloat16)
    x.requires_grad_()
    w.requires_grad_()
    linear_divergence(x, w, y, u, CASES[name].divergence, impl=Impl.REFERENCE).divergence_N.sum().backward()

    exact_x, exact_w, exact_y, exact_u = (t.detach().double().numpy() for t in (x, w, y, u))
    student_logits, teacher_logits = exact_x @ exact_w.T, exact_y @ exact_u.T
    p, q = softmax(student_logits), softmax(teacher_logits)
    grad_logits = pull_back(p, CASES[name].slope(p, q))
    assert relative_error(x.grad.double().numpy(), grad_logits @ exact_w) < 2e-3
    assert relative_error(w.grad.double().numpy(), grad_logits.T @ exact_x) < 2e-3

    p, q = (softmax(torch.tensor(z).bfloat16().double().numpy()) for z in (student_logits, teacher_logits))
    rounded = pull_back(p, CASES[name].slope(p, q))
    assert relative_error(rounded.T @ exact_x, grad_logits.T @ exact_x) > 2e-2


@pytest.mark.parametrize("frozen", [{"hidden"}, {"weight"}, {"bias"}, {"weight", "bias"}, {"hidden", "weight"}])
def test_g3_only_what_requires_grad_gets_one(frozen):
    x, w, y, u = make_hidden_pair(4, 11, 3, 5, seed=4, dtype=torch.float64)
    leaves = {"hidden": x, "weight": w, "bias": torch.ones(11, dtype=torch.float64)}

    def gradients(frozen):
        copies = {name: leaf.clone().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
        head = OutputHead(copies["weight"], copies["bias"])
        linear_divergence(copies["hidden"], head, y, u, impl=Impl.REFERENCE).divergence_N.sum().backward()
        return {name: copy.grad for name, copy in copies.items()}

    every = gradients(set())
    for name, grad in gradients(frozen).items():
        if name in frozen:
            assert grad is None
        else:
            assert torch.equal(grad, every[name])


def test_g3_no_gradient_without_grad_mode():
    x, w, y, u = make_hidden_pair(4, 11, 3, 5, seed=5)
    with torch.no_grad():
        output = linear_divergence(x.requires_grad_(), w.requires_grad_(), y, u, impl=Impl.REFERENCE)
    assert not output.divergence_N.requires_grad


def test_g2_micro_batches_accumulate_to_one_batch():
    x, w, y, u = make_hidden_pair(10, 30, 4, 6, seed=6, dtype=torch.float64)
    w.requires_grad_()
    linear_divergence(x, w, y, u, ForwardKL(), impl=Impl.REFERENCE).divergence_N.sum().backward()
    whole, w.grad = w.grad, None
    for start in range(0, 10, 4):
        rows = slice(start, start + 4)
        linear_divergence(x[rows], w, y[rows], u, ForwardKL(), impl=Impl.REFERENCE).divergence_N.sum().backward()
    torch.testing.assert_close(w.grad, whole, rtol=1e-12, atol=1e-15)


def test_s5_tied_embedding_gets_both_gradients():
    """hidden = embedding[ids], head = embedding: the gradient is the sum of the two untied ones."""
    _, w, y, u = make_hidden_pair(4, 11, 3, 5, seed=7, dtype=torch.float64)
    ids = torch.tensor([3, 3, 0, 10])
    tied = w.clone().requires_grad_()
    linear_divergence(tied[ids], tied, y, u, ReverseKL(), impl=Impl.REFERENCE).divergence_N.sum().backward()
    embedding, head = w.clone().requires_grad_(), w.clone().requires_grad_()
    linear_divergence(embedding[ids], head, y, u, ReverseKL(), impl=Impl.REFERENCE).divergence_N.sum().backward()
    torch.testing.assert_close(tied.grad, embedding.grad + head.grad, rtol=1e-13, atol=1e-16)


def test_rows_beyond_the_vocabulary_cut_get_gradient_zero():
    x, w, y, u = make_hidden_pair(4, 11, 3, 5, seed=8)
    w.requires_grad_()
    linear_divergence(x, w, y, u[:9], vocab_size=9, impl=Impl.REFERENCE).divergence_N.sum().backward()
    assert (w.grad[9:] == 0).all() and (w.grad[:9] != 0).all()


def test_infinite_rows_leave_the_other_rows_gradients_alone():
    """A bias of -inf makes reverse KL infinite; masked on the student's side too, it does not matter."""
    x, w, y, u = make_hidden_pair(4, 11, 3, 5, seed=9, dtype=torch.float64)
    bias = torch.zeros(11, dtype=torch.float64)
    bias[4] = -torch.inf
    w.requires_grad_()
    output = linear_divergence(x, w, y, OutputHead(u, bias), impl=Impl.REFERENCE)
    output.divergence_N.sum().backward()
    assert output.divergence_N.isposinf().all() and (w.grad == 0).all()
    w.grad = None
    output = linear_divergence(x, OutputHead(w, bias), y, OutputHead(u, bias), impl=Impl.REFERENCE)
    output.divergence_N.sum().backward()
    assert output.divergence_N.isfinite().all() and w.grad.isfinite().all()
    assert (w.grad[4] == 0).all() and (w.grad[5] != 0).all()


def test_n8_a_nan_hidden_state_poisons_only_its_rows_hidden_gradient():
    x, w, y, u = make_hidden_pair(3, 11, 3, 5, seed=10)
    clean = x.clone().requires_grad_()
    linear_divergence(clean, w, y, u, impl=Impl.REFERENCE).divergence_N.sum().backward()
    x[1, 0] = torch.nan
    x.requires_grad_()
    linear_divergence(x, w, y, u, impl=Impl.REFERENCE).divergence_N.sum().backward()
    assert x.grad[1].isnan().all()
    assert torch.equal(x.grad[::2], clean.grad[::2])
