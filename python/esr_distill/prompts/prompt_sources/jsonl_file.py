"""Prompts of a JSONL file, plain or compressed."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_sources.record import PromptColumns, PromptRecord, shown

OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class JsonlFile:
    """One JSON object a line; empty lines are skipped. `option` is the name of the option that gave the path, for messages."""

    path: Path
    option: str
    columns: PromptColumns = field(default_factory=PromptColumns)

    def records(self) -> Iterator[PromptRecord]:
        """The prompts in their order.

        Raises:
            InputError: no such file, no UTF-8 text, or a line that is no object with a prompt.
        """
        path, option = self.path, self.option
        if not path.is_file():
            found = "is no file" if path.exists() else "does not exist"
            raise InputError(f"{option} must be a JSONL file, got {str(path)!r}, which {found}")
        try:
            with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield self._record(line, f"{option}: {path}, line {number}")
        except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{option} must be a readable JSONL file, got {str(path)!r} ({error})") from None

    def _record(self, line: str, where: str) -> PromptRecord:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} must be JSON, got {shown(line.strip())} ({error.msg})") from None
        return self.columns.record(fields, where)
