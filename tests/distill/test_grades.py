"""Are replies graded, and majorities voted, as worked by hand?  pytest tests/distill/test_grades.py"""

import operator

import numpy as np
import pytest

from esr_distill.evaluation.grades import Grades, Reply, grade_replies, majority
from esr_distill.evaluation.repetition import end_repeats, is_repetitive


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["3", "2", "3", "2"], "3"),  # a tie: 3 was drawn first
        (["2", "3", "3", "2"], "2"),
        ([None, None, "7"], "7"),  # no vote for no answer
        ([None, None], None),
        (["5"], "5"),
    ],
)
def test_majority(answers, winner):
    assert majority(answers, operator.eq) == winner


def test_majority_groups_what_the_scorer_calls_the_same():
    def is_same(first, second):
        return float(first) == float(second)

    assert majority(["3", "0.5", "3", ".5", "5e-1"], is_same) == "0.5"


def test_equal_texts_vote_together_even_where_the_scorer_cannot_compare_them():
    assert majority(["?", "1", "?"], lambda first, second: False) == "?"


def test_grades_by_hand():
    replies = [
        *(Reply("#1", 3, True), Reply("#2", 3, True), Reply("#2", 9, False, 11)),
        *(Reply("none", 4, True), Reply("#5", 3, True), Reply("#6", 3, True, 10)),
    ]
    grades = grade_replies(replies, ["2", "5"], "number_after_hash", 3)
    assert grades.answers == [["1", "2", "2"], [None, "5", "6"]]
    assert grades.correct_Q_S.tolist() == [[False, True, True], [False, True, False]]
    assert grades.majority_correct_Q.tolist() == [True, True]
    assert grades.finished_Q_S.tolist() == [[True, True, False], [True, True, True]]
    assert grades.repetitive_Q_S.tolist() == [[False, False, True], [False, False, False]]
    assert grades.length_Q_S.tolist() == [[3, 3, 9], [4, 3, 3]]
    assert grades.first_box_correct_Q_S is None


def test_first_and_last_box():
    replies = [
        Reply(r"\boxed{4} so \boxed{5}", 9, True),
        Reply(r"\boxed{5}, \boxed{6}", 9, True),
        Reply("5", 1, True),
        Reply(r"\boxed{ 5 }", 4, True),
    ]
    grades = grade_replies(replies, ["5", "5"], "boxed_exact", 2)
    assert grades.correct_Q_S.tolist() == [[True, False], [False, True]]
    assert grades.first_box_correct_Q_S.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_replies(count):
    with pytest.raises(ValueError, match=f"there must be 2 x 2 replies, got {count}"):
        grade_replies([Reply("#1", 2, True)] * count, ["1", "1"], "number_after_hash", 2)


@pytest.mark.parametrize("scorer", ["last_number", "boxed_exact"])
def test_rows_come_back(scorer):
    replies = [Reply(f"\\boxed{{{i}}} 3", i, i % 2 == 0, 6 * i) for i in range(6)]
    grades = grade_replies(replies, ["3", "4"], scorer, 3)
    rows = grades.rows()
    assert [row["length"] for row in rows] == [[0, 1, 2], [3, 4, 5]]
    again = Grades.from_rows(rows)
    for name, value in vars(grades).items():
        assert np.array_equal(getattr(again, name), value), name


@pytest.mark.parametrize(
    "change", [{"correct": [True]}, {"correct": []}, {"finished": True}, {"majority_correct": None, "length": ["x", 1]}]
)
def test_rows_that_are_none(change):
    rows = grade_replies([Reply("#1", 2, True)] * 4, ["1", "1"], "number_after_hash", 2).rows()
    with pytest.raises((ValueError, TypeError)):
        Grades.from_rows([rows[0] | change, rows[1]])


@pytest.mark.parametrize(
    ("token_ids", "repeats"),
    [
        ([], 0),
        ([4, 5], 0),
        ([4, 5, 6], 1),
        ([4, 5, 6, 7, 4, 5, 6], 2),
        ([5, 5, 5, 5, 5], 3),  # overlaps count
        ([1, 2, 1, 2, 1, 2, 9], 1),
        ([9] + [1, 2, 3, 4] * 11 + [1, 2, 3], 12),
    ],
)
def test_end_repeats(token_ids, repeats):
    assert end_repeats(token_ids) == repeats


def test_repetitive_is_more_than_ten_times():
    assert [is_repetitive(repeats) for repeats in (0, 1, 10, 11)] == [False, False, False, True]
