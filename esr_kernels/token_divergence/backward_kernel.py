"""One program per row: the gradient with respect to the student's logits from the sums that the forward kernel kept.

Both rows are read once and the gradient is written once, multiplied by the upstream gradient in float32 before it is rounded.
Bytes per logit: 1 read of each row, 1 write. Memory: the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS
from esr_kernels.logit_row_kernel import write_zero_row
from esr_kernels.logit_rows import LogitRows
from esr_kernels.tile_config import TileConfig, choose_tile_config
from esr_kernels.token_divergence.gradient_kernel import write_gradient_row
from esr_kernels.token_divergence.row_tensors import RowState


@triton.jit(
    do_not_specialize=["num_rows", "upstream_stride"],
    do_not_specialize_on_alignment=["upstream_ptr", "row_sums_ptr", "student_top1_ptr"],
)
def divergence_gradient_kernel(
    upstream_ptr, student_ptr, teacher_ptr, row_sums_ptr, student_top1_ptr, stop_ids_ptr, gradient_ptr,
    num_rows, vocab_size, upstream_stride,
    student_row_stride, student_column_stride, teacher_row_stride, teacher_column_stride, gradient_row_stride,
    slope, parameter, complement,
    DIVERGENCE: tl.constexpr, NUM_STOP_IDS: tl.constexpr, BLOCK_STOPS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    student_max = tl.load(row_sums_ptr + row)
    student_sum = tl.load(row_sums_ptr + num_rows + row)
    teacher_max = tl.load(row_sums_ptr + 2 * num_rows + row)
    teacher_sum = tl.load(row_sums_ptr + 3 * num_rows + row)
    total_cost = tl.load(row_sums_ptr + 4 * num_rows + row)
    gradient_row_ptr = gradient_ptr + row * gradient_row_stride
    # A row without upstream is not read: its gradient is 0 whatever it holds.
    if (upstream == 0) | (student_sum == 0):
        write_zero_row(gradient_row_ptr, vocab_size, BLOCK_VOCAB)
    else:
        write_gradient_row(
            gradient_row_ptr, student_ptr + row * student_row_stride, None, None,
            teacher_ptr + row * teacher_row_stride, None, None, stop_ids_ptr,
            vocab_size, student_column_stride, teacher_column_stride, slope, None, slope, None,
            student_max, student_sum, teacher_max, teacher_sum, tl.load(student_top1_ptr + row), total_cost, upstream,
            parameter, complement, DIVERGENCE, NUM_STOP_IDS, BLOCK_STOPS, BLOCK_VOCAB, False,
        )  # fmt: skip


def launch_divergence_gradient(
    upstream_N: Tensor,
    student: LogitRows,
    teacher: LogitRows,
    divergence: tuple[str, float],
    state: RowState,
    stop_ids: Tensor | None,
    vocab_size: int,
    *,
    tile: TileConfig | None = None,
) -> Tensor:
    """upstream_N * d(divergence_N)/d(student logits), (N, width of the student's logits) in their dtype, contiguous.

    Columns from `vocab_size` on are 0. `student` and `teacher` are plain logits with one temperature: no bias, no soft cap.
    """
    gradient_N_V = torch.empty_like(student.logits, memory_format=torch.contiguous_format)
    num_rows = gradient_N_V.shape[0]
    if num_rows == 0:
        return gradient_N_V
    gradient_N_V[:, vocab_size:] = 0
    name, parameter = divergence
    num_stop_ids = 0 if stop_ids is None else stop_ids.shape[0]
    tile = tile or choose_tile_config(vocab_size)
    with torch.accelerator.device_index(gradient_N_V.device.index):
        divergence_gradient_kernel[(num_rows,)](
            upstream_N,
            student.logits,
            teacher.logits,
            state.sums_5_N,
            state.student_top1_N,
            stop_ids,
            gradient_N_V,
            num_rows,
            vocab_size,
            upstream_N.stride(0),
            *student.logits.stride(),
            *teacher.logits.stride(),
            gradient_N_V.stride(0),
            student.slope,
            parameter,
            1.0 - parameter,
            DIVERGENCE=DIVERGENCE_KERNELS[name].function,
            NUM_STOP_IDS=num_stop_ids,
            BLOCK_STOPS=triton.next_power_of_2(max(1, num_stop_ids)),
            BLOCK_VOCAB=tile.block_vocab,
            **tile.launch_options(),
        )
    return gradient_N_V
