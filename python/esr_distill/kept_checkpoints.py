"""Which checkpoints a run has, which is its best, and which may go."""

import re
import shutil
from pathlib import Path

from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics

FOLDER = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if FOLDER.fullmatch(p.name)), key=checkpoint_step)


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def latest_checkpoint(output_dir: Path) -> Path:
    """The newest complete checkpoint. Raises InputError where there is none."""
    checkpoints = find_checkpoints(output_dir)
    if not checkpoints:
        raise InputError(
            f"--resume must name the folder of a run with a checkpoint, got {str(output_dir)!r}, which has none"
        )
    return checkpoints[-1]


def evaluation_at(output_dir: Path, step: int) -> dict | None:
    """What evaluation measured after `step` steps, None where it was not asked."""
    path = output_dir / "metrics.jsonl"
    records = read_metrics(path, "evaluation") if path.is_file() else []
    return next((record for record in records if record["step"] == step), None)


def best_checkpoint(output_dir: Path, measure: str) -> Path | None:
    """The checkpoint with the highest `measure` of evaluation, the first of equal ones; None where none was evaluated.

    Of the checkpoints that are there. Since the best is kept whenever others go, it is the best of all that were written.
    """
    best, best_value = None, None
    for folder in find_checkpoints(output_dir):
        record = evaluation_at(output_dir, checkpoint_step(folder))
        if record is not None and (best is None or record[measure] > best_value):
            best, best_value = folder, record[measure]
    return best


def remove_checkpoints(output_dir: Path, *, newest: int, keep_best: str | None) -> None:
    """Remove all but the `newest` ones and the best. A removal that is cut off leaves no half of a checkpoint under its name."""
    kept = find_checkpoints(output_dir)[-newest:]
    if keep_best is not None:
        kept.append(best_checkpoint(output_dir, keep_best))
    for folder in find_checkpoints(output_dir):
        if folder not in kept:
            folder.rename(folder.with_name(f".{folder.name}.removed"))
    for leftover in output_dir.glob(".checkpoint-*.removed"):
        shutil.rmtree(leftover)
