"""Is token_divergence the formula of the divergence on tempered, cut softmaxes, for every dtype and layout?

python -m pytest tests/kernels/test_token_divergence_values.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, softmax

from esr_kernels.divergence import ForwardKL, GeneralizedJSD, ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.token_divergence import token_divergence


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_value_is_the_formula(name, temperature):
    student, teacher = make_logit_pair(7, 33, gap=1.0, seed=1, dtype=torch.float64)
    output = token_divergence(
        student, teacher, CASES[name].divergence, loss_temperature=temperature, impl=Impl.REFERENCE
    )
    expected = CASES[name].value(softmax(student.numpy() / temperature), softmax(teacher.numpy() / temperature))
    np.testing.assert_allclose(output.divergence_N.numpy(), expected, rtol=1e-11)


def test_default_is_reverse_kl_at_temperature_one_without_a_hard_loss():
    """G6."""
    student, teacher = make_logit_pair(4, 20, seed=2, dtype=torch.float64)
    output = token_divergence(student, teacher, impl="reference")
    p, q = softmax(student.numpy()), softmax(teacher.numpy())
    np.testing.assert_allclose(output.divergence_N.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_n6_equal_logits_give_equal_losses_in_every_dtype(dtype):
    """Multiples of 1/4 up to 8 are exact in all of them; the reference must compute in float32 for all of them."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randint(-32, 33, (2, 9, 50), generator=generator) / 4
    expected = token_divergence(student.double(), teacher.double(), impl=Impl.REFERENCE).divergence_N
    output = token_divergence(student.to(dtype), teacher.to(dtype), impl=Impl.REFERENCE)
    assert output.divergence_N.dtype == torch.float32
    torch.testing.assert_close(output.divergence_N.double(), expected, rtol=1e-6, atol=1e-6)
    same = token_divergence(student.float(), teacher.to(dtype), impl=Impl.REFERENCE)
    assert torch.equal(output.divergence_N, same.divergence_N)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_one_float64_side_makes_float64_outputs(which):
    student, teacher = make_logit_pair(3, 10, seed=4)
    student, teacher = (student.double(), teacher) if which == "student" else (student, teacher.double())
    output = token_divergence(student, teacher, token_ids_N=torch.tensor([0, 1, 2]), impl=Impl.REFERENCE)
    assert all(field.dtype == torch.float64 for field in output)
    p, q = softmax(student.double().numpy()), softmax(teacher.double().numpy())
    np.testing.assert_allclose(output.divergence_N.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-12)


def test_strided_and_expanded_inputs():
    """S2: rows and columns with steps, a teacher row shared by all rows."""
    wide, _ = make_logit_pair(10, 60, seed=5, dtype=torch.float64)
    student, teacher = wide[::2, 1::3], wide[:1, ::3].expand(5, -1)
    assert not student.is_contiguous() and not teacher.is_contiguous()
    output = token_divergence(student, teacher, ForwardKL(), impl=Impl.REFERENCE)
    expected = CASES["forward_kl"].value(softmax(student.numpy()), softmax(teacher.numpy()))
    np.testing.assert_allclose(output.divergence_N.numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("student_size, teacher_size", [(40, 33), (33, 40), (40, 40)])
def test_s4_vocab_size_cuts_logits_before_the_softmax(student_size, teacher_size):
    """The ids beyond the cut, however probable, are as if they had never been."""
    student = make_logit_pair(5, student_size, seed=6, dtype=torch.float64).student_N_V
    teacher = make_logit_pair(5, teacher_size, seed=7, dtype=torch.float64).teacher_N_V
    student[:, 30:] += 20.0
    student.requires_grad_()
    output = token_divergence(student, teacher, GeneralizedJSD(0.5), vocab_size=30, impl=Impl.REFERENCE)
    p, q = softmax(student.detach().numpy()[:, :30]), softmax(teacher.numpy()[:, :30])
    np.testing.assert_allclose(output.divergence_N.detach().numpy(), CASES["jsd_0.5"].value(p, q), rtol=1e-11)
    output.divergence_N.sum().backward()
    assert (student.grad[:, 30:] == 0).all()
    assert (student.grad[:, :30] != 0).all()


def test_rows_are_independent():
    """Permuting rows permutes outputs, bit for bit, and a row alone gives what it gives in a batch."""
    student, teacher = make_logit_pair(8, 51, seed=8)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    values = token_divergence(student, teacher, ReverseKL(), impl=Impl.REFERENCE).divergence_N
    permuted = token_divergence(student[order], teacher[order], ReverseKL(), impl=Impl.REFERENCE).divergence_N
    assert torch.equal(permuted, values[order])
    alone = token_divergence(student[4:5], teacher[4:5], ReverseKL(), impl=Impl.REFERENCE).divergence_N
    torch.testing.assert_close(alone, values[4:5], rtol=1e-6, atol=1e-7)
