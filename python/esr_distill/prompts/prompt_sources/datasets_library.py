"""Prompts of a data set of the hub or of a folder saved by datasets, through the optional package datasets."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_sources.record import PromptColumns, PromptRecord

HUB_NAME = re.compile(r"(?:hf://(?:datasets/)?)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
# What datasets writes into a folder: the second is of several splits.
SAVED_DATASET, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class DatasetRows:
    """Rows of a Dataset or IterableDataset are prompts; every call of `records` begins at the first."""

    dataset: Any
    name: str
    option: str
    columns: PromptColumns

    def records(self) -> Iterator[PromptRecord]:
        """The prompts in their order.

        Raises:
            InputError: a missing column, or a row without a prompt.
        """
        where, dataset = f"{self.option}: {self.name}", self.dataset.with_format(None)  # plain values, no arrays
        if dataset.column_names is not None:  # a stream may not know its columns
            dataset = dataset.select_columns(self.columns.select(dataset.column_names, where))
        for number, fields in enumerate(dataset, 1):
            yield self.columns.record(fields, f"{where}, row {number}")


def open_hub_dataset(data: DataConfig, option: str) -> DatasetRows:
    """A split of a data set of the hub: in memory, or a stream where `data.stream_prompts` is set.

    Raises:
        InputError: datasets is not installed, or no such data set, configuration or split that can be reached.
    """
    datasets = _import_datasets(data.prompts, option)
    found = HUB_NAME.fullmatch(data.prompts)
    if found is None:
        raise InputError(f"{option} must be hf://NAME or hf://NAME@REVISION, got {data.prompts!r}")
    failures = (datasets.exceptions.DatasetsError, OSError, ValueError, ImportError, KeyError, RuntimeError)
    try:
        dataset = datasets.load_dataset(
            found["name"],
            data.dataset_config,
            split=data.split or "train",
            revision=found["revision"],
            streaming=data.stream_prompts is not None,
        )
    except failures as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = f"(data.dataset_config {data.dataset_config!r}, data.split {data.split or 'train'!r})"
        raise InputError(
            f"{option} must be a file, a folder or a data set that can be reached {wanted}, "
            f"got {data.prompts!r} ({first_line})"
        ) from error
    return DatasetRows(dataset, data.prompts, option, PromptColumns.of(data))


def open_saved_dataset(data: DataConfig, option: str) -> DatasetRows:
    """A data set, or one of its splits, that datasets saved into a local folder.

    Raises:
        InputError: datasets is not installed, the folder cannot be read, or it has no such split.
    """
    datasets = _import_datasets(data.prompts, option)
    try:
        dataset = datasets.load_from_disk(data.prompts)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{option} must be a folder saved by datasets, got {data.prompts!r} ({error})") from error
    if isinstance(dataset, dict):
        split = data.split or "train"
        if split not in dataset:
            raise InputError(f"data.split must be one of {list(dataset)} for {data.prompts!r}, got {split!r}")
        dataset = dataset[split]
    elif data.split is not None:
        raise InputError(f"data.split must be unset for {data.prompts!r}, which has no splits, got {data.split!r}")
    return DatasetRows(dataset, data.prompts, option, PromptColumns.of(data))


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS))


def _import_datasets(prompts: str, option: str) -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"{option} must be a JSONL or parquet file where datasets is not installed, got {prompts!r}; "
            "pip install datasets"
        ) from None
