"""Prompts of a parquet file, through the optional package pyarrow."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_sources.record import PromptColumns, PromptRecord


@dataclass(frozen=True)
class ParquetFile:
    """Rows are prompts; only the columns that are kept are read. `option` is the name of the option that gave the path."""

    path: Path
    option: str
    columns: PromptColumns = field(default_factory=PromptColumns)

    def records(self) -> Iterator[PromptRecord]:
        """The prompts in their order.

        Raises:
            InputError: pyarrow is not installed, no such file, no parquet, or a row without a prompt.
        """
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise InputError(
                f"{self.option} must be a JSONL file where pyarrow is not installed, got {str(self.path)!r}; "
                "pip install pyarrow"
            ) from None
        where = f"{self.option}: {self.path}"
        try:
            with parquet.ParquetFile(self.path) as file:
                names = self.columns.select(file.schema_arrow.names, where)
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=names):
                    for fields in batch.to_pylist():
                        number += 1
                        yield self.columns.record(fields, f"{where}, row {number}")
        except (OSError, ArrowException) as error:
            raise InputError(
                f"{self.option} must be a readable parquet file, got {str(self.path)!r} ({_first_line(error)})"
            ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
