"""How an option says what it must be."""

import math

from esr_distill.input_error import InputError


def require(condition: bool, option: str, must_be: str, value: object) -> None:
    """Raises InputError where a float is not finite, or the condition does not hold."""
    if isinstance(value, float) and not math.isfinite(value):
        must_be = "a finite number"
        condition = False
    if not condition:
        raise InputError(f"{option} must be {must_be}, got {value!r}")
