"""How an option says what it must be."""

import math

from esr_distill.input_error import InputError


def require(condition: bool, option: str, must_be: str, value: object) -> None:
    """Raises InputError where a float is not finite, or the condition does not hold."""
    require_finite(option, value)
    if not condition:
        raise InputError(f"{option} must be {must_be}, got {value!r}")


def require_finite(option: str, value: object) -> None:
    """Raises InputError where a float is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{option} must be a finite number, got {value!r}")
