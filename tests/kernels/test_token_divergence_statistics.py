"""Are entropies, log-probabilities and top-1 agreement those of the tempered distributions, and detached?

python -m pytest tests/kernels/test_token_divergence_statistics.py
"""

import math

import numpy as np
import pytest
import torch
from numpy_divergences import softmax

from esr_kernels.impl import Impl
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.token_divergence import token_divergence


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_entropies_and_logprobs(temperature, id_dtype):
    student, teacher = make_logit_pair(6, 30, gap=1.0, seed=1, dtype=torch.float64)
    ids = torch.tensor([0, 29, 7, 7, 12, 3], dtype=id_dtype)
    output = token_divergence(student, teacher, loss_temperature=temperature, token_ids_N=ids, impl=Impl.REFERENCE)
    p, q = softmax(student.numpy() / temperature), softmax(teacher.numpy() / temperature)
    rows = np.arange(6)
    np.testing.assert_allclose(output.student_entropy_N, -(p * np.log(p)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(output.teacher_entropy_N, -(q * np.log(q)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(output.student_logprob_N, np.log(p[rows, ids]), rtol=1e-12)
    np.testing.assert_allclose(output.teacher_logprob_N, np.log(q[rows, ids]), rtol=1e-12)


def test_entropy_of_hand_made_rows():
    """Uniform over 8, one certain token, a fair coin among impossible ids."""
    impossible = -math.inf
    rows = torch.tensor([[0.0] * 8, [9.0] + [impossible] * 7, [1.0, 1.0] + [impossible] * 6])
    output = token_divergence(rows, torch.zeros(3, 8), impl=Impl.REFERENCE)
    np.testing.assert_allclose(output.student_entropy_N, [math.log(8), 0.0, math.log(2)], rtol=1e-6)
    assert not output.student_entropy_N.signbit().any()


def test_without_token_ids_logprobs_are_nan():
    student, teacher = make_logit_pair(3, 9, seed=2)
    output = token_divergence(student, teacher, impl=Impl.REFERENCE)
    assert output.student_logprob_N.isnan().all() and output.teacher_logprob_N.isnan().all()
    assert output.student_logprob_N.shape == (3,)


def test_ids_outside_the_vocabulary_give_nan_in_their_row_only():
    """-100 marks ignored labels elsewhere; after a cut, ids beyond it are outside too."""
    student, teacher = make_logit_pair(5, 9, seed=3)
    ids = torch.tensor([-100, 3, 9, 6, 5])
    output = token_divergence(student, teacher, token_ids_N=ids, vocab_size=6, impl=Impl.REFERENCE)
    assert output.student_logprob_N.isnan().tolist() == [True, False, True, True, False]
    assert output.teacher_logprob_N.isnan().tolist() == [True, False, True, True, False]
    assert all(field.isfinite().all() for field in (output.divergence_N, output.student_entropy_N))


def test_an_impossible_token_has_logprob_minus_infinity():
    student, teacher = make_logit_pair(1, 5, seed=4)
    teacher[0, 2] = -math.inf
    output = token_divergence(student, teacher, token_ids_N=torch.tensor([2]), impl=Impl.REFERENCE)
    assert output.teacher_logprob_N.item() == -math.inf
    assert output.student_logprob_N.isfinite().all()


def test_top1_agreement_and_ties_by_the_lowest_id():
    student = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 2.0, 2.0]])
    teacher = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0], [5.0, 1.0, 0.0], [1.0, 5.0, 0.0], [0.0, 1.0, 1.0]])
    output = token_divergence(student, teacher, impl=Impl.REFERENCE)
    assert output.top1_agreement_N.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_only_the_divergence_is_differentiable():
    student, teacher = make_logit_pair(3, 9, seed=5)
    output = token_divergence(
        student.requires_grad_(), teacher, token_ids_N=torch.tensor([1, 2, 3]), impl=Impl.REFERENCE
    )
    assert {name: field.requires_grad for name, field in output._asdict().items()} == {
        "divergence_N": True,
        "student_entropy_N": False,
        "teacher_entropy_N": False,
        "student_logprob_N": False,
        "teacher_logprob_N": False,
        "top1_agreement_N": False,
    }
