"""The classes of token ids: a JSON file {"785": "planning", ...} that a rule of kind token_classes reads."""

import functools
import json
from pathlib import Path

from esr_distill.config import SelectionRule
from esr_distill.input_error import InputError

OPTION = "selection.rules.table"


def ids_of_rule(rule: SelectionRule) -> list[int]:
    """The ids that a rule of kind token_ids or token_classes names.

    Raises:
        InputError: a table that cannot be read, or that has not one id in a class that is asked for.
    """
    if rule.kind == "token_ids":
        return rule.token_ids
    table = read_table(rule.table)
    missing = sorted(set(rule.classes) - set(table.values()))
    if missing:
        known = ", ".join(sorted(set(table.values())))
        raise InputError(f"selection.rules.classes must be classes of {rule.table} ({known}), got {missing[0]!r}")
    return [token_id for token_id, name in table.items() if name in rule.classes]


@functools.cache  # a table that is edited during a run must not change it
def read_table(path: str) -> dict[int, str]:
    """Raises InputError where the file is not a JSON object of ids and names."""
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError) as error:
        raise InputError(f"{OPTION} must be a JSON file of ids and classes, got {path!r} ({error})") from None
    table: dict[int, str] = {}
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    for key, name in pairs if is_object else [(pairs, None)]:
        if not (isinstance(key, str) and key.isdecimal() and isinstance(name, str)):
            raise InputError(f'{OPTION} must hold pairs such as "785": "planning", got {key!r}: {name!r} in {path!r}')
        if int(key) in table:
            raise InputError(f"{OPTION} must hold each id once, got {key} twice in {path!r}")
        table[int(key)] = name
    return table
