"""How an option says what it must be."""

import math

from esr_distill.input_error import InputError


def require(condition: bool, option: str, must_be: str, value: object) -> None:
    """Raises InputError where the condition does not hold, or a float is not finite."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not (condition and is_finite):
        raise InputError(f"{option} must be {must_be}, got {value!r}")
