"""Numbers that JSON has: what is not finite becomes None."""

import math


def finite_or_none(value: object) -> object:
    """The same value with None in place of every NaN and infinity, in lists and mappings too."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
