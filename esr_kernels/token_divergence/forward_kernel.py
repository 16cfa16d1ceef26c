"""One program per row: divergence and statistics in an online sweep, the gradient, if wanted, in a second or third one.

Sweep 1 reads both rows once and keeps, relative to the running maxima, sum(e), sum(e * logit) and, for the two KLs, the
cross sum that gives their value. The other divergences need the normalised log-probabilities: sweep 2 reads the rows again.
The gradient sweep reads them once more and may write over the student's logits.

Bytes per logit: 1 read of each row for the KLs, 2 otherwise; with gradient one more read and a write. The later reads hit
the L2 cache as far as the rows in flight fit there. About 30 FLOP per logit: memory-bound. Memory: 13 numbers per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS
from esr_kernels.logit_row_kernel import is_stop_column, load_logit_pair, logsumexp, tile_columns, write_zero_row
from esr_kernels.logit_rows import LogitRows
from esr_kernels.online_logsumexp import (
    cross_term,
    finite_max,
    log_ratio_of,
    max_shift,
    move_cross_sum,
    move_entropy_sum,
    times_exp,
    update_top1,
)
from esr_kernels.row_gradient import NO_GRADIENT, RowGradient
from esr_kernels.tile_config import TileConfig, choose_tile_config
from esr_kernels.token_divergence.gradient_kernel import write_gradient_row
from esr_kernels.token_divergence.row_tensors import RowOutputs, RowState

# Rows of a chunk start anywhere in the tensors that hold one number per row.
PER_ROW_POINTERS = [
    "token_ids_ptr", "divergence_ptr", "student_entropy_ptr", "teacher_entropy_ptr", "student_logprob_ptr",
    "teacher_logprob_ptr", "top1_agreement_ptr", "row_sums_ptr", "student_top1_ptr", "gradient_unit_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=PER_ROW_POINTERS)
def divergence_row_kernel(
    student_ptr, student_tile_max_ptr, student_bias_ptr, teacher_ptr, teacher_tile_max_ptr, teacher_bias_ptr,
    token_ids_ptr, stop_ids_ptr,
    divergence_ptr, student_entropy_ptr, teacher_entropy_ptr, student_logprob_ptr, teacher_logprob_ptr,
    top1_agreement_ptr, row_sums_ptr, student_top1_ptr, gradient_ptr, gradient_unit_ptr,
    num_rows, vocab_size,
    student_row_stride, student_column_stride, student_tile_max_stride,
    teacher_row_stride, teacher_column_stride, teacher_tile_max_stride, gradient_row_stride,
    student_slope, student_softcap, teacher_slope, teacher_softcap, parameter, complement, gradient_bound_slope,
    DIVERGENCE: tl.constexpr, KL_DIRECTION: tl.constexpr, NUM_STOP_IDS: tl.constexpr, BLOCK_STOPS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr, IS_HALF_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_row_ptr = student_ptr + row * student_row_stride
    teacher_row_ptr = teacher_ptr + row * teacher_row_stride
    if student_tile_max_ptr is not None:
        student_tile_max_ptr += row * student_tile_max_stride
    if teacher_tile_max_ptr is not None:
        teacher_tile_max_ptr += row * teacher_tile_max_stride

    # The stop event stands for its ids: in the sweeps those are -inf, and the event itself is added afterwards.
    student_max = float("-inf")
    teacher_max = float("-inf")
    student_top1 = 2147483647
    teacher_top1 = 2147483647
    if NUM_STOP_IDS > 0:
        stop_slots = tl.arange(0, BLOCK_STOPS)
        stop_ids = tl.load(stop_ids_ptr + stop_slots, mask=stop_slots < NUM_STOP_IDS, other=0)
        student_event, teacher_event = load_logit_pair(
            student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
            teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
            vocab_size, stop_ids, stop_ids // 128, stop_slots < NUM_STOP_IDS, stop_slots < NUM_STOP_IDS,
        )  # fmt: skip
        student_event, student_event_log_sum = logsumexp(student_event)
        teacher_event, teacher_event_log_sum = logsumexp(teacher_event)
        student_max = student_event + student_event_log_sum
        teacher_max = teacher_event + teacher_event_log_sum
        student_top1 = tl.load(stop_ids_ptr)
        teacher_top1 = student_top1

    # Sweep 1, with e = exp(logit - running maximum): sum e, sum e * (logit - maximum), for a KL sum e * (their difference)
    zeros = tl.zeros((BLOCK_VOCAB // 128, 128), dtype=tl.float32)
    student_sum = zeros
    student_weighted = zeros
    teacher_sum = zeros
    teacher_weighted = zeros
    cross = zeros
    for start in range(0, vocab_size, BLOCK_VOCAB):
        columns, tile_index = tile_columns(start, BLOCK_VOCAB)
        is_inside = columns < vocab_size
        is_wanted = is_inside & ~is_stop_column(columns, stop_ids_ptr, NUM_STOP_IDS)
        student_logits, teacher_logits = load_logit_pair(
            student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
            teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
            vocab_size, columns, tile_index, is_inside, is_wanted,
        )  # fmt: skip

        student_tile_max = tl.max(student_logits)
        teacher_tile_max = tl.max(teacher_logits)
        student_top1 = update_top1(student_top1, student_max, student_tile_max, student_logits, columns)
        teacher_top1 = update_top1(teacher_top1, teacher_max, teacher_tile_max, teacher_logits, columns)
        student_new_max = tl.maximum(student_max, student_tile_max)
        teacher_new_max = tl.maximum(teacher_max, teacher_tile_max)
        student_shift = max_shift(student_max, student_new_max)
        teacher_shift = max_shift(teacher_max, teacher_new_max)
        student_rescale = tl.exp(student_shift)
        teacher_rescale = tl.exp(teacher_shift)

        student_shifted = student_logits - finite_max(student_new_max)
        teacher_shifted = teacher_logits - finite_max(teacher_new_max)
        student_exp = tl.exp(student_shifted)
        teacher_exp = tl.exp(teacher_shifted)
        if KL_DIRECTION == "reverse":
            cross = move_cross_sum(cross, student_sum, student_shift - teacher_shift, student_rescale)
            cross += cross_term(student_exp, student_shifted, teacher_shifted)
        if KL_DIRECTION == "forward":
            cross = move_cross_sum(cross, teacher_sum, teacher_shift - student_shift, teacher_rescale)
            cross += cross_term(teacher_exp, teacher_shifted, student_shifted)
        student_weighted = move_entropy_sum(student_weighted, student_sum, student_shift, student_rescale)
        student_weighted += times_exp(student_exp, student_shifted)
        student_sum = student_sum * student_rescale + student_exp
        teacher_weighted = move_entropy_sum(teacher_weighted, teacher_sum, teacher_shift, teacher_rescale)
        teacher_weighted += times_exp(teacher_exp, teacher_shifted)
        teacher_sum = teacher_sum * teacher_rescale + teacher_exp
        student_max = student_new_max
        teacher_max = teacher_new_max

    student_sum = tl.sum(student_sum)
    student_weighted = tl.sum(student_weighted)
    teacher_sum = tl.sum(teacher_sum)
    teacher_weighted = tl.sum(teacher_weighted)
    cross = tl.sum(cross)
    if NUM_STOP_IDS > 0:
        student_event_shifted = (student_event - finite_max(student_max)) + student_event_log_sum
        teacher_event_shifted = (teacher_event - finite_max(teacher_max)) + teacher_event_log_sum
        student_exp = tl.exp(student_event_shifted)
        teacher_exp = tl.exp(teacher_event_shifted)
        student_sum += student_exp
        teacher_sum += teacher_exp
        student_weighted += times_exp(student_exp, student_event_shifted)
        teacher_weighted += times_exp(teacher_exp, teacher_event_shifted)
        if KL_DIRECTION == "reverse":
            cross += cross_term(student_exp, student_event_shifted, teacher_event_shifted)
        if KL_DIRECTION == "forward":
            cross += cross_term(teacher_exp, teacher_event_shifted, student_event_shifted)

    is_masked = (student_sum == 0) | (teacher_sum == 0)
    student_log_sum = tl.log(student_sum)
    teacher_log_sum = tl.log(teacher_sum)
    log_sum_ratio = tl.log(student_sum / teacher_sum)

    # divergence and total_cost = sum(weighted_cost)
    if KL_DIRECTION == "reverse":
        divergence = cross / student_sum - log_sum_ratio
        total_cost = divergence
    elif KL_DIRECTION == "forward":
        divergence = cross / teacher_sum + log_sum_ratio
        total_cost = 0.0
    else:
        terms = zeros
        costs = zeros
        for start in range(0, vocab_size, BLOCK_VOCAB):
            columns, tile_index = tile_columns(start, BLOCK_VOCAB)
            is_inside = columns < vocab_size
            is_wanted = is_inside & ~is_stop_column(columns, stop_ids_ptr, NUM_STOP_IDS)
            student_shifted, teacher_shifted = load_logit_pair(
                student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
                teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
                vocab_size, columns, tile_index, is_inside, is_wanted,
            )  # fmt: skip
            student_shifted -= finite_max(student_max)
            teacher_shifted -= finite_max(teacher_max)
            log_ratio = log_ratio_of(student_shifted, teacher_shifted, log_sum_ratio)
            term, weighted_cost = DIVERGENCE(
                student_shifted - student_log_sum, teacher_shifted - teacher_log_sum, log_ratio, parameter, complement
            )
            terms += term
            costs += weighted_cost
        divergence = tl.sum(terms)
        total_cost = tl.sum(costs)
        if NUM_STOP_IDS > 0:
            log_ratio = log_ratio_of(student_event_shifted, teacher_event_shifted, log_sum_ratio)
            term, weighted_cost = DIVERGENCE(
                student_event_shifted - student_log_sum, teacher_event_shifted - teacher_log_sum, log_ratio,
                parameter, complement,
            )  # fmt: skip
            divergence += term
            total_cost += weighted_cost
    divergence = tl.where(is_masked, 0.0, divergence)
    is_nan = divergence != divergence
    total_cost = tl.where(is_nan, divergence, total_cost)  # a poisoned row has no finite gradient

    # Statistics
    agreement = tl.where(student_top1 == teacher_top1, 1.0, 0.0)
    agreement = tl.where(is_nan, divergence, agreement)
    student_entropy = student_log_sum - student_weighted / student_sum
    teacher_entropy = teacher_log_sum - teacher_weighted / teacher_sum
    tl.store(divergence_ptr + row, divergence)
    tl.store(top1_agreement_ptr + row, tl.where(is_masked, 0.0, agreement))
    tl.store(student_entropy_ptr + row, tl.where(is_masked, 0.0, student_entropy))
    tl.store(teacher_entropy_ptr + row, tl.where(is_masked, 0.0, teacher_entropy))

    student_logprob = float("nan")
    teacher_logprob = float("nan")
    if token_ids_ptr is not None:
        token = tl.load(token_ids_ptr + row)
        is_known = (token >= 0) & (token < vocab_size)
        token = tl.where(is_known, token, 0).to(tl.int32)
        student_logprob, teacher_logprob = load_logit_pair(
            student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
            teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
            vocab_size, token, token // 128, is_known, is_known,
        )  # fmt: skip
        if NUM_STOP_IDS > 0:
            is_stop = is_stop_column(token, stop_ids_ptr, NUM_STOP_IDS)
        student_logprob -= finite_max(student_max)
        teacher_logprob -= finite_max(teacher_max)
        if NUM_STOP_IDS > 0:
            student_logprob = tl.where(is_stop, student_event_shifted, student_logprob)
            teacher_logprob = tl.where(is_stop, teacher_event_shifted, teacher_logprob)
        student_logprob -= student_log_sum
        teacher_logprob -= teacher_log_sum
        student_logprob = tl.where(is_masked, float("-inf"), student_logprob)
        teacher_logprob = tl.where(is_masked, float("-inf"), teacher_logprob)
        student_logprob = tl.where(is_known, student_logprob, float("nan"))
        teacher_logprob = tl.where(is_known, teacher_logprob, float("nan"))
    tl.store(student_logprob_ptr + row, student_logprob)
    tl.store(teacher_logprob_ptr + row, teacher_logprob)

    # What the gradient needs; a row whose gradient is 0 by definition has a student_sum of 0.
    has_no_gradient = is_masked | (divergence == float("inf"))
    if row_sums_ptr is not None:
        tl.store(row_sums_ptr + row, student_max)
        tl.store(row_sums_ptr + num_rows + row, tl.where(has_no_gradient, 0.0, student_sum))
        tl.store(row_sums_ptr + 2 * num_rows + row, teacher_max)
        tl.store(row_sums_ptr + 3 * num_rows + row, teacher_sum)
        tl.store(row_sums_ptr + 4 * num_rows + row, total_cost)
        tl.store(student_top1_ptr + row, student_top1)

    factor = 1.0
    if gradient_unit_ptr is not None:
        if IS_HALF_GRADIENT:
            # |d(logits)| <= bound, which becomes at most 2^15
            bound = (3.0 + gradient_bound_slope * tl.where(has_no_gradient, 0.0, divergence)) * student_slope
            bound = tl.minimum(bound, 3e38)
            factor = tl.exp2(tl.minimum(15.0 - tl.ceil(tl.log2(bound)), 100.0))
        # NaN in the unit, not in the row, so that a row with upstream gradient 0 does not poison a sum over rows.
        tl.store(gradient_unit_ptr + row, tl.where(is_nan, divergence, 1.0 / factor))
    if gradient_ptr is not None:
        gradient_row_ptr = gradient_ptr + row * gradient_row_stride
        if has_no_gradient | is_nan:
            write_zero_row(gradient_row_ptr, vocab_size, BLOCK_VOCAB)
        else:
            write_gradient_row(
                gradient_row_ptr, student_row_ptr, student_tile_max_ptr, student_bias_ptr,
                teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, stop_ids_ptr,
                vocab_size, student_column_stride, teacher_column_stride,
                student_slope, student_softcap, teacher_slope, teacher_softcap,
                student_max, student_sum, teacher_max, teacher_sum, student_top1, total_cost, factor,
                parameter, complement, DIVERGENCE, NUM_STOP_IDS, BLOCK_STOPS, BLOCK_VOCAB, IS_HALF_GRADIENT,
            )  # fmt: skip


def launch_divergence_rows(
    student: LogitRows,
    teacher: LogitRows,
    divergence: tuple[str, float],
    token_ids_N: Tensor | None,
    stop_ids: Tensor | None,
    vocab_size: int,
    outputs: RowOutputs,
    *,
    state: RowState | None = None,
    gradient: RowGradient = NO_GRADIENT,
    tile: TileConfig | None = None,
) -> None:
    """Fill `outputs` and, where given, what the gradient needs (`state`) or the gradient itself.

    Args:
        student, teacher: N rows of logits each, with what the head still has to do to them.
        divergence: `Divergence.kernel()`.
        token_ids_N: (N,) or None.
        stop_ids: (M,) int32 on the device, sorted, M >= 2; or None.
        gradient: what is wanted of it. Its logits, float32 or float16, have a contiguous last axis and may be the memory of the
            student's. The unit is a power of two for float16, 1 for float32, NaN (and the row 0) where the divergence is NaN.
    """
    num_rows = outputs.divergence_N.shape[0]
    if num_rows == 0:
        return
    name, parameter = divergence
    kernel = DIVERGENCE_KERNELS[name]
    num_stop_ids = 0 if stop_ids is None else stop_ids.shape[0]
    tile = tile or choose_tile_config(vocab_size)
    with torch.accelerator.device_index(outputs.divergence_N.device.index):
        divergence_row_kernel[(num_rows,)](
            student.logits,
            student.tile_max,
            student.bias,
            teacher.logits,
            teacher.tile_max,
            teacher.bias,
            None if token_ids_N is None else token_ids_N.contiguous(),
            stop_ids,
            *outputs,
            None if state is None else state.sums_5_N,
            None if state is None else state.student_top1_N,
            gradient.logits_n_V,
            gradient.unit_n,
            num_rows,
            vocab_size,
            *student.strides(),
            *teacher.strides(),
            0 if gradient.logits_n_V is None else gradient.logits_n_V.stride(0),
            student.slope,
            student.softcap,
            teacher.slope,
            teacher.softcap,
            parameter,
            1.0 - parameter,
            gradient_bound_slope=0.0 if kernel.is_gradient_bounded else 2.0 * (1.0 + abs(parameter)),
            DIVERGENCE=kernel.function,
            KL_DIRECTION=kernel.direction,
            NUM_STOP_IDS=num_stop_ids,
            BLOCK_STOPS=triton.next_power_of_2(max(1, num_stop_ids)),
            BLOCK_VOCAB=tile.block_vocab,
            IS_HALF_GRADIENT=gradient.dtype == torch.float16,
            **tile.launch_options(),
        )
