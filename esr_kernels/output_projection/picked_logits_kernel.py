"""The logits of a few ids per row, taken in float32 before the row is stored, and if wanted taken out of the row.

Storage in 16 bits costs 11 bits of a logit's distance to the largest of its tile. The ids that an op is asked about keep all
of their digits here; the row then serves their normalisation alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.logit_row_kernel import TAKEN_OUT, load_head_logits
from esr_kernels.logit_rows import LogitRows


class PickedLogits(NamedTuple):
    """`ids_n_K`: any integers; where one is no id of the vocabulary, its logit is -inf.

    `is_excluded`: the ids are taken out of the row, so that a sweep over it sees only the others.
    """

    ids_n_K: Tensor  # int32 or int64, contiguous
    logits_n_K: Tensor  # float32, contiguous; written
    is_excluded: bool


@triton.jit(do_not_specialize=["first_id"], do_not_specialize_on_alignment=["ids_ptr", "picked_ptr"])
def pick_logits_kernel(
    logits_ptr, bias_ptr, ids_ptr, picked_ptr,
    first_id, num_columns, row_stride, slope, softcap,
    NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr, IS_EXCLUDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_IDS)
    is_slot = slots < NUM_IDS
    columns = tl.load(ids_ptr + row * NUM_IDS + slots, mask=is_slot, other=-1) - first_id
    is_here = is_slot & (columns >= 0) & (columns < num_columns)
    row_ptr = logits_ptr + row * row_stride
    logits = load_head_logits(row_ptr, bias_ptr, 1, slope, softcap, columns, is_here)
    if IS_EXCLUDED:
        tl.debug_barrier()  # all slots of a repeated id read it before one takes it out
        tl.store(row_ptr + columns, TAKEN_OUT, mask=is_here)
    # The first slice of a row also writes what no slice holds.
    tl.store(picked_ptr + row * NUM_IDS + slots, logits, mask=is_here | (is_slot & (first_id == 0)))


def launch_pick_logits(logits: LogitRows, ids: slice, picked: PickedLogits) -> None:
    """Pick from rows of plain float32 logits that hold the columns `ids`; to be called for slices in ascending order.

    Reads and writes 4 bytes per id. `logits` has unit column stride.
    """
    num_rows, num_ids = picked.ids_n_K.shape
    if num_rows == 0 or num_ids == 0:
        return
    block_ids = triton.next_power_of_2(num_ids)
    with torch.accelerator.device_index(logits.logits.device.index):
        pick_logits_kernel[(num_rows,)](
            logits.logits,
            logits.bias,
            picked.ids_n_K,
            picked.logits_n_K,
            ids.start,
            ids.stop - ids.start,
            logits.logits.stride(0),
            logits.slope,
            logits.softcap,
            NUM_IDS=num_ids,
            BLOCK_IDS=block_ids,
            IS_EXCLUDED=picked.is_excluded,
            num_warps=max(1, min(8, block_ids // 128)),
        )
