"""Are the shared test inputs seeded, as far apart as asked, and like a language model's?

python -m pytest tests/kernels/test_divergence_inputs.py
"""

import pytest
import torch

from esr_kernels.testing.inputs import make_hidden_pair, make_logit_pair


def test_inputs_depend_on_their_seed_alone():
    first = make_logit_pair(4, 30, seed=1), make_hidden_pair(4, 30, 3, 5, seed=1)
    torch.manual_seed(99)
    second = make_logit_pair(4, 30, seed=1), make_hidden_pair(4, 30, 3, 5, seed=1)
    other = make_logit_pair(4, 30, seed=2), make_hidden_pair(4, 30, 3, 5, seed=2)
    for one, same, different in zip(first, second, other, strict=True):
        for a, b, c in zip(one, same, different, strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c)


def test_low_precision_inputs_are_the_rounded_float64_ones():
    exact, rounded = make_logit_pair(4, 30, dtype=torch.float64), make_logit_pair(4, 30, dtype=torch.bfloat16)
    assert torch.equal(exact.teacher_N_V.bfloat16(), rounded.teacher_N_V)


@pytest.mark.parametrize("gap", [0.05, 0.5, 3.0])
def test_gap_is_the_standard_deviation_between_the_logits(gap):
    student, teacher = make_logit_pair(20, 2000, gap=gap, dtype=torch.float64)
    assert (teacher - student).std().item() == pytest.approx(gap, rel=0.02)
    x, w, y, u = make_hidden_pair(200, 400, 16, 80, gap=gap, dtype=torch.float64)
    assert (y @ u.T - x @ w.T).std().item() == pytest.approx(gap, rel=0.1)


def test_logit_rows_go_from_flat_to_peaked():
    student, _ = make_logit_pair(10, 1000, dtype=torch.float64)
    largest = torch.softmax(student, -1).amax(-1)
    assert largest[0] < 0.05 and largest[-1] > 0.5


def test_the_teacher_must_be_wider():
    with pytest.raises(ValueError, match="teacher_size must be > student_size = 4, got 4"):
        make_hidden_pair(2, 10, 4, 4)
