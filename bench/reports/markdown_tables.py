"""Tables as Markdown."""

from collections.abc import Iterable

RULES = {"l": "---", "r": "---:"}


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]], alignment: str | None = None) -> str:
    """`alignment` has a letter for each column, l or r; by default the first is on the left, the others are on the right."""
    headings = list(headings)
    alignment = alignment or "l" + "r" * (len(headings) - 1)
    rule = [RULES[letter] for letter in alignment]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rule, *rows])
