"""Are infinite, masked, extreme and empty rows defined in value and gradient, and confined to themselves?

python -m pytest tests/kernels/test_token_divergence_edge_cases.py
"""

import math

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, pull_back, softmax

from esr_kernels.divergence import AlphaDivergence, ForwardKL, GeneralizedJSD, ReverseKL, SkewForwardKL, TotalVariation
from esr_kernels.impl import Impl
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.token_divergence import token_divergence

INF, NAN = math.inf, math.nan
every_divergence = pytest.mark.parametrize("name", CASES)


def run(student, teacher, divergence, **options):
    """Output and student gradient, with a different upstream gradient in every row."""
    student = student.clone().requires_grad_()
    output = token_divergence(student, teacher, divergence, impl=Impl.REFERENCE, **options)
    output.divergence_N.backward(torch.arange(1.0, len(student) + 1).to(output.divergence_N.dtype))
    return output, student.grad


def is_infinite(divergence, *, student_zero: bool, teacher_zero: bool) -> bool:
    """Whether an event impossible for one side only makes the divergence infinite, from the literature."""
    power = {ForwardKL(): 1.0, ReverseKL(): 0.0, GeneralizedJSD(0.0): 1.0, GeneralizedJSD(1.0): 0.0}.get(divergence)
    if type(divergence).__name__.startswith("Skew") and divergence.lam == 0:
        power = 1.0 if isinstance(divergence, SkewForwardKL) else 0.0
    if isinstance(divergence, AlphaDivergence):
        power = divergence.alpha
    if power is None:
        return False
    return (student_zero and power >= 1) or (teacher_zero and power <= 0)


@every_divergence
def test_n2_columns_masked_on_both_sides_change_nothing(name):
    """Padded or masked vocabulary: value and gradient are those without the columns, and gradient 0 in them."""
    student, teacher = make_logit_pair(5, 20, gap=1.0, seed=1, dtype=torch.float64)
    keep = [c for c in range(20) if c not in (0, 7, 8, 19)]
    for logits in (student, teacher):
        logits[:, [0, 7, 8, 19]] = -INF
    output, grad = run(student, teacher, CASES[name].divergence)
    p, q = softmax(student.numpy()[:, keep]), softmax(teacher.numpy()[:, keep])
    np.testing.assert_allclose(output.divergence_N.detach().numpy(), CASES[name].value(p, q), rtol=1e-11)
    expected = np.arange(1, 6)[:, None] * pull_back(p, CASES[name].slope(p, q))
    np.testing.assert_allclose(grad.numpy()[:, keep], expected, rtol=1e-9, atol=1e-14)
    assert (grad[:, [0, 7, 8, 19]] == 0).all()


@every_divergence
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_n2_columns_masked_on_one_side(name, side):
    """Infinite exactly where mathematics says so, then with gradient exactly 0; else the limit p -> 0 or q -> 0."""
    student, teacher = make_logit_pair(4, 12, gap=1.0, seed=2, dtype=torch.float64)
    masked = student if side == "student" else teacher
    masked[1, 3] = masked[2, :6] = -INF
    divergence = CASES[name].divergence
    output, grad = run(student, teacher, divergence)
    infinite = is_infinite(divergence, student_zero=side == "student", teacher_zero=side == "teacher")
    # Probability e^-500 in place of 0, where every finite value and gradient has reached its limit.
    p, q = softmax(student.clamp(min=-500).numpy()), softmax(teacher.clamp(min=-500).numpy())
    with np.errstate(over="ignore"):
        expected = CASES[name].value(p, q)
        slope = CASES[name].slope(p, q)
    expected_grad = np.arange(1, 5)[:, None] * pull_back(p, np.where(np.isfinite(slope), slope, 0.0))
    if infinite:
        expected[1:3], expected_grad[1:3] = INF, 0.0
        assert (grad[1:3] == 0).all()
    np.testing.assert_allclose(output.divergence_N.detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(grad.numpy(), expected_grad, rtol=1e-8, atol=1e-13)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_s3_fully_masked_rows_are_zero(name, dtype, side):
    student, teacher = make_logit_pair(3, 10, seed=3, dtype=dtype)
    expected, expected_grad = run(student, teacher, CASES[name].divergence)
    if side != "teacher":
        student[1] = -INF
    if side != "student":
        teacher[1] = -INF
    output, grad = run(student, teacher, CASES[name].divergence, token_ids_N=torch.tensor([2, 2, 2]), stop_ids=[2, 4])
    assert [field[1].item() for field in output] == [0.0, 0.0, 0.0, -INF, -INF, 0.0]
    assert (grad[1] == 0).all()
    output, grad = run(student, teacher, CASES[name].divergence)
    assert torch.equal(output.divergence_N[::2], expected.divergence_N[::2])
    assert torch.equal(grad[::2], expected_grad[::2])


@every_divergence
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_n8_nan_and_infinity_poison_only_their_row(name, poison, side):
    student, teacher = make_logit_pair(3, 10, seed=4)
    expected, expected_grad = run(student, teacher, CASES[name].divergence)
    (student if side == "student" else teacher)[1, 6] = poison
    output, grad = run(student, teacher, CASES[name].divergence, token_ids_N=torch.tensor([1, 1, 1]))
    assert output.divergence_N[1].isnan() and output.top1_agreement_N[1].isnan()
    assert output.student_entropy_N[1].isnan() == output.student_logprob_N[1].isnan() == (side == "student")
    assert output.teacher_entropy_N[1].isnan() == output.teacher_logprob_N[1].isnan() == (side == "teacher")
    assert torch.equal(output.divergence_N[::2], expected.divergence_N[::2])
    assert torch.equal(grad[::2], expected_grad[::2])


@every_divergence
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_n3_probabilities_that_underflow_on_both_sides(name, temperature):
    """Log-probabilities below -104 are 0 in float32; nothing divides by them."""
    student, teacher = make_logit_pair(4, 10, gap=0.5, seed=5)
    for logits in (student, teacher):
        logits[:, 5:] -= 130.0 * temperature
    output, grad = run(student, teacher, CASES[name].divergence, loss_temperature=temperature)
    p = softmax(student.double().numpy() / temperature)
    q = softmax(teacher.double().numpy() / temperature)
    np.testing.assert_allclose(output.divergence_N.detach().numpy(), CASES[name].value(p, q), rtol=2e-4, atol=1e-6)
    expected = np.arange(1, 5)[:, None] * pull_back(p, CASES[name].slope(p, q)) / temperature
    np.testing.assert_allclose(grad.numpy(), expected, rtol=2e-4, atol=2e-6 / temperature)


@pytest.mark.parametrize("student_offset, teacher_offset", [(2.0**24, 2.0**24), (1e4, -1e4), (-1e4, 0.0), (0.0, 1e4)])
@every_divergence
def test_n4_a_common_offset_changes_nothing(name, student_offset, teacher_offset):
    """Even integers up to 16 stay exact after adding 2^24 in float32, so results must agree with the plain ones."""
    generator = torch.Generator().manual_seed(6)
    student, teacher = 2.0 * torch.randint(-4, 5, (2, 5, 12), generator=generator)
    output, grad = run(student, teacher, CASES[name].divergence)
    shifted, shifted_grad = run(student + student_offset, teacher + teacher_offset, CASES[name].divergence)
    assert output.divergence_N.min() > 0.01
    torch.testing.assert_close(shifted.divergence_N, output.divergence_N, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@every_divergence
def test_n8_large_finite_logits(name, dtype):
    """+-6e4: two rows that agree on the winner and one that does not (bounded divergences reach their bound)."""
    student = torch.tensor([[6e4, -6e4, 0.0], [-6e4, -6e4, 6e4], [6e4, -6e4, 0.0]], dtype=dtype)
    teacher = torch.tensor([[6e4, -6e4, -1e4], [-6e4, -2e4, 6e4], [-6e4, 6e4, 0.0]], dtype=dtype)
    output, grad = run(student, teacher, CASES[name].divergence)
    torch.testing.assert_close(output.divergence_N[:2], torch.zeros(2), rtol=0, atol=2e-7)
    torch.testing.assert_close(grad[:2], torch.zeros(2, 3, dtype=dtype), rtol=0, atol=1e-6)
    assert not output.divergence_N.isnan().any() and not grad.isnan().any()
    divergence = CASES[name].divergence
    if divergence == TotalVariation():
        assert output.divergence_N[2] == 1.0
    elif is_infinite(divergence, student_zero=True, teacher_zero=False) or is_infinite(
        divergence, student_zero=False, teacher_zero=True
    ):
        assert output.divergence_N[2] >= 1e4
    else:
        assert 0.05 < output.divergence_N[2] < 7.0


def test_a_finite_value_too_large_for_float32_is_infinite_with_gradient_zero():
    student, teacher = torch.tensor([[0.0, 300.0], [0.0, 1.0]]), torch.tensor([[300.0, 0.0], [1.0, 0.0]])
    output, grad = run(student, teacher, AlphaDivergence(3.0))
    assert output.divergence_N[0] == INF and (grad[0] == 0).all()
    assert output.divergence_N[1].isfinite() and (grad[1] != 0).all()


@every_divergence
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_s3_any_number_of_rows(name, rows):
    student, teacher = make_logit_pair(rows, 13, seed=7)
    output, grad = run(student, teacher, CASES[name].divergence, token_ids_N=torch.zeros(rows, dtype=torch.int64))
    assert all(field.shape == (rows,) and field.dtype == torch.float32 for field in output)
    assert grad.shape == (rows, 13)
    assert (output.divergence_N > 0).all() and grad.isfinite().all()


@every_divergence
def test_a_vocabulary_of_one_is_identically_zero(name):
    output, grad = run(torch.tensor([[3.0], [-2.0]]), torch.tensor([[0.0], [1.0]]), CASES[name].divergence)
    torch.testing.assert_close(output.divergence_N, torch.zeros(2), rtol=0, atol=2e-7)
    torch.testing.assert_close(grad, torch.zeros(2, 1), rtol=0, atol=1e-6)


@every_divergence
def test_equal_sides_have_value_and_gradient_zero(name):
    student, _ = make_logit_pair(6, 200, seed=8)
    output, grad = run(student, student, CASES[name].divergence)
    torch.testing.assert_close(output.divergence_N, torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, torch.zeros(6, 200), rtol=0, atol=6e-6)  # the upstream gradient goes up to 6
    assert torch.equal(output.top1_agreement_N, torch.ones(6))


@pytest.mark.parametrize("stop_ids", [(), (1, 3)])
@every_divergence
def test_no_mix_of_extreme_logits_makes_nan(name, stop_ids):
    """N2, N3, N8 at once: 2,000 rows of five logits drawn from the extremes that float32 has, up to its largest."""
    extremes = torch.tensor([0.0, 1.0, -1.0, 1e-30, 50.0, -50.0, 200.0, -200.0, 6e4, -6e4, 3e38, -3e38, -INF, -INF])
    generator = torch.Generator().manual_seed(9)
    student, teacher = extremes[torch.randint(0, len(extremes), (2, 2000, 5), generator=generator)]
    student.requires_grad_()
    output = token_divergence(student, teacher, CASES[name].divergence, stop_ids=stop_ids, impl=Impl.REFERENCE)
    output.divergence_N.sum().backward()
    assert (output.divergence_N >= -1e-6).all()  # False for NaN
    assert student.grad.isfinite().all()
    assert (student.grad[output.divergence_N.isposinf()] == 0).all()
    assert output.student_entropy_N.isfinite().all() and output.teacher_entropy_N.isfinite().all()
