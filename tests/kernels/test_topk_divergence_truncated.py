"""Is topk_divergence without tail and without renormalisation the sum of the ids' terms, in value and gradient?

python -m pytest tests/kernels/test_topk_divergence_truncated.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import softmax

from esr_kernels.divergence import AlphaDivergence, ForwardKL, GeneralizedJSD, ReverseKL, SkewForwardKL, SkewReverseKL
from esr_kernels.impl import Impl
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.topk_divergence import topk_divergence

VOCAB = 10
IDS = torch.tensor([[3, 0, 8], [5, 6, 1], [2, 9, 4], [0, 1, 2]])
UPSTREAM = torch.tensor([1.0, -3.0, 0.0, 20.0], dtype=torch.float64)
TRUNCATED = {"tail_bucket": False, "renormalize": False}


def make(rows: int = 4, seed: int = 1, temperature: float = 1.0):
    """Student logits; both distributions in full; the teacher's log-probs at IDS."""
    student, teacher = make_logit_pair(rows, VOCAB, gap=1.0, seed=seed, dtype=torch.float64)
    p, q = (softmax(logits.numpy() / temperature) for logits in (student, teacher))
    return student, p, q, torch.tensor(np.log(np.take_along_axis(q, IDS[:rows].numpy(), -1)))


def run(student, logprobs, divergence, ids=IDS, upstream=UPSTREAM, **options):
    """Output and gradient with respect to logits: an identity head turns hidden states into them."""
    hidden = student.clone().requires_grad_()
    head = torch.eye(student.shape[1], dtype=student.dtype)
    output = topk_divergence(
        hidden, head, ids[: len(student)], logprobs, divergence, impl=Impl.REFERENCE, **TRUNCATED, **options
    )
    output.divergence_N.backward(upstream[: len(student)].to(output.divergence_N.dtype))
    return output, hidden.grad.numpy()


def is_id(ids=IDS) -> np.ndarray:
    """1_S as (rows, V)."""
    return np.array([[v in row for v in range(VOCAB)] for row in ids.tolist()], dtype=np.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [ForwardKL(), GeneralizedJSD(0.0), AlphaDivergence(1.0)], ids=repr)
def test_forward_kl(divergence, temperature):
    """sum over S of q log(q / p), with d/dz = p Q_S - 1_S q; p and q are those of the full vocabulary."""
    student, p, q, logprobs = make(temperature=temperature)
    output, gradient = run(student, logprobs, divergence, loss_temperature=temperature)
    np.testing.assert_allclose(output.divergence_N.detach(), (is_id() * q * np.log(q / p)).sum(-1), rtol=1e-10)
    expected = p * (is_id() * q).sum(-1, keepdims=True) - is_id() * q
    np.testing.assert_allclose(gradient, UPSTREAM.numpy()[:, None] * expected / temperature, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [ReverseKL(), GeneralizedJSD(1.0), SkewReverseKL(0.0)], ids=repr)
def test_reverse_kl(divergence, temperature):
    """sum over S of p log(p / q), with d/dz = 1_S p (log(p / q) + 1) - p sum over S of p (log(p / q) + 1)."""
    student, p, q, logprobs = make(seed=2, temperature=temperature)
    output, gradient = run(student, logprobs, divergence, loss_temperature=temperature)
    np.testing.assert_allclose(output.divergence_N.detach(), (is_id() * p * np.log(p / q)).sum(-1), rtol=1e-10)
    cost = is_id() * p * (np.log(p / q) + 1)
    expected = cost - p * cost.sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, UPSTREAM.numpy()[:, None] * expected / temperature, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_by_finite_differences(beta):
    """sum over S of beta q log(q / m) + (1 - beta) p log(p / m); its gradient by central differences of the formula."""
    student, p, q, logprobs = make(seed=3)

    def value(logits: np.ndarray) -> np.ndarray:
        p = softmax(logits)
        m = beta * q + (1 - beta) * p
        return (is_id() * (beta * q * np.log(q / m) + (1 - beta) * p * np.log(p / m))).sum(-1)

    output, gradient = run(student, logprobs, GeneralizedJSD(beta))
    np.testing.assert_allclose(output.divergence_N.detach(), value(student.numpy()), rtol=1e-10)
    step = 1e-5  # error of a central difference: step^2, and eps / step
    columns = np.eye(VOCAB) * step
    expected = [(value(student.numpy() + column) - value(student.numpy() - column)) / (2 * step) for column in columns]
    np.testing.assert_allclose(gradient, UPSTREAM.numpy()[:, None] * np.stack(expected, -1), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.3)], ids=repr)
def test_g4_finite_differences_of_hidden_weight_and_bias(divergence):
    """With an empty slot, an id that is repeated, and everything that a head can have."""
    generator = torch.Generator().manual_seed(4)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (VOCAB, 4), (VOCAB,))]
    ids = torch.tensor([[3, 0, 6], [5, -1, 1], [2, 4, 2]])
    logprobs = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.1, 0.6], [0.3, 0.3, 0.2]], dtype=torch.float64).log()

    def divergence_of_student(hidden, weight, bias):
        head = OutputHead(weight, bias, logit_scale=0.5, softcap=4.0)
        options = {"loss_temperature": 1.5, "impl": Impl.REFERENCE, **TRUNCATED}
        return topk_divergence(hidden, head, ids, logprobs, divergence, **options).divergence_N

    assert torch.autograd.gradcheck(divergence_of_student, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.5)], ids=repr)
def test_gradient_rows_sum_to_zero_and_reach_outside_the_ids(divergence):
    """N9. Unlike the renormalised form, mass outside the ids is seen, through the softmax."""
    student, _, _, logprobs = make(seed=5)
    _, gradient = run(student, logprobs, divergence, upstream=torch.ones(4, dtype=torch.float64))
    np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-14)
    assert (np.abs(gradient[is_id() == 0]) > 1e-6).all()


def test_forward_kl_can_be_negative_and_is_not_clamped():
    """p > q at every given id: each term is below 0. With all ids it is the full divergence, which is not."""
    student = torch.tensor([[0.4, 0.4, 0.1, 0.1]], dtype=torch.float64).log()
    logprobs = torch.tensor([[0.2, 0.2]], dtype=torch.float64).log()
    output, gradient = run(student, logprobs, ForwardKL(), ids=torch.tensor([[0, 1]]))
    assert output.divergence_N.item() == pytest.approx(0.4 * np.log(0.5), rel=1e-12)
    np.testing.assert_allclose(gradient[0], [0.16 - 0.2, 0.16 - 0.2, 0.04, 0.04], rtol=1e-12)


def test_reverse_kl_falls_when_the_student_moves_its_mass_off_the_ids():
    """Why it is no divergence: of two students with equal ratios on the ids, the one that leaves them has the lower value,
    below 0, while every form with a tail grows.
    """
    logprobs = torch.tensor([[0.45, 0.45]], dtype=torch.float64).log()
    values, with_tail = [], []
    for leaked in (0.1, 0.4, 0.7):
        kept = (1 - leaked) / 2
        student = torch.tensor([[kept, kept, leaked / 2, leaked / 2]], dtype=torch.float64).log()
        values.append(run(student, logprobs, ReverseKL(), ids=torch.tensor([[0, 1]]))[0].divergence_N.item())
        options = {"impl": Impl.REFERENCE}
        output = topk_divergence(
            student, torch.eye(4).double(), torch.tensor([[0, 1]]), logprobs, ReverseKL(), **options
        )
        with_tail.append(output.divergence_N.item())
    np.testing.assert_allclose(values[1:], [0.6 * np.log(0.3 / 0.45), 0.3 * np.log(0.15 / 0.45)], rtol=1e-12)
    assert values[0] == pytest.approx(0.0, abs=1e-12) and values[1] < -0.2 and values[2] < values[1]
    assert with_tail[0] < with_tail[1] < with_tail[2]


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.5)], ids=repr)
def test_all_ids_give_the_full_divergence_and_one_id_its_own_term(divergence):
    student, p, q, _ = make(seed=6)
    m = 0.5 * (p + q)
    terms = {
        "ForwardKL": q * np.log(q / p),
        "ReverseKL": p * np.log(p / q),
        "GeneralizedJSD": 0.5 * (q * np.log(q / m) + p * np.log(p / m)),
    }[type(divergence).__name__]
    every_id = torch.arange(VOCAB).expand(4, -1)
    output, _ = run(student, torch.tensor(np.log(q)), divergence, ids=every_id)
    np.testing.assert_allclose(output.divergence_N.detach(), terms.sum(-1), rtol=1e-10)
    output, _ = run(student, torch.tensor(np.log(q[:, 7:8])), divergence, ids=every_id[:, 7:8])
    np.testing.assert_allclose(output.divergence_N.detach(), terms[:, 7], rtol=1e-10)


def test_statistics_are_sums_over_the_ids_and_agreement_is_of_the_full_student():
    student, p, q, logprobs = make(seed=7)
    output, _ = run(student, logprobs, ReverseKL())
    np.testing.assert_allclose(output.student_entropy_N, -(is_id() * p * np.log(p)).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(output.teacher_entropy_N, -(is_id() * q * np.log(q)).sum(-1), rtol=1e-10)
    best_given = np.where(is_id() == 1, q, 0.0).argmax(-1)
    np.testing.assert_array_equal(output.top1_agreement_N, (best_given == p.argmax(-1)).astype(float))
    assert output.student_logprob_N.isnan().all() and output.teacher_logprob_N.isnan().all()


def test_log_probs_are_taken_as_they_are():
    """Nothing is renormalised: log-probs that sum to 1.5 are q of 1.5, and a tail is not looked for."""
    student, p, _, _ = make(rows=1, seed=8)
    q = np.array([0.9, 0.4, 0.2])
    output, _ = run(student, torch.tensor(np.log(q))[None], ForwardKL())
    expected = (q * np.log(q / p[0, IDS[0].numpy()])).sum()
    assert output.divergence_N.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("divergence", "changed", "infinite"),
    [
        (ForwardKL(), "student", True),
        (ForwardKL(), "teacher", False),
        (ReverseKL(), "student", False),
        (ReverseKL(), "teacher", True),
        (GeneralizedJSD(0.5), "student", False),
        (GeneralizedJSD(0.5), "teacher", False),
    ],
    ids=str,
)
def test_n2_ids_that_one_side_excludes(divergence, changed, infinite):
    """Id 3 is one of row 0's and not of row 1's."""
    student, _, _, logprobs = make(rows=2, seed=9)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    if changed == "student":
        bias[3] = -np.inf
    else:
        logprobs[0, 0] = -np.inf
    hidden = student.requires_grad_()
    head = OutputHead(torch.eye(VOCAB, dtype=torch.float64), bias)
    output = topk_divergence(hidden, head, IDS[:2], logprobs, divergence, impl=Impl.REFERENCE, **TRUNCATED)
    output.divergence_N.sum().backward()
    assert output.divergence_N.isposinf().tolist() == [infinite, False]
    assert hidden.grad.isfinite().all() and (hidden.grad[1] != 0).any()
    assert (hidden.grad[0] == 0).all().item() == infinite


@pytest.mark.parametrize("divergence", [SkewForwardKL(0.1), AlphaDivergence(0.5)], ids=repr)
def test_other_divergences_have_no_truncated_form(divergence):
    student, _, _, logprobs = make(rows=1)
    with pytest.raises(ValueError, match=r"divergence must be one of .* with renormalize=False, got (Skew|Alpha)"):
        run(student, logprobs, divergence)
