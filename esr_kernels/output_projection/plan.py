"""How an op that starts from hidden states runs under `Impl.FUSED`, as pure functions of sizes and a budget in bytes."""

from enum import Enum
from typing import NamedTuple

import torch

from esr_kernels.logit_storage import LogitStorage
from esr_kernels.tile_config import TILE_COLUMNS

# At 4224 rows the tiles of the large matrix products fill an H100 or H200 (132 multiprocessors) in whole waves; more rows
# gain nothing. Below 2112 rows they start to leave it idle, below 1056 they leave it half idle.
MAX_CHUNK_ROWS = 4224
GOOD_CHUNK_ROWS = 2112
POOR_CHUNK_ROWS = 1056

# Columns that are projected at once for tile-relative storage: both float32 slices of 2112 rows are 35 MB, which stay in the
# L2 cache of an H100 or H200.
PROJECTION_COLUMNS = 2048

CPU_WORKSPACE_BYTES = 2**30


class Schedule(str, Enum):
    """What forward leaves for backward. In units of one student projection, alone and with a teacher of twice the width.

    `VALUE`: nothing; no gradient is wanted. 1 unit; 3 with a teacher.
    `HIDDEN`: the gradient of the hidden states for unit upstream; the head is frozen. 2; 4.
    `KEEP`: d(logits) of all rows; the two gradients are two more products. 3; 5.
    `RECOMPUTE`: nothing; backward projects again, chunk by chunk. 4; 8.
    """

    VALUE = "value"
    HIDDEN = "hidden"
    KEEP = "keep"
    RECOMPUTE = "recompute"


class LinearPlan(NamedTuple):
    schedule: Schedule
    storage: LogitStorage  # never AUTO
    chunk_rows: int  # rows whose logits exist at one time, >= 1


def padded_vocab_size(vocab_size: int) -> int:
    """Width of a stored row: whole tiles, so that rows are aligned for wide loads whatever the vocabulary."""
    return -(-vocab_size // TILE_COLUMNS) * TILE_COLUMNS


def logit_bytes_per_row(vocab_size: int, storage: LogitStorage, gradient_itemsize: int, *, num_sides: int = 2) -> int:
    """Bytes that one row of a chunk takes: the logits of each side, and what is needed to make them.

    d(logits) is written over the student's logits, where it fits.
    """
    width = padded_vocab_size(vocab_size)
    if storage is LogitStorage.FLOAT32:
        return num_sides * 4 * width
    slice_bytes = 4 * min(width, PROJECTION_COLUMNS)
    gradient_bytes = gradient_itemsize * width if gradient_itemsize > 2 else 0
    return num_sides * (2 * width + 4 * width // TILE_COLUMNS + slice_bytes) + gradient_bytes


def plan_linear_op(
    op: str,
    num_rows: int,
    vocab_size: int,
    *,
    num_sides: int,
    needs_hidden_gradient: bool,
    needs_head_gradient: bool,
    gradient_itemsize: int,
    storage: LogitStorage,
    workspace_bytes: int,
) -> LinearPlan:
    """Choose schedule, storage and chunk so that logits and kept d(logits) fit in `workspace_bytes`.

    - d(logits) are kept if the head needs a gradient and what is left of the budget holds the logits of 1056 rows.
    - AUTO stores float32 while 2112 rows, or all, fit; else the storage that lets more rows fit.
    - A chunk takes as many rows as fit, at most 4224, in multiples of 128 where there are as many.

    `num_sides` is 2 where a teacher is projected too, else 1; `gradient_itemsize` 2 where d(logits) are float16, else 4.

    Raises:
        ValueError: the budget does not hold one row.
    """
    wanted_rows = max(1, min(num_rows, MAX_CHUNK_ROWS))
    candidates = (LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16) if storage is LogitStorage.AUTO else (storage,)
    row_bytes = {s: logit_bytes_per_row(vocab_size, s, gradient_itemsize, num_sides=num_sides) for s in candidates}
    smallest = min(row_bytes.values())
    if workspace_bytes < smallest:
        raise ValueError(
            f"{op}: workspace_bytes must be at least {smallest}, the logits of one row of {vocab_size} ids, got "
            f"{workspace_bytes}"
        )

    if needs_head_gradient:
        kept_bytes = num_rows * padded_vocab_size(vocab_size) * gradient_itemsize
        fits = workspace_bytes - kept_bytes >= smallest * min(wanted_rows, POOR_CHUNK_ROWS)
        schedule = Schedule.KEEP if fits else Schedule.RECOMPUTE
        if fits:
            workspace_bytes -= kept_bytes
    else:
        schedule = Schedule.HIDDEN if needs_hidden_gradient else Schedule.VALUE

    def fitting_rows(storage: LogitStorage) -> int:
        return min(wanted_rows, workspace_bytes // row_bytes[storage])

    chosen = candidates[0]
    if len(candidates) > 1 and fitting_rows(chosen) < min(wanted_rows, GOOD_CHUNK_ROWS):
        chosen = chosen if fitting_rows(chosen) >= fitting_rows(candidates[1]) else candidates[1]
    chunk_rows = fitting_rows(chosen)
    if chunk_rows < num_rows and chunk_rows >= 128:
        chunk_rows -= chunk_rows % 128
    return LinearPlan(schedule, chosen, chunk_rows)


def default_workspace_bytes(device: torch.device) -> int:
    """A sixteenth of the device's memory (8.8 GB of an H200, 5 GB of 80 GB, 1.5 GB of 24 GB); 1 GiB on a CPU."""
    if device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    return torch.cuda.get_device_properties(device).total_memory // 16
