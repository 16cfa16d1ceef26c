"""Does the learning rate rise and fall as the schedule says?  pytest tests/distill/test_learning_rate.py"""

import pytest

from esr_distill.learning_rate import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.85355339, 0.5, 0.14644661]),
    ],
)
def test_six_steps_with_two_of_warm_up(schedule, expected):
    assert [learning_rate_factor(step, 6, 2, schedule) for step in range(6)] == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert learning_rate_factor(0, 10, 0, "cosine") == 1.0


def test_no_step_is_idle_even_where_all_of_them_warm_up():
    assert all(learning_rate_factor(step, 3, 3, "cosine") > 0 for step in range(3))
