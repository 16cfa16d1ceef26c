"""What a check found, and what to do about it."""

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warning", "error"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        check: what was looked at, in a word or two.
        level: an error stops a run or makes it worthless; a warning is worth a thought.
        message: what was found.
        fix: what to do, for a warning or an error.
        values: the numbers behind the message, as JSON values.
    """

    check: str
    level: Level
    message: str
    fix: str | None = None
    values: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.level == "ok") != (self.fix is None):
            raise ValueError(
                f"{self.check}: a fix belongs to a warning or an error, got {self.level} with {self.fix!r}"
            )
