"""Tile-relative float16 storage: small numbers in place of logits, so that 16 bits keep what the gradient depends on.

    student    logit - maximum of its 128 columns
    teacher    (if there is one) the same, minus the student's, where the student is stored as -8 or more; else the same

The student's logits that matter lie near the maximum of their tile, where float16 is fine-grained; far below it the
probability is small and a coarse step costs nothing. The gradient depends on the difference of the two sides, which float16
keeps to 2^-11 of itself: so the error does not grow as the models come together. Measured in docs/numerics.md.
"""

import torch
import triton
import triton.language as tl

from esr_kernels.logit_row_kernel import is_stored_as_difference, load_head_logits, tile_columns
from esr_kernels.logit_rows import LogitRows
from esr_kernels.online_logsumexp import finite_max
from esr_kernels.tile_config import TileConfig

TILE = TileConfig(block_vocab=2048, num_warps=4)
NO_ROWS = LogitRows(logits=None, slope=0.0)  # one side alone


@triton.jit
def tile_maximum(logits):
    return finite_max(tl.max(logits, axis=1, keep_dims=True))


@triton.jit
def keep_finite(relative, logits):
    """A finite logit stays finite: 65504 below its tile's maximum it is as good as absent, but not masked."""
    bounded = tl.clamp(relative, -65504.0, 65504.0, tl.PropagateNan.ALL)
    return tl.where(logits == float("-inf"), logits, bounded)


@triton.jit
def store_tile_relative_kernel(
    student_ptr, student_bias_ptr, teacher_ptr, teacher_bias_ptr,
    student_relative_ptr, student_tile_max_ptr, teacher_relative_ptr, teacher_tile_max_ptr,
    num_columns, student_row_stride, teacher_row_stride, student_relative_row_stride, teacher_relative_row_stride,
    tile_max_row_stride, student_slope, student_softcap, teacher_slope, teacher_softcap,
    BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, tile_index = tile_columns(tl.program_id(1) * BLOCK_VOCAB, BLOCK_VOCAB)
    is_inside = columns < num_columns
    student_logits = load_head_logits(
        student_ptr + row * student_row_stride, student_bias_ptr, 1, student_slope, student_softcap, columns, is_inside
    )
    if teacher_ptr is not None:  # loaded before anything is stored, so that both loads are under way together
        teacher_logits = load_head_logits(
            teacher_ptr + row * teacher_row_stride,
            teacher_bias_ptr,
            1,
            teacher_slope,
            teacher_softcap,
            columns,
            is_inside,
        )
    tile_index = tile_index[:, None]
    has_tile = tile_index * 128 < num_columns

    student_tile_max = tile_maximum(student_logits)
    student_exact = student_logits - student_tile_max
    student_relative = keep_finite(student_exact, student_logits).to(tl.float16)
    tl.store(student_relative_ptr + row * student_relative_row_stride + columns, student_relative, mask=is_inside)
    tl.store(student_tile_max_ptr + row * tile_max_row_stride + tile_index, student_tile_max, mask=has_tile)

    if teacher_ptr is not None:
        teacher_tile_max = tile_maximum(teacher_logits)
        teacher_relative = teacher_logits - teacher_tile_max
        # To the exact student, not the stored one: the difference then has an error of its own size, and both sides share
        # the error of the student's logit, which multiplies p and q alike.
        is_difference = is_stored_as_difference(student_relative.to(tl.float32))
        teacher_relative = tl.where(is_difference, teacher_relative - student_exact, teacher_relative)
        teacher_relative = keep_finite(teacher_relative, teacher_logits).to(tl.float16)
        tl.store(teacher_relative_ptr + row * teacher_relative_row_stride + columns, teacher_relative, mask=is_inside)
        tl.store(teacher_tile_max_ptr + row * tile_max_row_stride + tile_index, teacher_tile_max, mask=has_tile)


def launch_store_tile_relative(
    student: tuple[LogitRows, LogitRows], teacher: tuple[LogitRows, LogitRows] = (NO_ROWS, NO_ROWS)
) -> None:
    """Apply the rest of the heads and the temperature to (N, M) float32 logits, then store them tile-relative.

    Reads 4 bytes and writes 2 per column and side, and writes 4 per tile and side.

    Args:
        student, teacher: what is read, and what is written: its `logits` (N, M) float16 and `tile_max` (N, M / 128 rounded up)
            float32, last axes contiguous, both maxima with one row stride.
    """
    (student, student_out), (teacher, teacher_out) = student, teacher
    num_rows, num_columns = student_out.logits.shape
    if num_rows == 0:
        return
    with torch.accelerator.device_index(student_out.logits.device.index):
        store_tile_relative_kernel[(num_rows, triton.cdiv(num_columns, TILE.block_vocab))](
            student.logits,
            student.bias,
            teacher.logits,
            teacher.bias,
            student_out.logits,
            student_out.tile_max,
            teacher_out.logits,
            teacher_out.tile_max,
            num_columns,
            student.strides()[0],
            teacher.strides()[0],
            student_out.strides()[0],
            teacher_out.strides()[0],
            student_out.tile_max.stride(0),
            student.slope,
            student.softcap,
            teacher.slope,
            teacher.softcap,
            BLOCK_VOCAB=TILE.block_vocab,
            **TILE.launch_options(),
        )
