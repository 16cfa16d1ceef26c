"""Is the final answer found, and compared as a number?  pytest tests/distill/test_scorers.py"""

import pytest

from esr_distill.scorers import is_correct, last_number, normalize_number, number_after_hash


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("22+8=30#30", "30"),
        ("22+8-8=30-8=22#22", "22"),
        ("16 - 3 = 13\n#### 1,234", "1234"),
        ("#### $18.50", "18.5"),
        ("#-7", "-7"),
        ("#07", "7"),
        ("#3#4", "3"),
        ("### 5 apples, 6 pears", "5"),
        ("30", None),
        ("30#", None),
        ("#x5", None),
        ("", None),
    ],
)
def test_number_after_hash(reply, answer):
    assert number_after_hash(reply) == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("She has 3 apples and 1,050 pears.", "1050"),
        ("The answer is 42.", "42"),
        ("5-8=-3", "-3"),
        ("the rest, 10-3", "3"),
        ("about -2.50", "-2.5"),
        ("$1,234,567.00", "1234567"),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(reply, answer):
    assert last_number(reply) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.00", "1234"),
        ("-07", "-7"),
        ("0", "0"),
        ("-0", "0"),
        ("000.50", "0.5"),
        ("12345678901234567891", "12345678901234567891"),
        ("0.12345678901234567891", "0.12345678901234567891"),
        ("9" * 500, "9" * 500),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_normalize_number_is_exact(text, number):
    assert normalize_number(text) == number


@pytest.mark.parametrize("text", ["", "x", "1.2.3", "5 apples", "-", "1e5"])
def test_normalize_number_refuses(text):
    with pytest.raises(ValueError, match="must be a number, got"):
        normalize_number(text)


@pytest.mark.parametrize(
    ("reply", "answer", "scorer", "correct"),
    [
        ("22+8=30#30", "30", "number_after_hash", True),
        ("22+8=30#30", "30.0", "number_after_hash", True),
        ("22+8=30#31", "30", "number_after_hash", False),
        ("22+8=30", "30", "number_after_hash", False),
        ("#12", "5 + 7 = 12 #### 12", "number_after_hash", True),
        ("so it is 1,000", "1000", "last_number", True),
        ("so it is 1000", "first 4, then #### 1,000", "last_number", True),
        ("it is 10 of 12", "10", "last_number", False),
        ("none", "10", "last_number", False),
        # A reply stuck in a loop is a wrong answer, not a crash.
        ("#" + "9" * 5000, "9", "number_after_hash", False),
        # Beyond 2^53, neighbours are different numbers.
        ("9007199254740993", "9007199254740992", "last_number", False),
    ],
)
def test_is_correct(reply, answer, scorer, correct):
    assert is_correct(reply, answer, scorer) is correct
