"""Is the file that says at which ids a model ends whole? transformers takes a damaged one for one that is not there."""

import json
from pathlib import Path

from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from esr_distill.input_error import InputError


def check_generation_file(source: str, option: str) -> None:
    """Look at generation_config.json of a local folder or a hub repository, where there is one.

    Raises:
        InputError: it is no JSON object, or its end-of-sequence ids are no ids.
    """
    path = find_generation_file(source)
    if path is None:
        return
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{option} must hold a {GENERATION_CONFIG_NAME} that can be read, or none, got {source!r} ({found})"
        ) from None
    if not isinstance(fields, dict):
        raise InputError(
            f"{option} must hold a {GENERATION_CONFIG_NAME} with an object, got {type(fields).__name__} in {source!r}"
        )
    named = fields.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    if named is not None and not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(
            f"{option} must hold a {GENERATION_CONFIG_NAME} whose eos_token_id is an id or a list of ids, "
            f"got {named!r} in {source!r}"
        )


def find_generation_file(source: str) -> Path | None:
    if Path(source).exists():
        path = Path(source) / GENERATION_CONFIG_NAME
        return path if path.is_file() else None
    try:
        return Path(cached_file(source, GENERATION_CONFIG_NAME))
    except (OSError, ValueError):  # none there, or no such repository, which the loading of a model says better
        return None
