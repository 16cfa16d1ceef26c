"""The rest of a row: all its columns but one token. Its sums in one sweep, and in another p of each column times a number.

A token apart from the rest keeps the digits of 1 - p where p is nearly 1: 1 - p is the rest's share of the sum, made of small
numbers, not the difference of two numbers that are nearly equal.
"""

import triton
import triton.language as tl

from esr_kernels.logit_row_kernel import as_stored, head_slope, load_logits, tile_columns
from esr_kernels.online_logsumexp import finite_max, max_shift, move_entropy_sum


@triton.jit
def sweep_rest(
    row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, token, token_logit,
    BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    """Over the columns other than `token`: their maximum, the sums of e = exp(logit - maximum) and of e * (logit - maximum),
    and whether one of them beats the token: by a larger logit, or an equal one at a lower id.

    Every lane has a maximum of its own and takes one exponential for each logit, of its distance to that maximum; the lanes
    meet once, at the end, so that warps need not wait for each other in between. A +inf logit is left to the caller.
    """
    lane_max = tl.full((BLOCK_VOCAB // 128, 128), float("-inf"), dtype=tl.float32)
    lane_sum = tl.zeros((BLOCK_VOCAB // 128, 128), dtype=tl.float32)
    lane_weighted = lane_sum
    is_beaten = lane_sum > 0
    for start in range(0, vocab_size, BLOCK_VOCAB):
        columns, tile_index = tile_columns(start, BLOCK_VOCAB)
        logits = load_logits(
            row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, columns, tile_index,
            columns < vocab_size,
        )  # fmt: skip
        logits = tl.where(columns == token, float("-inf"), logits)
        is_beaten = is_beaten | (logits > token_logit) | ((logits == token_logit) & (columns < token))

        # -inf - -inf must not be NaN, nor 0 * inf: an absent logit is infinitely far below, the first is far above.
        distance = tl.where(logits == float("-inf"), float("-inf"), logits - lane_max)
        is_new_max = distance > 0
        shift = -tl.abs(distance)  # of what is summed already, where the maximum is new, else of the logit
        rescale = tl.exp(shift)
        shift = tl.maximum(shift, -1e30)
        moved = move_entropy_sum(lane_weighted, lane_sum, shift, rescale)
        lane_weighted = tl.where(is_new_max, moved, lane_weighted + rescale * shift)
        lane_sum = tl.where(is_new_max, lane_sum * rescale + 1.0, lane_sum + rescale)
        lane_max = tl.where(is_new_max, logits, lane_max)

    rest_max = tl.max(lane_max)
    shift = max_shift(lane_max, rest_max)
    rescale = tl.exp(shift)
    rest_weighted = tl.sum(move_entropy_sum(lane_weighted, lane_sum, shift, rescale))
    rest_sum = tl.sum(lane_sum * rescale)
    return rest_max, rest_sum, rest_weighted, tl.max(is_beaten.to(tl.int32)) > 0


@triton.jit
def write_softmax_row(
    gradient_row_ptr, row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size,
    row_max, scale, BLOCK_VOCAB: tl.constexpr, IS_SCALED: tl.constexpr,
):  # fmt: skip
    """Write scale * exp(logit - row_max) * d(logit)/d(head's product) of every column.

    The gradient may overwrite the logits, also in half their width: a tile is read whole before any of it is written, and later
    tiles lie above what has been written. `IS_SCALED` says that nothing may leave float16's range.
    """
    for start in range(0, vocab_size, BLOCK_VOCAB):
        columns, tile_index = tile_columns(start, BLOCK_VOCAB)
        is_inside = columns < vocab_size
        logits = load_logits(
            row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, columns, tile_index, is_inside
        )  # fmt: skip
        gradient = scale * tl.exp(logits - finite_max(row_max)) * head_slope(logits, slope, softcap)
        tl.debug_barrier()
        tl.store(gradient_row_ptr + columns, as_stored(gradient, gradient_row_ptr, IS_SCALED), mask=is_inside)
    tl.debug_barrier()
