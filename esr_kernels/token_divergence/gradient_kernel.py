"""The gradient sweep over one row, used where the gradient is made with the value and where it is made from saved sums."""

import triton
import triton.language as tl

from esr_kernels.logit_row_kernel import as_stored, head_slope, is_stop_column, load_logit_pair, logsumexp, tile_columns
from esr_kernels.online_logsumexp import finite_max, log_ratio_of


@triton.jit
def event_gradient(
    student_shifted, teacher_shifted, student_log_sum, teacher_log_sum, log_sum_ratio,
    total_cost, parameter, complement, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """dD/d(tempered logit) of events: weighted_cost - p * sum(weighted_cost)."""
    log_ratio = log_ratio_of(student_shifted, teacher_shifted, log_sum_ratio)
    student_logprob = student_shifted - student_log_sum
    term, weighted_cost = DIVERGENCE(
        student_logprob, teacher_shifted - teacher_log_sum, log_ratio, parameter, complement
    )
    return weighted_cost - tl.exp(student_logprob) * total_cost


@triton.jit
def write_gradient_row(
    gradient_row_ptr, student_row_ptr, student_tile_max_ptr, student_bias_ptr,
    teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, stop_ids_ptr,
    vocab_size, student_column_stride, teacher_column_stride,
    student_slope, student_softcap, teacher_slope, teacher_softcap,
    student_max, student_sum, teacher_max, teacher_sum, student_top1, total_cost, factor,
    parameter, complement,
    DIVERGENCE: tl.constexpr, NUM_STOP_IDS: tl.constexpr, BLOCK_STOPS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
    IS_SCALED: tl.constexpr,
):  # fmt: skip
    """Write factor * dD/d(student head's output) for one row.

    The gradient may overwrite the student's logits, also in half their width: a tile is read whole before any of it is
    written, and later tiles lie above what has been written.

    The gradient sums to 0 over the events. An event of probability above 1/2 gets minus the sum of the others: for a student
    that is nearly certain this is far more exact than p - q of two numbers near 1. Its column and the stop ids' are written
    last, over what the sweep wrote there: a sweep that left them out could not write in wide words.

    `IS_SCALED` says that the factor brings the row into float16's range, so that nothing may leave it.
    """
    certain_id = tl.where(student_sum < 2.0, student_top1, -1)
    student_log_sum = tl.log(student_sum)
    teacher_log_sum = tl.log(teacher_sum)
    log_sum_ratio = tl.log(student_sum / teacher_sum)

    if NUM_STOP_IDS > 0:
        # Before the sweep, which may overwrite them.
        stop_slots = tl.arange(0, BLOCK_STOPS)
        stop_ids = tl.load(stop_ids_ptr + stop_slots, mask=stop_slots < NUM_STOP_IDS, other=0)
        student_stop_logits, teacher_stop_logits = load_logit_pair(
            student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
            teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
            vocab_size, stop_ids, stop_ids // 128, stop_slots < NUM_STOP_IDS, stop_slots < NUM_STOP_IDS,
        )  # fmt: skip

    sum_of_others = tl.zeros((BLOCK_VOCAB // 128, 128), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_VOCAB):
        columns, tile_index = tile_columns(start, BLOCK_VOCAB)
        is_inside = columns < vocab_size
        is_wanted = is_inside & ~is_stop_column(columns, stop_ids_ptr, NUM_STOP_IDS)
        student_logits, teacher_logits = load_logit_pair(
            student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
            teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
            vocab_size, columns, tile_index, is_inside, is_wanted,
        )  # fmt: skip
        gradient = event_gradient(
            student_logits - finite_max(student_max), teacher_logits - finite_max(teacher_max),
            student_log_sum, teacher_log_sum, log_sum_ratio, total_cost, parameter, complement, DIVERGENCE,
        )  # fmt: skip
        is_other = is_wanted & (columns != certain_id)
        sum_of_others += tl.where(is_other, gradient, 0.0)
        gradient *= factor * head_slope(student_logits, student_slope, student_softcap)
        tl.debug_barrier()
        tl.store(gradient_row_ptr + columns, as_stored(gradient, gradient_row_ptr, IS_SCALED), mask=is_inside)
    tl.debug_barrier()

    certain_gradient = -tl.sum(sum_of_others)
    if NUM_STOP_IDS > 0:
        student_event, student_event_log_sum = logsumexp(student_stop_logits)
        teacher_event, teacher_event_log_sum = logsumexp(teacher_stop_logits)
        event = event_gradient(
            (student_event - finite_max(student_max)) + student_event_log_sum,
            (teacher_event - finite_max(teacher_max)) + teacher_event_log_sum,
            student_log_sum, teacher_log_sum, log_sum_ratio, total_cost, parameter, complement, DIVERGENCE,
        )  # fmt: skip
        first_stop_id = tl.load(stop_ids_ptr)
        event = tl.where(certain_id == first_stop_id, certain_gradient, event)
        certain_gradient -= event
        certain_id = tl.where(certain_id == first_stop_id, -1, certain_id)
        # The event's gradient reaches its ids in proportion to their probabilities.
        share = tl.where(
            student_stop_logits == float("-inf"),
            0.0,
            tl.exp((student_stop_logits - student_event) - student_event_log_sum),
        )
        gradient = event * share * head_slope(student_stop_logits, student_slope, student_softcap) * factor
        tl.store(
            gradient_row_ptr + stop_ids,
            as_stored(gradient, gradient_row_ptr, IS_SCALED),
            mask=stop_slots < NUM_STOP_IDS,
        )
    certain_gradient = certain_gradient * head_slope(student_max, student_slope, student_softcap) * factor
    tl.store(
        gradient_row_ptr + certain_id,
        as_stored(certain_gradient, gradient_row_ptr, IS_SCALED),
        mask=(certain_id >= 0) & (certain_id < vocab_size),
    )
