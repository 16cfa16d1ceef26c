"""One prompt with what stands beside it, checked where it is read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError

ANSWER = "answer"


@dataclass(frozen=True)
class PromptRecord:
    """A text or chat messages, and what stands beside them.

    Attributes:
        answer: the expected answer, where there is one.
        columns: every other column that is kept, by name.
        privileged_context: what only the teacher sees.
    """

    prompt: str | list[dict]
    answer: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    privileged_context: str | None = None


@dataclass(frozen=True)
class PromptColumns:
    """Which columns of a source mean what.

    Attributes:
        kept: columns kept beside prompt and answer; None keeps all.
        options: the option that named a column, for messages.
    """

    prompt: str = "prompt"
    privileged: str | None = None
    kept: tuple[str, ...] | None = None
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataConfig) -> "PromptColumns":
        kept = None if data.keep_columns is None else tuple(data.keep_columns)
        options = dict.fromkeys(kept or (), "data.keep_columns") | {data.prompt_column: "data.prompt_column"}
        if data.privileged_column is not None:
            options[data.privileged_column] = "data.privileged_column"
        return cls(data.prompt_column, data.privileged_column, kept, options)

    @property
    def required(self) -> list[str]:
        """Columns that must be there."""
        privileged = () if self.privileged is None else (self.privileged,)
        return list(dict.fromkeys((self.prompt, *privileged, *(self.kept or ()))))

    def select(self, names: Iterable[str], where: str) -> list[str]:
        """Which of a source's columns are read.

        Raises:
            InputError: one is missing.
        """
        names = list(names)
        for name in self.required:
            if name not in names:
                option = f" ({self.options[name]})" if name in self.options else ""
                found = ", ".join(map(repr, names)) or "none"
                raise InputError(f"{where} must have a column {name!r}{option}, got {found}")
        return names if self.kept is None else [name for name in names if name in (*self.required, ANSWER)]

    def record(self, fields: object, where: str) -> PromptRecord:
        """One row as a record. `where` says where it stands, for messages.

        Raises:
            InputError: no mapping, a column that is missing, a prompt that is neither text nor chat messages, or empty.
        """
        if not isinstance(fields, dict):
            raise InputError(f"{where} must be an object with a column {self.prompt!r}, got {shown(fields)}")
        names = self.select(fields, where)
        prompt, answer = fields[self.prompt], fields.get(ANSWER) if self.prompt != ANSWER else None
        beside = {name: fields[name] for name in names if name not in (self.prompt, self.privileged, ANSWER)}
        return PromptRecord(
            check_prompt(prompt, f"{where}, {self.prompt!r}"),
            None if answer is None else str(answer),
            beside,
            None if self.privileged is None else check_text(fields[self.privileged], f"{where}, {self.privileged!r}"),
        )


def check_text(value: object, where: str) -> str:
    """Raises InputError unless it is a text that is more than white space."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} must be a text that is not empty, got {shown(value)}")
    return value


def check_prompt(prompt: object, where: str) -> str | list[dict]:
    """A text, or chat messages without their empty fields (tables fill every field of every message with null).

    Raises:
        InputError: neither of both, empty, or messages that end with the assistant's.
    """
    if not isinstance(prompt, (str, list)) or not prompt:
        raise InputError(f"{where} must be a text or a list of chat messages and not empty, got {shown(prompt)}")
    if isinstance(prompt, str):
        return check_text(prompt, where)
    for number, message in enumerate(prompt, 1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise InputError(f"{where}, message {number} must have role and content, both text, got {shown(message)}")
    if prompt[-1]["role"] == "assistant":
        raise InputError(
            f"{where} must end before the assistant's turn, which the student writes, "
            f"got an answer as its last message, {shown(prompt[-1]['content'])}"
        )
    return [{name: value for name, value in message.items() if value is not None} for message in prompt]


def shown(value: object) -> str:
    """The first 60 characters of a value."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
