"""Whether two LaTeX answers are the same mathematics, as the package math-verify judges it. It is optional."""

import importlib.metadata
from functools import lru_cache

from esr_distill.input_error import InputError

INSTALL = 'pip install "math-verify[antlr4_13_2]"'
TIMEOUT_SECONDS = 5


def require_math_verify(option: str, value: str) -> None:
    """Raise InputError with the command that installs math-verify, where it cannot be imported."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{option} must be one whose package is installed, got {value!r}, which needs math-verify ({error}): {INSTALL}"
        ) from None


def math_verify_version() -> str:
    return importlib.metadata.version("math-verify")


@lru_cache(maxsize=4096)
def read_mathematics(answer: str) -> tuple:
    """What math-verify reads in an answer: an expression of sympy where it finds one, and the text it took; () for nothing."""
    from math_verify import parse

    return tuple(parse(rf"\boxed{{{answer}}}", parsing_timeout=TIMEOUT_SECONDS))


@lru_cache(maxsize=65536)
def is_same_mathematics(expected: str, answer: str) -> bool:
    """Whether `answer` is `expected` by math-verify's own rules, which also accept "x = 5" for "5" and "5 cm" for "5".

    A comparison that takes more than 5 s counts as different. Only in the main thread: it ends by an alarm.
    """
    from math_verify import verify

    return verify(list(read_mathematics(expected)), list(read_mathematics(answer)), timeout_seconds=TIMEOUT_SECONDS)
