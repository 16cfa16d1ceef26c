"""Which schedule, storage and chunk does `linear_divergence` take for which sizes and budget?

`pytest tests/kernels/test_linear_divergence_plan.py`
"""

import pytest
import torch

from esr_kernels import LogitStorage
from esr_kernels.output_projection.plan import (
    CPU_WORKSPACE_BYTES,
    LinearPlan,
    Schedule,
    default_workspace_bytes,
    logit_bytes_per_row,
    padded_vocab_size,
    plan_linear_op,
)

AUTO, FLOAT32, TILE_RELATIVE = LogitStorage.AUTO, LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16
QWEN_VOCAB = 151936
GB = 10**9


def plan(
    rows: int, gb: float, *, vocab_size: int = QWEN_VOCAB, hidden=True, head=True, itemsize=2, storage=AUTO, num_sides=2
) -> LinearPlan:
    return plan_linear_op(
        "linear_divergence",
        rows,
        vocab_size,
        num_sides=num_sides,
        needs_hidden_gradient=hidden,
        needs_head_gradient=head,
        gradient_itemsize=itemsize,
        storage=storage,
        workspace_bytes=int(gb * GB),
    )


@pytest.mark.parametrize(
    "hidden, head, expected",
    [
        (False, False, Schedule.VALUE),
        (True, False, Schedule.HIDDEN),
        (False, True, Schedule.KEEP),
        (True, True, Schedule.KEEP),
    ],
)
def test_the_schedule_follows_what_needs_a_gradient(hidden, head, expected):
    assert plan(3200, 8.8, hidden=hidden, head=head).schedule is expected


# Bytes a row: 151,936 * 8 = 1.215 MB in float32; 151,936 * 4 + 2 * 1187 * 4 + 2 * 2048 * 4 = 0.634 MB tile-relative.
# Kept d(logits): 151,936 * 2 = 0.304 MB.
@pytest.mark.parametrize(
    "rows, gb, expected",
    [
        (3200, 8.8, LinearPlan(Schedule.KEEP, FLOAT32, 3200)),  # an H200: 0.97 GB kept, 3.89 GB of logits
        (3200, 5.0, LinearPlan(Schedule.KEEP, FLOAT32, 3200)),  # 80 GB: all rows still fit beside the kept ones
        (3200, 3.6, LinearPlan(Schedule.KEEP, FLOAT32, 2048)),  # 2162 rows fit, cut to a multiple of 128
        (3200, 2.9, LinearPlan(Schedule.KEEP, TILE_RELATIVE, 2944)),  # 3042 rows fit; of float32 only 1585 would
        (3200, 1.65, LinearPlan(Schedule.KEEP, TILE_RELATIVE, 1024)),  # 1068 rows fit: just enough to keep
        (3200, 1.6, LinearPlan(Schedule.RECOMPUTE, TILE_RELATIVE, 2432)),  # 990 rows would be too few
        (64000, 8.8, LinearPlan(Schedule.RECOMPUTE, FLOAT32, 4224)),  # 19.4 GB to keep; a chunk is 5.13 GB
        (64000, 24.6, LinearPlan(Schedule.KEEP, FLOAT32, 4224)),
        (0, 8.8, LinearPlan(Schedule.KEEP, FLOAT32, 1)),
        (1, 0.002, LinearPlan(Schedule.KEEP, FLOAT32, 1)),
    ],
)
def test_auto_takes_float32_until_its_chunks_grow_short(rows, gb, expected):
    assert plan(rows, gb) == expected


# Of one side, which is all that the log-prob ops and the top-k divergence project: 151,936 * 4 = 0.608 MB in float32;
# 151,936 * 2 + 1187 * 4 + 2048 * 4 = 0.317 MB tile-relative. The kept d(logits) are the same 0.304 MB.
@pytest.mark.parametrize(
    "rows, gb, expected",
    [
        (3200, 8.8, LinearPlan(Schedule.KEEP, FLOAT32, 3200)),  # 0.97 GB kept, 1.94 GB of logits
        (3200, 2.92, LinearPlan(Schedule.KEEP, FLOAT32, 3200)),  # 2.917 GB is the least that needs no chunks
        (3200, 2.3, LinearPlan(Schedule.KEEP, FLOAT32, 2176)),  # 2184 rows fit, cut to a multiple of 128
        (3200, 2.2, LinearPlan(Schedule.KEEP, TILE_RELATIVE, 3200)),  # of float32 only 2019 would fit
        (3200, 1.31, LinearPlan(Schedule.KEEP, TILE_RELATIVE, 1024)),  # 1065 rows fit: just enough to keep
        (3200, 1.3, LinearPlan(Schedule.RECOMPUTE, FLOAT32, 2048)),  # 1034 would be too few; 2139 in float32
        (64000, 8.8, LinearPlan(Schedule.RECOMPUTE, FLOAT32, 4224)),
        (64000, 22.1, LinearPlan(Schedule.KEEP, FLOAT32, 4224)),
        (0, 8.8, LinearPlan(Schedule.KEEP, FLOAT32, 1)),
        (1, 0.00092, LinearPlan(Schedule.KEEP, FLOAT32, 1)),
    ],
)
def test_a_plan_of_one_side_counts_one_side(rows, gb, expected):
    assert plan(rows, gb, num_sides=1) == expected


@pytest.mark.parametrize("num_sides", [1, 2])
@pytest.mark.parametrize("storage", [FLOAT32, TILE_RELATIVE])
@pytest.mark.parametrize("rows, gb", [(3200, 8.8), (3200, 1.6), (64000, 3.0), (7, 0.01)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head", [False, True])
def test_a_named_storage_is_taken_and_the_budget_kept(storage, rows, gb, itemsize, head, num_sides):
    chosen = plan(rows, gb, storage=storage, itemsize=itemsize, head=head, num_sides=num_sides)
    assert chosen.storage is storage and 1 <= chosen.chunk_rows <= rows
    kept = rows * padded_vocab_size(QWEN_VOCAB) * itemsize if chosen.schedule is Schedule.KEEP else 0
    row_bytes = logit_bytes_per_row(QWEN_VOCAB, storage, itemsize, num_sides=num_sides)
    assert kept + chosen.chunk_rows * row_bytes <= gb * GB


@pytest.mark.parametrize(
    "storage, itemsize, expected",
    [
        (FLOAT32, 2, 2 * 1024 * 4),
        (FLOAT32, 4, 2 * 1024 * 4),  # float32 gradients overwrite float32 logits
        (TILE_RELATIVE, 2, 2 * 1024 * 2 + 2 * 8 * 4 + 2 * 1024 * 4),
        (TILE_RELATIVE, 4, 2 * 1024 * 2 + 2 * 8 * 4 + 2 * 1024 * 4 + 1024 * 4),
    ],
)
def test_bytes_of_a_row_are_those_of_the_padded_width(storage, itemsize, expected):
    assert logit_bytes_per_row(1000, storage, itemsize) == expected


@pytest.mark.parametrize(
    "storage, itemsize, expected",
    [
        (FLOAT32, 2, 1024 * 4),
        (FLOAT32, 4, 1024 * 4),
        (TILE_RELATIVE, 2, 1024 * 2 + 8 * 4 + 1024 * 4),
        (TILE_RELATIVE, 4, 1024 * 2 + 8 * 4 + 1024 * 4 + 1024 * 4),  # d(logits) in float32 fit over no float16 logits
    ],
)
def test_bytes_of_a_row_of_one_side(storage, itemsize, expected):
    assert logit_bytes_per_row(1000, storage, itemsize, num_sides=1) == expected


@pytest.mark.parametrize("vocab_size, expected", [(1, 128), (128, 128), (50257, 50304), (151936, 151936)])
def test_rows_are_padded_to_whole_tiles(vocab_size, expected):
    assert padded_vocab_size(vocab_size) == expected


def test_a_budget_below_one_row_raises_with_the_least_that_would_do():
    row_bytes = logit_bytes_per_row(1000, FLOAT32, 4)
    message = rf"workspace_bytes must be at least {row_bytes}, the logits of one row of 1000 ids, got {row_bytes - 1}"
    with pytest.raises(ValueError, match=message):
        plan(5, (row_bytes - 1) / GB, vocab_size=1000, storage=FLOAT32, itemsize=4)
    assert plan(5, row_bytes / GB, vocab_size=1000, storage=FLOAT32, itemsize=4).chunk_rows == 1


def test_the_default_budget_without_a_gpu():
    assert default_workspace_bytes(torch.device("cpu")) == CPU_WORKSPACE_BYTES


@pytest.mark.gpu
def test_the_default_budget_is_a_sixteenth_of_the_gpu():
    total = torch.cuda.get_device_properties(0).total_memory
    assert default_workspace_bytes(torch.device("cuda")) == total // 16
