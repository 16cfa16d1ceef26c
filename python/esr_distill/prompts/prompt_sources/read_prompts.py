"""From the option `data.prompts` to the prompts: which kind of source it names, and its records."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_sources.datasets_library import (
    HUB_NAME,
    is_saved_dataset,
    open_hub_dataset,
    open_saved_dataset,
)
from esr_distill.prompts.prompt_sources.jsonl_file import JsonlFile
from esr_distill.prompts.prompt_sources.parquet_file import ParquetFile
from esr_distill.prompts.prompt_sources.record import PromptColumns, PromptRecord

FILE_ENDINGS = (".jsonl", ".json", ".xz", ".gz", ".parquet")


class PromptSource(Protocol):
    """Where prompts come from. It can be read any number of times and always gives the same."""

    def records(self) -> Iterator[PromptRecord]:
        """The prompts from the first on."""


@dataclass(frozen=True)
class JoinedFiles:
    """The prompts of several files, one file after another."""

    files: tuple[JsonlFile | ParquetFile, ...]

    def records(self) -> Iterator[PromptRecord]:
        for file in self.files:
            yield from file.records()


def read_prompts(data: DataConfig, option: str = "data.prompts") -> list[PromptRecord] | PromptSource:
    """All prompts; with `data.stream_prompts` the source, of which only the first prompt was read.

    Raises:
        InputError: no such source, a package for it that is missing, no prompt, or a prompt that is none.
    """
    source = open_source(data, option)
    records = list(source.records()) if data.stream_prompts is None else [*_first(source)]
    _check_not_empty(records, data.prompts, option)
    return records if data.stream_prompts is None else source


def read_prompt_file(path: str | Path, option: str) -> list[PromptRecord]:
    """All prompts of a JSONL file with "prompt" and, where there is one, "answer".

    Raises:
        InputError: no such file, no UTF-8 text, no lines, or a line that is not an object with a "prompt".
    """
    records = list(JsonlFile(Path(path), option).records())
    _check_not_empty(records, str(path), option)
    return records


def open_source(data: DataConfig, option: str) -> PromptSource:
    """Raises InputError where `data.prompts` names nothing, or options are set that are not of its kind of source."""
    path = Path(data.prompts)
    if data.prompts.startswith("hf://") or (not path.exists() and _is_hub_name(data.prompts)):
        return open_hub_dataset(data, option)
    _require_unset("dataset_config", data, "a data set of the hub")
    if path.is_dir() and is_saved_dataset(path):
        return open_saved_dataset(data, option)
    _require_unset("split", data, "a data set of datasets")
    if path.is_dir() or (not path.exists() and glob.has_magic(data.prompts)):
        pattern = f"{glob.escape(data.prompts)}/*.parquet" if path.is_dir() else data.prompts
        names = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not names:
            wanted = (
                "a folder saved by datasets or with parquet files" if path.is_dir() else "a pattern that files match"
            )
            raise InputError(f"{option} must be {wanted}, got {data.prompts!r}, which has none")
        return JoinedFiles(tuple(_open_file(Path(name), data, option) for name in names))
    if not path.exists() and not data.prompts.endswith(FILE_ENDINGS):
        raise InputError(
            f"{option} must be a file, a folder or a data set (owner/name or hf://NAME), "
            f"got {data.prompts!r}, which does not exist"
        )
    return _open_file(path, data, option)


def _open_file(path: Path, data: DataConfig, option: str) -> JsonlFile | ParquetFile:
    kind = ParquetFile if path.suffix == ".parquet" else JsonlFile
    return kind(path, option, PromptColumns.of(data))


def _is_hub_name(name: str) -> bool:
    """owner/name, without an ending of a file that is only missing."""
    found = HUB_NAME.fullmatch(name)
    return found is not None and name.count("/") == 1 and name[0] not in "./~" and not name.endswith(FILE_ENDINGS)


def _require_unset(name: str, data: DataConfig, kind: str) -> None:
    if getattr(data, name) is not None:
        raise InputError(
            f"data.{name} must be unset unless data.prompts is {kind}, "
            f"got {getattr(data, name)!r} with {data.prompts!r}"
        )


def _first(source: PromptSource) -> Iterator[PromptRecord]:
    for record in source.records():
        yield record
        return


def _check_not_empty(records: list[PromptRecord], name: str, option: str) -> None:
    if not records:
        raise InputError(f"{option} must hold at least one prompt, got {name!r}, which is empty")
