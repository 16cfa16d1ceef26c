"""Are the gradients of topk_divergence exact, in the ids, outside them and for the head?

python -m pytest tests/kernels/test_topk_divergence_gradients.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, pull_back, softmax

from esr_kernels.divergence import ForwardKL, ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import make_hidden_pair, make_logit_pair
from esr_kernels.topk_divergence import topk_divergence

IDS = torch.tensor([[3, 0, 8], [5, 6, 1], [2, 9, 4], [0, 1, 2]])


def student_gradient(divergence, logits, ids, logprobs, upstream=None, **options):
    """Gradient with respect to logits: an identity head turns hidden states into logits."""
    hidden = logits.clone().requires_grad_()
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    output = topk_divergence(hidden, head, ids, logprobs, divergence, impl=Impl.REFERENCE, **options)
    output.divergence_N.backward(torch.ones_like(output.divergence_N) if upstream is None else upstream)
    return hidden.grad.numpy()


@pytest.mark.parametrize("tail_bucket", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_g4_finite_differences_of_hidden_weight_and_bias(name, tail_bucket):
    """Row 2 has an empty slot."""
    x, w, _, _ = make_hidden_pair(3, 7, 3, 4, seed=1, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    ids = torch.tensor([[3, 0, 6], [5, 2, 1], [2, -1, 4]])
    logprobs = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.1, 0.6], [0.3, 0.3, 0.3]], dtype=torch.float64).log()

    def divergence_of_student(hidden, weight, bias):
        head = OutputHead(weight, bias, logit_scale=0.5, softcap=4.0)
        return topk_divergence(
            hidden,
            head,
            ids,
            logprobs,
            CASES[name].divergence,
            tail_bucket=tail_bucket,
            loss_temperature=1.5,
            impl=Impl.REFERENCE,
        ).divergence_N

    assert torch.autograd.gradcheck(divergence_of_student, [t.requires_grad_() for t in (x, w, bias)])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_g1_g6_gradient_is_the_published_formula_of_the_events(name, temperature):
    """J over the K + 1 events; an id outside gets the tail's part in proportion to p. Rows sum to 0 (N9)."""
    student, teacher = make_logit_pair(4, 10, gap=1.0, seed=2, dtype=torch.float64)
    q = softmax(teacher.numpy() / temperature)
    logprobs = torch.tensor(np.log(np.take_along_axis(q, IDS.numpy(), -1)))
    upstream = torch.tensor([1.0, -3.0, 0.0, 20.0], dtype=torch.float64)
    grad = student_gradient(CASES[name].divergence, student, IDS, logprobs, upstream, loss_temperature=temperature)
    p = softmax(student.numpy() / temperature)
    expected = np.empty_like(p)
    for row, ids in enumerate(IDS.numpy()):
        others = np.delete(np.arange(10), ids)
        p_events = np.append(p[row, ids], p[row, others].sum())
        q_events = np.append(q[row, ids], q[row, others].sum())
        of_events = pull_back(p_events, CASES[name].slope(p_events, q_events)) / temperature
        expected[row, ids] = of_events[:-1]
        expected[row, others] = of_events[-1] * p[row, others] / p_events[-1]
    expected *= upstream.numpy()[:, None]
    np.testing.assert_allclose(grad, expected, rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(grad.sum(-1), 0.0, atol=1e-13)


def test_forward_and_reverse_kl_gradients_as_in_the_docstring():
    student, teacher = make_logit_pair(1, 10, gap=1.0, seed=3, dtype=torch.float64)
    p, q = softmax(student.numpy())[0], softmax(teacher.numpy())[0]
    ids, others = [3, 0, 8], [1, 2, 4, 5, 6, 7, 9]
    logprobs = torch.tensor(np.log(q[ids]))[None]
    p_tail, q_tail = p[others].sum(), q[others].sum()

    grad = student_gradient(ForwardKL(), student, torch.tensor([ids]), logprobs)[0]
    np.testing.assert_allclose(grad[ids], p[ids] - q[ids], rtol=1e-9)
    np.testing.assert_allclose(grad[others], p[others] * (1 - q_tail / p_tail), rtol=1e-9)

    grad = student_gradient(ReverseKL(), student, torch.tensor([ids]), logprobs)[0]
    rho = np.full(10, np.log(p_tail / q_tail))
    rho[ids] = np.log(p[ids] / q[ids])
    np.testing.assert_allclose(grad, p * (rho - (p * rho).sum()), rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_without_tail_bucket_the_gradient_is_zero_outside_the_ids(name):
    student, teacher = make_logit_pair(4, 10, gap=1.0, seed=4, dtype=torch.float64)
    logprobs = torch.log_softmax(teacher, -1).gather(-1, IDS)
    grad = student_gradient(CASES[name].divergence, student, IDS, logprobs, tail_bucket=False)
    for row, ids in enumerate(IDS):
        assert (np.delete(grad[row], ids) == 0).all()
        assert (np.abs(grad[row, ids]) > 1e-12).any()
    np.testing.assert_allclose(grad.sum(-1), 0.0, atol=1e-13)


def test_the_tail_bucket_pulls_leaked_mass_back():
    """A student that agrees on the ratios inside K but holds 90 % outside: only the tail sees it."""
    student = torch.zeros(1, 4, dtype=torch.float64)
    student[0, :] = torch.tensor([0.05, 0.05, 0.45, 0.45]).log()
    logprobs = torch.tensor([[0.49, 0.49]], dtype=torch.float64).log()
    ids = torch.tensor([[0, 1]])
    with_tail = student_gradient(ForwardKL(), student, ids, logprobs)[0]
    np.testing.assert_allclose(with_tail, [0.05 - 0.49, 0.05 - 0.49, 0.44, 0.44], rtol=1e-6)
    without = student_gradient(ForwardKL(), student, ids, logprobs, tail_bucket=False)[0]
    np.testing.assert_allclose(without, np.zeros(4), atol=1e-15)
