"""Find the final answer in a reply. A scorer maps a reply to the answer as text, or None where there is none."""

import re
from collections.abc import Callable

# A minus right after a digit is a subtraction, not a sign: the last number of "10-3" is 3.
NUMBER = r"(?:(?<![0-9])-)?[0-9][0-9,]*(?:\.[0-9]+)?"


def number_after_hash(reply: str) -> str | None:
    """The first number after a run of '#', as in "22+8=30#30" or "#### 1,234"."""
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


SCORERS: dict[str, Callable[[str], str | None]] = {"number_after_hash": number_after_hash, "last_number": last_number}


def expected_answer(answer: str, scorer: str) -> str | None:
    """The number that a reply must give. `answer` may be a worked solution; None where no number is found in it."""
    if "#" in answer or scorer == "last_number":
        return SCORERS[scorer](answer)
    try:
        return normalize_number(answer)
    except ValueError:
        return None


def is_correct(reply: str, answer: str, scorer: str) -> bool:
    """Whether the reply's answer equals the expected one."""
    expected = expected_answer(answer, scorer)
    return expected is not None and SCORERS[scorer](reply) == expected
