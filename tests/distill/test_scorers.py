"""Is the final answer found, and compared as it should be?  pytest tests/distill/test_scorers.py"""

import sys
import time
from typing import get_args

import pytest

from esr_distill.config import ScorerName
from esr_distill.evaluation.boxed_answers import boxes, first_box, last_box, without_spacing
from esr_distill.evaluation.scorers import (
    SCORERS,
    expected_answer,
    is_correct,
    last_number,
    normalize_number,
    number_after_hash,
)
from esr_distill.input_error import InputError


def test_every_scorer_has_a_name_in_the_config():
    assert set(get_args(ScorerName)) == SCORERS.keys()


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


# Boxes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}.", ["5"]),
        (r"\boxed{\frac{1}{2}} and \boxed {7}", [r"\frac{1}{2}", "7"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\left\{ x \right.}", [r"\left\{ x \right."]),  # an escaped brace opens nothing
        (r"\boxed{a \boxed{b} c}", [r"a \boxed{b} c"]),
        (r"\boxed{3} then \boxed{4", ["3"]),  # cut before it closed
        (r"\boxed{4 then \boxed{3}", ["3"]),
        (r"{ \boxed{1} } } \boxed{2}", ["1", "2"]),
        (r"\\boxed{1}", []),  # a line break, then a word
        (r"\boxed 5 \fbox{6} boxed{7}", []),
        ("", []),
        ("\\boxed{1\n+1}", ["1\n+1"]),
    ],
)
def test_boxes(text, found):
    assert boxes(text) == found


def test_first_and_last_box():
    text = r"\boxed{ 1 }, \boxed{2}, \boxed{3"
    assert (first_box(text), last_box(text)) == ("1", "2")
    assert (first_box("none"), last_box("none")) == (None, None)
    assert (first_box(r"\boxed{ } \boxed{1}"), last_box(r"\boxed{1} \boxed{}")) == (None, None)


def test_many_boxes_that_never_close_take_no_time():
    start = time.perf_counter()
    assert boxes("\\boxed{" * 50_000 + "}") == [""]
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r" 1\,000 ", "1000"),
        (r"x = \; 5\!", "x=5"),
        ("a~b\\ c\\quad d\\qquad\te\n", "abcde"),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"1\\,2", r"1\\,2"),  # a line break and a comma
        (r"\quadratic", r"\quadratic"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\left(3,\frac{\pi}{2}\right)"),
        (r"\{1\}", r"\{1\}"),
    ],
)
def test_without_spacing(latex, text):
    assert without_spacing(latex) == text


@pytest.mark.parametrize(
    ("reply", "answer", "correct"),
    [
        (r"\boxed{1\,000}", "1000", True),
        (r"\boxed{5} no, \boxed{6}", "6", True),
        (r"\boxed{6} no, \boxed{5}", "6", False),
        (r"\boxed{\frac{1}{2}}", r"it is \boxed{ \frac {1}{2} }", True),
        (r"\boxed{\frac12}", r"\frac{1}{2}", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", False),
        (r"\boxed{1,000}", "1000", False),
        ("1000", "1000", False),
        (r"\boxed{}", "1000", False),
    ],
)
def test_boxed_exact(reply, answer, correct):
    assert is_correct(reply, answer, "boxed_exact") is correct


@pytest.mark.parametrize("answer", ["", "  ", r"\boxed{}", r"\boxed{\,}", "~"])
def test_an_empty_answer_is_none(answer):
    assert expected_answer(answer, "boxed_exact") is None


@pytest.mark.parametrize(
    ("reply", "answer", "correct"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{\dfrac{2}{4}}", r"so \boxed{\frac12}", True),
        (r"\boxed{(x+1)^2}", "x^2 + 2x + 1", True),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{1{,}000}", "1000", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        (r"\boxed{0.33}", r"\frac{1}{3}", False),
        (r"\boxed{(1, 2)}", "(2, 1)", False),
        (r"\boxed{5} no, \boxed{6}", "5", False),
        (r"5", "5", False),
        (r"\boxed{}{}", "5", False),
    ],
)
def test_boxed_math(reply, answer, correct):
    pytest.importorskip("math_verify")
    assert is_correct(reply, answer, "boxed_math") is correct


def test_what_math_verify_cannot_read_is_no_expected_answer():
    pytest.importorskip("math_verify")
    assert expected_answer("}{", "boxed_math") is None
    assert expected_answer(r"2^{3} = \boxed{8}", "boxed_math") == "8"


def test_boxed_math_without_math_verify_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    message = (
        r"evaluation\.scorer must be one whose package is installed, got 'boxed_math', which needs math-verify \(.*\): "
        r'pip install "math-verify\[antlr4_13_2\]"'
    )
    with pytest.raises(InputError, match=message):
        SCORERS["boxed_math"].check("evaluation.scorer", "boxed_math")
    with pytest.raises(ImportError):  # and nothing is compared in another way
        is_correct(r"\boxed{7919}", "7919", "boxed_math")


@pytest.mark.parametrize("scorer", ["number_after_hash", "last_number", "boxed_exact"])
def test_the_others_need_nothing(scorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    SCORERS[scorer].check("scorer", scorer)
