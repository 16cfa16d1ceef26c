"""Reading a row of logits, tile by tile: any storage, the head's bias, scale and soft cap, the temperature, stop ids.

And what is common to writing a row of gradients.
"""

import triton
import triton.language as tl

from esr_kernels.elementary_kernel import tanh
from esr_kernels.online_logsumexp import finite_max

TILE_COLUMNS: tl.constexpr = tl.constexpr(128)
# In place of a product in a stored row: its id was taken out and counts as -inf, also below a soft cap. No product has this
# value, nor is it the mask that others write, the lowest float32, which is one step further.
TAKEN_OUT: tl.constexpr = tl.constexpr(-3.4028232635611926e38)


@triton.jit
def tile_columns(start, BLOCK_VOCAB: tl.constexpr):
    """Column indices (BLOCK_VOCAB // 128, 128) of a tile and, (BLOCK_VOCAB // 128,), the index of the 128 columns in a row."""
    tile_index = start // TILE_COLUMNS + tl.arange(0, BLOCK_VOCAB // TILE_COLUMNS)
    return tile_index[:, None] * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :], tile_index


@triton.jit
def load_head_logits(row_ptr, bias_ptr, column_stride, slope, softcap, columns, is_inside):
    """Tempered logits in float32 from the head's matrix product, -inf outside.

    softcap * tanh((x + bias) * slope / softcap), without soft cap (x + bias) * slope; `slope` is logit_scale / temperature
    and `softcap` the head's soft cap / temperature. -inf too where the id was taken out.
    """
    product = tl.load(row_ptr + columns.to(tl.int64) * column_stride, mask=is_inside, other=0.0).to(tl.float32)
    logits = product
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    if softcap is None:
        logits *= slope
    else:
        logits = softcap * tanh(logits * (slope / softcap))
    return tl.where(is_inside & (product != TAKEN_OUT), logits, float("-inf"))


@triton.jit
def load_logits(
    row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, columns, tile_index, is_inside
):  # fmt: skip
    """Tempered logits of one side in float32, -inf outside; tile-relative where the maxima are given."""
    if tile_max_ptr is None:
        return load_head_logits(row_ptr, bias_ptr, column_stride, slope, softcap, columns, is_inside)
    else:
        relative = tl.load(row_ptr + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
        has_tile = tile_index * TILE_COLUMNS < vocab_size
        tile_max = tl.load(tile_max_ptr + tile_index, mask=has_tile, other=0.0)
        if len(columns.shape) == 2:  # loaded once for each row of the tile, not once for each column
            tile_max = tile_max[:, None]
        return relative + tile_max


@triton.jit
def load_logit_pair(
    student_row_ptr, student_tile_max_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap,
    teacher_row_ptr, teacher_tile_max_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap,
    vocab_size, columns, tile_index, is_inside, is_wanted,
):  # fmt: skip
    """Tempered logits of both sides in float32, -inf where not wanted; tile-relative where the maxima are given.

    Masked by `is_inside` alone, memory is read in wide words; `is_wanted` leaves out stop ids.
    """
    if student_tile_max_ptr is None:
        student_logits = load_head_logits(
            student_row_ptr, student_bias_ptr, student_column_stride, student_slope, student_softcap, columns, is_inside
        )
        teacher_logits = load_head_logits(
            teacher_row_ptr, teacher_bias_ptr, teacher_column_stride, teacher_slope, teacher_softcap, columns, is_inside
        )
    else:
        has_tile = tile_index * TILE_COLUMNS < vocab_size
        student_relative = tl.load(student_row_ptr + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
        teacher_relative = tl.load(teacher_row_ptr + columns, mask=is_inside, other=float("-inf")).to(tl.float32)
        teacher_relative += tl.where(is_stored_as_difference(student_relative), student_relative, 0.0)
        student_tile_max = tl.load(student_tile_max_ptr + tile_index, mask=has_tile, other=0.0)
        teacher_tile_max = tl.load(teacher_tile_max_ptr + tile_index, mask=has_tile, other=0.0)
        if len(columns.shape) == 2:  # loaded once for each row of the tile, not once for each column
            student_tile_max = student_tile_max[:, None]
            teacher_tile_max = teacher_tile_max[:, None]
        student_logits = student_relative + student_tile_max
        teacher_logits = teacher_relative + teacher_tile_max
    student_logits = tl.where(is_wanted, student_logits, float("-inf"))
    return student_logits, tl.where(is_wanted, teacher_logits, float("-inf"))


@triton.jit
def is_stored_as_difference(student_relative):
    """Where tile-relative storage keeps the teacher's logit as difference to the student's, by the student's as stored."""
    return student_relative >= -8.0


@triton.jit
def head_slope(logits, slope, softcap):
    """d(tempered logits) / d(hidden @ weight.T + bias)."""
    if softcap is None:
        return slope
    else:
        saturation = logits / softcap
        return slope * (1.0 - saturation * saturation)


@triton.jit
def is_stop_column(columns, stop_ids_ptr, NUM_STOP_IDS: tl.constexpr):
    is_stop = columns < 0
    if NUM_STOP_IDS <= 16:
        for index in tl.static_range(NUM_STOP_IDS):
            is_stop = is_stop | (columns == tl.load(stop_ids_ptr + index))
    else:  # unrolled, hundreds would take minutes to compile
        for index in range(NUM_STOP_IDS):
            is_stop = is_stop | (columns == tl.load(stop_ids_ptr + index))
    return is_stop


@triton.jit
def logsumexp(logits):
    """Maximum m of a vector and log(sum(exp(logits - m))); their sum is the log-sum-exp, -inf where all are."""
    largest = tl.max(logits)
    return largest, tl.log(tl.sum(tl.exp(logits - finite_max(largest))))


@triton.jit
def as_stored(gradient, gradient_row_ptr, IS_SCALED: tl.constexpr):
    """In the dtype of the row; `IS_SCALED` says that nothing may leave float16's range."""
    if IS_SCALED:
        gradient = tl.clamp(gradient, -65504.0, 65504.0)
    return gradient.to(gradient_row_ptr.dtype.element_ty)


@triton.jit
def write_zero_row(gradient_row_ptr, vocab_size, BLOCK_VOCAB: tl.constexpr):
    for start in range(0, vocab_size, BLOCK_VOCAB):
        columns, tile_index = tile_columns(start, BLOCK_VOCAB)
        zeros = tl.zeros(columns.shape, dtype=gradient_row_ptr.dtype.element_ty)
        tl.store(gradient_row_ptr + columns, zeros, mask=columns < vocab_size)
