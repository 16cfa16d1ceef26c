"""Do two or more stop ids become one event, in value, gradient and statistics?

python -m pytest tests/kernels/test_token_divergence_stop_event.py
"""

import math

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, pull_back, softmax

from esr_kernels.divergence import ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.token_divergence import token_divergence

STOP = [2, 5, 9]


def merged(probabilities: np.ndarray) -> np.ndarray:
    """(rows, V) -> (rows, V - 2): all other ids in order, then the event."""
    others = np.delete(probabilities, STOP, axis=-1)
    return np.concatenate([others, probabilities[:, STOP].sum(-1, keepdims=True)], axis=-1)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_merged_distribution(name):
    """dD/dz of id i is p_i (c_e - sum p c) with e the event of i: in the event, in proportion to p."""
    student, teacher = make_logit_pair(5, 14, gap=1.5, seed=1, dtype=torch.float64)
    student.requires_grad_()
    output = token_divergence(student, teacher, CASES[name].divergence, stop_ids=STOP, impl=Impl.REFERENCE)
    output.divergence_N.sum().backward()
    p, q = softmax(student.detach().numpy()), softmax(teacher.numpy())
    np.testing.assert_allclose(
        output.divergence_N.detach().numpy(), CASES[name].value(merged(p), merged(q)), rtol=1e-11
    )
    of_events = pull_back(merged(p), CASES[name].slope(merged(p), merged(q)))
    expected = np.empty_like(p)
    expected[:, np.delete(np.arange(14), STOP)] = of_events[:, :-1]
    expected[:, STOP] = of_events[:, -1:] * p[:, STOP] / p[:, STOP].sum(-1, keepdims=True)
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_merging_never_increases_the_divergence(name):
    student, teacher = make_logit_pair(64, 14, gap=2.0, seed=2, dtype=torch.float64)
    plain = token_divergence(student, teacher, CASES[name].divergence, impl=Impl.REFERENCE).divergence_N
    output = token_divergence(student, teacher, CASES[name].divergence, stop_ids=STOP, impl=Impl.REFERENCE)
    assert (output.divergence_N <= plain + 1e-12).all()
    assert (output.divergence_N < 0.99 * plain).any()


def test_base_student_and_instruct_teacher_agree_about_stopping():
    """The student ends with id 7 (Base), the teacher with id 3 (Instruct), each 25 nats above the other's id.

    Unmerged, reverse KL at the stop is 25 nats and pushes the student's own end token down. Merged it is 0.
    """
    student, teacher = torch.zeros(1, 10), torch.zeros(1, 10)
    student[0, 7] = teacher[0, 3] = 25.0
    student.requires_grad_()
    plain = token_divergence(student, teacher, impl=Impl.REFERENCE).divergence_N
    assert plain.item() == pytest.approx(25.0, rel=1e-5)
    output = token_divergence(student, teacher, stop_ids=[7, 3], impl=Impl.REFERENCE)
    assert output.divergence_N.item() == pytest.approx(0.0, abs=1e-6)
    output.divergence_N.sum().backward()
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("stop_ids", [(), [4], {4}, (4, 4)])
def test_no_id_or_one_id_changes_nothing(stop_ids):
    student, teacher = make_logit_pair(4, 12, seed=3)
    ids = torch.tensor([4, 0, 4, 11])
    plain = token_divergence(student, teacher, token_ids_N=ids, impl=Impl.REFERENCE)
    output = token_divergence(student, teacher, token_ids_N=ids, stop_ids=stop_ids, impl=Impl.REFERENCE)
    assert all(torch.equal(a, b) for a, b in zip(output, plain, strict=True))


def test_order_and_repetition_of_stop_ids_do_not_matter():
    student, teacher = make_logit_pair(4, 12, seed=4)
    first = token_divergence(student, teacher, stop_ids=[9, 2, 5, 2], impl=Impl.REFERENCE).divergence_N
    second = token_divergence(student, teacher, stop_ids=(i for i in (5, 9, 2)), impl=Impl.REFERENCE).divergence_N
    assert torch.equal(first, second)


def test_statistics_are_those_of_the_merged_distribution():
    student, teacher = make_logit_pair(5, 14, gap=1.5, seed=5, dtype=torch.float64)
    ids = torch.tensor([0, 2, 5, 9, 13])
    output = token_divergence(student, teacher, token_ids_N=ids, stop_ids=STOP, impl=Impl.REFERENCE)
    for logits, entropy, logprob in [
        (student, output.student_entropy_N, output.student_logprob_N),
        (teacher, output.teacher_entropy_N, output.teacher_logprob_N),
    ]:
        p = softmax(logits.numpy())
        np.testing.assert_allclose(entropy.numpy(), -(merged(p) * np.log(merged(p))).sum(-1), rtol=1e-12)
        of_event = p[:, STOP].sum(-1)
        expected = [p[0, 0], of_event[1], of_event[2], of_event[3], p[4, 13]]
        np.testing.assert_allclose(logprob.numpy(), np.log(expected), rtol=1e-12)


def test_top1_counts_the_event_as_one():
    """Ids 0 and 2 hold 0.3 each and id 1 0.4: unmerged, id 1 wins; merged, the event does, whichever id leads it."""
    student = torch.tensor([[0.3, 0.4, 0.3], [0.3, 0.4, 0.3], [0.1, 0.6, 0.3]]).log()
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]).log()
    plain = token_divergence(student, teacher, impl=Impl.REFERENCE).top1_agreement_N
    assert plain.tolist() == [0.0, 1.0, 1.0]
    output = token_divergence(student, teacher, stop_ids=[0, 2], impl=Impl.REFERENCE)
    assert output.top1_agreement_N.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", CASES)
def test_stop_ids_that_are_impossible_on_one_or_both_sides(name):
    """N2: the event exists as long as one of its ids does; with none it has probability 0 and gradient 0."""
    student, teacher = make_logit_pair(3, 14, gap=1.0, seed=6, dtype=torch.float64)
    student[0, [2, 5]] = teacher[0, [5, 9]] = -math.inf
    student[1, STOP] = teacher[1, STOP] = -math.inf
    student.requires_grad_()
    output = token_divergence(student, teacher, CASES[name].divergence, stop_ids=STOP, impl=Impl.REFERENCE)
    output.divergence_N.sum().backward()
    p, q = merged(softmax(student.detach().numpy())), merged(softmax(teacher.numpy()))
    expected = [CASES[name].value(p[:1], q[:1])[0], CASES[name].value(p[1:2, :-1], q[1:2, :-1])[0]]
    np.testing.assert_allclose(output.divergence_N[:2].detach().numpy(), expected, rtol=1e-11)
    assert student.grad.isfinite().all()
    assert (student.grad[0, [2, 5]] == 0).all() and (student.grad[1, STOP] == 0).all()
    assert (student.grad[0, 9] != 0).all()


def test_merging_comes_after_the_vocabulary_cut():
    student, teacher = make_logit_pair(4, 20, seed=7, dtype=torch.float64)
    output = token_divergence(student, teacher, ReverseKL(), stop_ids=STOP, vocab_size=14, impl=Impl.REFERENCE)
    p, q = merged(softmax(student.numpy()[:, :14])), merged(softmax(teacher.numpy()[:, :14]))
    np.testing.assert_allclose(output.divergence_N.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-11)
