"""Find the final answer in a reply. A scorer maps a reply to the answer as text, or None where there is none."""

import re
from collections.abc import Callable

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def number_after_hash(reply: str) -> str | None:
    """The first number after a run of '#', as in "22+8=30#30" or "#### 1,234"."""
    match = re.search(rf"#+\s*\$?({NUMBER})", reply)
    return normalize_number(match[1]) if match else None


def last_number(reply: str) -> str | None:
    """The last number in the reply."""
    numbers = re.findall(NUMBER, reply)
    return normalize_number(numbers[-1]) if numbers else None


def normalize_number(text: str) -> str:
    """ "1,234.00" -> "1234", "-07" -> "-7": one spelling for one number."""
    number = text.replace(",", "")
    value = float(number)
    return str(int(value)) if value == int(value) else repr(value)


SCORERS: dict[str, Callable[[str], str | None]] = {"number_after_hash": number_after_hash, "last_number": last_number}


def is_correct(reply: str, answer: str, scorer: str) -> bool:
    """Whether the reply's answer equals the expected one. The expected answer may be a worked solution."""
    expected = SCORERS[scorer](answer) if "#" in answer or scorer == "last_number" else normalize_number(answer)
    return expected is not None and SCORERS[scorer](reply) == expected
