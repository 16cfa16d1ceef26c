"""Files and folders that appear whole or not at all, so that whatever is there can be used."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esr_distill.input_error import InputError


class WriteError(InputError):
    """A file that could not be written: a full disk, most often."""


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Whatever a library raises in the block because `target` could not be written becomes a WriteError that names it."""
    try:
        yield
    except Exception as error:
        reason = _why_not_written(error)
        if reason is None:
            raise
        raise WriteError(f"{target} could not be written ({reason})") from error


def _why_not_written(error: Exception) -> str | None:
    # safetensors and tokenizers raise what is no OSError and says "os error 28"; torch.save raises an error of its own archive
    # while that of the file is handled
    for found in (error, error.__context__):
        if isinstance(found, OSError):
            return found.strerror or str(found)
    return str(error) if "os error" in str(error) else None


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends without an exception, and is removed if not.

    An older `target` is replaced only then. The files are on the disk before they get their name.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes `target` if the block ends without an exception, and is removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text; readers see the old file or the new one."""
    with complete_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: dict) -> None:
    """Write JSON; readers see the old file or the new one."""
    write_text(target, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
