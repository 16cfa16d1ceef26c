"""One program per row: the log-probs of K ids and the row's entropy in one sweep, and if wanted d(logits) in a second one.

The likeliest of the ids stays out of the sweep (`sweep_rest`): its probability may be nearly 1, and both its log-prob and
its gradient then come from the others' share.

    log p_k = (z_k - max) - log(sum)            log p = log(1 - share of the others), where that share is below 1/2
    H       = log(sum) - sum(e (z - max)) / sum
    d/dz_j  = sum over k of u_k (1[j = id_k] - p_j)

Bytes per logit: 1 read; with gradient one more, which hits the L2 cache as far as the rows in flight fit there, and a write.
About 12 FLOP per logit: memory-bound. Memory: the results.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.elementary_kernel import log1p_small
from esr_kernels.logit_row_kernel import as_stored, head_slope, load_logits, write_zero_row
from esr_kernels.logit_rows import LogitRows
from esr_kernels.online_logsumexp import finite_max, max_shift, move_entropy_sum, times_exp
from esr_kernels.row_gradient import NO_GRADIENT, RowGradient
from esr_kernels.row_rest_kernel import sweep_rest, write_softmax_row
from esr_kernels.tile_config import TileConfig, choose_one_sided_tile_config

# Rows of a chunk start anywhere in the tensors that hold few numbers per row.
PER_ROW_POINTERS = [
    "rows_ptr", "token_ids_ptr", "picked_ptr", "upstream_ptr", "logprobs_ptr", "entropy_ptr", "is_top1_ptr", "sums_ptr",
    "gradient_unit_ptr",
]  # fmt: skip
NO_ID = tl.constexpr(2147483647)


@triton.jit
def source_offset(source, columns_per_batch, batch_units, row_units):
    """Offset of row `source` of (B, T, V) logits, in units that divide both strides.

    Only the unit is specialised: it carries the alignment of rows, while T and B may change without another compilation.
    """
    return (source // columns_per_batch) * batch_units + (source % columns_per_batch) * row_units


@triton.jit(
    do_not_specialize=["num_rows", "columns_per_batch", "batch_units", "row_units"],
    do_not_specialize_on_alignment=PER_ROW_POINTERS,
)
def logprob_row_kernel(
    logits_ptr, tile_max_ptr, bias_ptr, rows_ptr, token_ids_ptr, picked_ptr, upstream_ptr,
    logprobs_ptr, entropy_ptr, is_top1_ptr, sums_ptr, gradient_ptr, gradient_unit_ptr,
    num_rows, vocab_size, columns_per_batch,
    stride_unit, batch_units, row_units, column_stride, tile_max_stride, gradient_row_stride,
    slope, softcap, unit_factor,
    NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, IS_HALF_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_IDS)
    is_slot = slots < NUM_IDS
    ids_row_ptr = token_ids_ptr + row * NUM_IDS
    ids = tl.load(ids_row_ptr + slots, mask=is_slot, other=-1)
    is_id = (ids >= 0) & (ids < vocab_size)
    id_columns = tl.where(is_id, ids, 0).to(tl.int32)

    if tl.max((ids != -1).to(tl.int32)) == 0:  # nothing is asked of this row: it is not read
        tl.store(logprobs_ptr + row * NUM_IDS + slots, tl.zeros((BLOCK_IDS,), dtype=tl.float32), mask=is_slot)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, 0.0)
            tl.store(is_top1_ptr + row, False)
        if sums_ptr is not None:
            for index in tl.static_range(3):
                tl.store(sums_ptr + index * num_rows + row, 0.0)
        if gradient_ptr is not None:
            write_zero_row(gradient_ptr + row * gradient_row_stride, vocab_size, BLOCK_VOCAB)
        if gradient_unit_ptr is not None and upstream_ptr is None:
            tl.store(gradient_unit_ptr + row, 1.0)
    else:
        source = row
        if rows_ptr is not None:
            source = tl.load(rows_ptr + row)
        row_ptr = logits_ptr + source_offset(source, columns_per_batch, batch_units, row_units) * stride_unit
        if tile_max_ptr is not None:
            tile_max_ptr += row * tile_max_stride
        if picked_ptr is None:
            id_logits = load_logits(
                row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, id_columns, id_columns // 128,
                is_id,
            )  # fmt: skip
        else:
            id_logits = tl.load(picked_ptr + row * NUM_IDS + slots, mask=is_id, other=float("-inf"))
        best_logit = tl.max(id_logits)
        best_id = tl.min(tl.where(is_id & (id_logits == best_logit), id_columns, NO_ID))

        rest_max, rest_sum, rest_weighted, is_beaten = sweep_rest(
            row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, best_id, best_logit, BLOCK_VOCAB
        )
        row_max = tl.maximum(rest_max, best_logit)
        shift = max_shift(rest_max, row_max)
        rescale = tl.exp(shift)
        best_shifted = best_logit - finite_max(row_max)
        best_exp = tl.exp(best_shifted)
        rest_exp = rest_sum * rescale
        total = rest_exp + best_exp
        total = tl.where(row_max == float("inf"), float("nan"), total)
        log_total = tl.log(total)
        rest_share = rest_exp / total
        is_masked = total == 0
        is_nan = total != total

        is_best = is_id & (ids == best_id)
        logprobs = (id_logits - row_max) - log_total
        is_likely = tl.where(is_best, rest_share, 1.0) < 0.5
        logprobs = tl.where(is_likely, log1p_small(-tl.minimum(rest_share, 0.5)), logprobs)
        logprobs = tl.where(is_masked, float("-inf"), logprobs)
        logprobs = tl.where(is_id, logprobs, float("nan"))
        tl.store(logprobs_ptr + row * NUM_IDS + slots, tl.where(ids == -1, 0.0, logprobs), mask=is_slot)
        if entropy_ptr is not None:
            weighted = move_entropy_sum(rest_weighted, rest_sum, shift, rescale) + times_exp(best_exp, best_shifted)
            tl.store(entropy_ptr + row, tl.where(is_masked, 0.0, log_total - weighted / total))
            is_top1 = (best_id != NO_ID) & (is_beaten == 0) & (is_nan == 0) & (is_masked == 0)
            tl.store(is_top1_ptr + row, is_top1)
        if sums_ptr is not None:
            tl.store(sums_ptr + row, row_max)
            tl.store(sums_ptr + num_rows + row, total)
            tl.store(sums_ptr + 2 * num_rows + row, rest_share)

        if gradient_unit_ptr is not None:
            if upstream_ptr is None:
                factor = unit_factor
                # NaN in the unit, not in the row, so that a row with upstream gradient 0 does not poison a sum over rows.
                tl.store(gradient_unit_ptr + row, tl.where(is_nan, float("nan"), 1.0 / unit_factor))
            else:
                factor = 1.0 / tl.load(gradient_unit_ptr + row)
        if gradient_ptr is not None:
            # The upstream gradient of all slots that hold a slot's id, and of the others
            upstream_of_id = tl.zeros((BLOCK_IDS,), dtype=tl.float32)
            upstream_of_others = upstream_of_id
            total_upstream = 0.0
            upstream_size = 0.0
            for index in range(NUM_IDS):
                other_id = tl.load(ids_row_ptr + index)
                upstream = 1.0
                if upstream_ptr is not None:
                    upstream = tl.load(upstream_ptr + row * NUM_IDS + index)
                upstream = tl.where((other_id >= 0) & (other_id < vocab_size), upstream, 0.0)
                upstream_of_id += tl.where(ids == other_id, upstream, 0.0)
                upstream_of_others += tl.where(ids == other_id, 0.0, upstream)
                total_upstream += upstream
                upstream_size += tl.abs(upstream)
            gradient_row_ptr = gradient_ptr + row * gradient_row_stride
            if is_masked | (upstream_size == 0) | (is_nan & (upstream_ptr is None)):
                write_zero_row(gradient_row_ptr, vocab_size, BLOCK_VOCAB)
            else:
                p = tl.exp(logprobs)
                id_gradient = upstream_of_id * tl.where(is_best, rest_share, 1.0 - p) - p * upstream_of_others
                id_gradient *= factor * head_slope(id_logits, slope, softcap)
                write_softmax_row(
                    gradient_row_ptr, row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size,
                    row_max, -total_upstream * factor / total, BLOCK_VOCAB, IS_HALF_GRADIENT,
                )  # fmt: skip
                stored = as_stored(id_gradient, gradient_row_ptr, IS_HALF_GRADIENT)
                tl.store(gradient_row_ptr + id_columns, stored, mask=is_id)


class LogprobOutputs(NamedTuple):
    """float32, and bool for `is_top1_N`; the last two are of rows with one id each, or None."""

    logprobs_N_K: Tensor
    entropy_N: Tensor | None = None
    is_top1_N: Tensor | None = None


class SourceRows(NamedTuple):
    """Where the rows of logits are, if they are not simply the rows of a matrix, and what is kept of them for backward."""

    rows_N: Tensor  # int64, index into the first two axes of (B, T, V) logits; anything where no id is asked for
    sums_3_N: Tensor  # float32, written: maximum, sum relative to it (0: no gradient), share of the others in it


def strides_in_units(logits: Tensor) -> tuple[int, int, int]:
    """(unit, batch stride / unit, row stride / unit) of (B, T, V) logits, or of (N, V) ones as a single batch."""
    batch_stride, row_stride = (0, *logits.stride())[-3:-1]
    unit = max(1, math.gcd(batch_stride, row_stride))
    return unit, batch_stride // unit, row_stride // unit


def launch_logprob_rows(
    logits: LogitRows,
    token_ids_N_K: Tensor,
    vocab_size: int,
    outputs: LogprobOutputs,
    *,
    source: SourceRows | None = None,
    picked_N_K: Tensor | None = None,
    upstream_N_K: Tensor | None = None,
    gradient: RowGradient = NO_GRADIENT,
    tile: TileConfig | None = None,
) -> None:
    """Fill `outputs`, and what is wanted of the gradient.

    Args:
        logits: N rows, or (B, T, V) with `source`.
        token_ids_N_K: contiguous; -1 asks for nothing (0), other integers outside the vocabulary give NaN.
        picked_N_K: the ids' exact logits (`PickedLogits`), contiguous; None: they are read from the row.
        upstream_N_K: float32, contiguous: d(logits) are those of sum(upstream * logprobs). `gradient.unit_n` is then given.
            None: those of an upstream gradient of 1, K being 1; the unit is then written.
        gradient: what is wanted of it. Its logits, float32 or float16, have a contiguous last axis and may be the memory of
            `logits`. The unit is a power of two for float16, 1 for float32, NaN (and the row 0) where the log-prob is NaN.
    """
    num_rows, num_ids = token_ids_N_K.shape
    if num_ids == 0 and gradient.logits_n_V is not None:
        gradient.logits_n_V.zero_()
    if num_rows == 0 or num_ids == 0:
        return
    tile = tile or choose_one_sided_tile_config(vocab_size, num_ids)
    is_half = gradient.dtype == torch.float16
    with torch.accelerator.device_index(token_ids_N_K.device.index):
        logprob_row_kernel[(num_rows,)](
            logits.logits,
            logits.tile_max,
            logits.bias,
            None if source is None else source.rows_N,
            token_ids_N_K,
            picked_N_K,
            upstream_N_K,
            *outputs,
            None if source is None else source.sums_3_N,
            gradient.logits_n_V,
            gradient.unit_n,
            num_rows,
            vocab_size,
            num_rows if source is None else logits.logits.shape[1],
            *strides_in_units(logits.logits),
            logits.logits.stride(-1),
            0 if logits.tile_max is None else logits.tile_max.stride(0),
            0 if gradient.logits_n_V is None else gradient.logits_n_V.stride(0),
            logits.slope,
            logits.softcap,
            # |d(logits)| <= slope, which becomes at most 2^15
            2.0 ** (15 - math.ceil(math.log2(logits.slope))) if is_half else 1.0,
            NUM_IDS=num_ids,
            BLOCK_IDS=triton.next_power_of_2(num_ids),
            BLOCK_VOCAB=tile.block_vocab,
            IS_HALF_GRADIENT=is_half,
            **tile.launch_options(),
        )
