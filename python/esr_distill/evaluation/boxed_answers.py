r"""Answers in boxes: \boxed{...} in a reply or a worked solution."""

import re

# Commands that only move what follows: with whitespace and "~", all that `without_spacing` removes.
SPACING_NAMES = "quad qquad enspace enskip thinspace medspace thickspace negthinspace space nobreakspace".split()
SPACING_COMMANDS = frozenset("\\" + name for name in [*",:;!> \n\t", *SPACING_NAMES])
BOX = re.compile(r"\\boxed\s*\{")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)


def boxes(text: str) -> list[str]:
    r"""Content of every closed box in order. Braces must balance; \{ and \} do not count. A box in a box belongs to the outer
    one, and one that is never closed (a reply that was cut) is none."""
    openings: list[tuple[int, bool]] = []  # where the content of each open brace starts, and whether it is a box's
    found: list[tuple[int, int]] = []
    place = 0
    while place < len(text):
        box = BOX.match(text, place)
        if box or text[place] == "{":
            place = box.end() if box else place + 1
            openings.append((place, box is not None))
            continue
        if text[place] == "}" and openings:
            start, is_box = openings.pop()
            if is_box:
                while found and found[-1][0] > start:
                    found.pop()  # inside this one
                found.append((start, place))
        place += 2 if text[place] == "\\" else 1
    return [text[start:end] for start, end in found]


def last_box(text: str) -> str | None:
    """Content of the last box; None where there is no box or nothing in it."""
    return _content(boxes(text)[-1:])


def first_box(text: str) -> str | None:
    """Content of the first box; None where there is no box or nothing in it."""
    return _content(boxes(text)[:1])


def _content(found: list[str]) -> str | None:
    return found[0].strip() or None if found else None


def without_spacing(latex: str) -> str:
    r"""`latex` without whitespace, "~" and spacing commands (\, \: \; \! \> "\ " \quad and the like), and nothing else changed.

    "1\,000" and "1 000" become "1000"; \frac12 and \frac{1}{2}, 0.5 and 1/2, \text{a} and a, 1,000 and 1000 stay different.
    """
    tokens = TOKEN.findall(latex)
    return "".join(token for token in tokens if token not in SPACING_COMMANDS and token != "~" and not token.isspace())
