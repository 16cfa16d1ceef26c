"""Find the final answer in a reply and compare it with the expected one: all that the option `scorer` can name."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from esr_distill.evaluation.boxed_answers import boxes, first_box, last_box, without_spacing
from esr_distill.evaluation.math_equivalence import is_same_mathematics, read_mathematics, require_math_verify

# A minus right after a digit is a subtraction, not a sign: the last number of "10-3" is 3.
NUMBER = r"(?:(?<![0-9])-)?[0-9][0-9,]*(?:\.[0-9]+)?"


@dataclass(frozen=True)
class Scorer:
    """One way to find and compare answers.

    Attributes:
        find: Reply to answer as text, None where there is none.
        expect: A problem's "answer", which may be a worked solution, to the answer that a reply must give; None where there is
            none that can be compared.
        is_same: Whether the second answer is the first one, the expected.
        find_first: For boxed answers, reply to the first box; `find` takes the last.
        check: Raises InputError where the scorer cannot work; gets the option's name and value.
    """

    find: Callable[[str], str | None]
    expect: Callable[[str], str | None]
    is_same: Callable[[str, str], bool] = operator.eq
    find_first: Callable[[str], str | None] | None = None
    check: Callable[[str, str], None] = lambda option, value: None


def number_after_hash(reply: str) -> str | None:
    """The first number after a run of '#', as in "22+8=30#30" (the demo's tasks) or "#### 1,234" (GSM8K)."""
    match = re.search(rf"#+\s*\$?({NUMBER})", reply)
    return normalize_number(match[1]) if match else None


def last_number(reply: str) -> str | None:
    """The last number in the reply."""
    numbers = re.findall(NUMBER, reply)
    return normalize_number(numbers[-1]) if numbers else None


def normalize_number(text: str) -> str:
    """ "1,234.00" -> "1234", "-07" -> "-7": one spelling for one number, exact at any length.

    Raises:
        ValueError: `text` is not a number in decimal digits.
    """
    match = re.fullmatch(r"(-?)([0-9]+)(?:\.([0-9]+))?", text.replace(",", "").strip())
    if match is None:
        raise ValueError(f"an answer must be a number, got {text!r}")
    sign, whole, fraction = match[1], match[2].lstrip("0") or "0", (match[3] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def number_in_answer(answer: str) -> str | None:
    """The number after '#' where there is one, as in GSM8K's solutions; else the whole text must be a number."""
    if "#" in answer:
        return number_after_hash(answer)
    try:
        return normalize_number(answer)
    except ValueError:
        return None


def exact_box(find: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """`find` with its answer as `without_spacing` leaves it."""

    def find_exact(text: str) -> str | None:
        answer = find(text)
        return answer and (without_spacing(answer) or None)

    return find_exact


def box_in_answer(answer: str) -> str | None:
    """The last box where there is one, as in MATH's solutions; else the whole text."""
    return last_box(answer) if boxes(answer) else answer.strip() or None


def readable_box_in_answer(answer: str) -> str | None:
    """`box_in_answer`, where math-verify can read it."""
    expected = box_in_answer(answer)
    return expected if expected and read_mathematics(expected) else None


SCORERS: dict[str, Scorer] = {
    "number_after_hash": Scorer(number_after_hash, number_in_answer),
    "last_number": Scorer(last_number, last_number),
    "boxed_exact": Scorer(exact_box(last_box), exact_box(box_in_answer), find_first=exact_box(first_box)),
    "boxed_math": Scorer(
        last_box, readable_box_in_answer, is_same_mathematics, find_first=first_box, check=require_math_verify
    ),
}


def expected_answer(answer: str, scorer: str) -> str | None:
    """The answer that a reply must give. `answer` may be a worked solution; None where nothing is found in it."""
    return SCORERS[scorer].expect(answer)


def is_correct(reply: str, answer: str, scorer: str) -> bool:
    """Whether the reply's answer is the expected one."""
    expected, found = expected_answer(answer, scorer), SCORERS[scorer].find(reply)
    return expected is not None and found is not None and SCORERS[scorer].is_same(expected, found)
