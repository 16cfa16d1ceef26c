"""One program per row: the divergence over K ids and everything else in one sweep, and if wanted d(logits) in a second one.

The ids were taken out of the row (`PickedLogits`), so the sweep sees the tail alone and the student's P_tail is a sum, not
1 - sum. With w the weighted costs of the events (`esr_kernels.divergence_kernel`) and W their sum,

    d/dz_k = w_k - p_k W    at the ids            d/dz_j = (p_j / P_tail) (w_tail - P_tail W)    elsewhere

so the gradient is softmax mass times one number per row, and K entries; nothing of the teacher has size V.

Bytes per logit: 1 read; with gradient one more, which hits the L2 cache as far as the rows in flight fit there, and a write.
About 12 FLOP per logit: memory-bound. Memory: 4 numbers per row.
"""

from enum import Enum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS
from esr_kernels.elementary_kernel import expm1, log1p_small
from esr_kernels.logit_row_kernel import as_stored, head_slope, write_zero_row
from esr_kernels.logit_rows import LogitRows
from esr_kernels.online_logsumexp import finite_max, max_shift, times_exp
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits
from esr_kernels.row_gradient import RowGradient
from esr_kernels.row_rest_kernel import sweep_rest, write_softmax_row
from esr_kernels.tile_config import TileConfig, choose_one_sided_tile_config

PER_ROW_POINTERS = [
    "ids_ptr", "picked_ptr", "teacher_logprobs_ptr", "divergence_ptr", "student_entropy_ptr", "teacher_entropy_ptr",
    "agreement_ptr", "gradient_unit_ptr",
]  # fmt: skip
NO_ID = tl.constexpr(2147483647)
LARGEST_TOTAL = tl.constexpr(-1.1920929665620834e-07)  # log(1 - 2^-23): see `esr_kernels.topk_divergence`


class Events(str, Enum):
    """What is compared: `TAIL`: the ids and everything else. `RENORMALIZED`: the ids alone, both sides renormalised.
    `TRUNCATED`: the ids' terms alone, nothing renormalised.
    """

    TAIL = "tail"
    RENORMALIZED = "renormalized"
    TRUNCATED = "truncated"


@triton.jit
def log1mexp(x):
    """log(1 - exp(x)) for x < 0, without cancellation at either end."""
    is_near_zero = x > -0.6931471805599453
    return tl.where(is_near_zero, tl.log(-expm1(x)), log1p_small(-tl.exp(tl.where(is_near_zero, -1.0, x))))


@triton.jit
def logsumexp_apart(logprobs, largest, is_largest):
    """log(sum(exp)) with the largest apart from the others: where it is close to 0, it keeps its distance to 0."""
    others = tl.sum(tl.where(is_largest, 0.0, tl.exp(logprobs - finite_max(largest))))
    is_small = others < 0.5
    log_sum = tl.where(is_small, log1p_small(tl.where(is_small, others, 0.0)), tl.log(1.0 + others))
    log_sum = tl.where(largest == float("-inf"), largest, largest + log_sum)
    return tl.where(others != others, others, log_sum)


@triton.jit
def log_ratio_of_events(student_logprob, teacher_logprob):
    """log p - log q, 0 where both are -inf."""
    is_empty = (student_logprob == float("-inf")) & (teacher_logprob == float("-inf"))
    return tl.where(is_empty, 0.0, student_logprob - teacher_logprob)


@triton.jit(do_not_specialize_on_alignment=PER_ROW_POINTERS)
def topk_divergence_kernel(
    logits_ptr, tile_max_ptr, bias_ptr, ids_ptr, picked_ptr, teacher_logprobs_ptr,
    divergence_ptr, student_entropy_ptr, teacher_entropy_ptr, agreement_ptr, gradient_ptr, gradient_unit_ptr,
    vocab_size, row_stride, column_stride, tile_max_stride, gradient_row_stride,
    slope, softcap, parameter, complement, gradient_bound_slope, truncated_cost,
    DIVERGENCE: tl.constexpr, EVENTS: tl.constexpr, NUM_IDS: tl.constexpr, BLOCK_IDS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr, IS_HALF_GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    if tile_max_ptr is not None:
        tile_max_ptr += row * tile_max_stride

    # The events: an empty slot, and an id that an earlier slot holds, have probability 0 on both sides.
    slots = tl.arange(0, BLOCK_IDS)
    ids_row_ptr = ids_ptr + row * NUM_IDS
    ids = tl.load(ids_row_ptr + slots, mask=slots < NUM_IDS, other=-1)
    is_outside = (ids < -1) | (ids >= vocab_size)
    is_repeated = slots < 0
    for index in range(NUM_IDS):
        is_repeated = is_repeated | ((ids == tl.load(ids_row_ptr + index)) & (slots > index))
    is_id = (ids >= 0) & (ids < vocab_size) & (is_repeated == 0)
    id_columns = tl.where(is_id, ids, 0).to(tl.int32)
    student_logits = tl.load(picked_ptr + row * NUM_IDS + slots, mask=is_id, other=float("-inf"))
    teacher_logprobs = tl.load(teacher_logprobs_ptr + row * NUM_IDS + slots, mask=is_id, other=float("-inf"))
    teacher_logprobs = teacher_logprobs.to(tl.float32)
    num_ids = tl.sum(is_id.to(tl.int32))

    # The student's rank of the teacher's likeliest id, and the sums of everything else
    teacher_max = tl.max(teacher_logprobs)
    best_id = tl.min(tl.where(is_id & (teacher_logprobs == teacher_max), id_columns, NO_ID))
    is_best = is_id & (id_columns == best_id)
    best_logit = tl.max(tl.where(is_best, student_logits, float("-inf")))
    rest_max, rest_sum, rest_weighted, is_beaten = sweep_rest(
        row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size, best_id, best_logit, BLOCK_VOCAB
    )
    is_larger = (student_logits > best_logit) | ((student_logits == best_logit) & (id_columns < best_id))
    is_larger = is_larger & is_id & (is_best == 0)
    num_larger = tl.sum(is_larger.to(tl.int32)) + is_beaten.to(tl.int32) + (rest_sum != rest_sum).to(tl.int32)

    student_max = tl.max(student_logits)
    if EVENTS != "renormalized":
        student_max = tl.maximum(student_max, rest_max)
    student_shifted = student_logits - finite_max(student_max)
    student_total = tl.sum(tl.exp(student_shifted))
    if EVENTS != "renormalized":
        student_total += rest_sum * tl.exp(max_shift(rest_max, student_max))
    student_total = tl.where(student_max == float("inf"), float("nan"), student_total)
    student_log_total = tl.log(student_total)
    student_logprobs = student_shifted - student_log_total
    p = tl.exp(student_logprobs)
    p_rest = 0.0
    if EVENTS != "renormalized":
        student_rest = ((rest_max - finite_max(student_max)) + tl.log(rest_sum)) - student_log_total
        p_rest = tl.exp(student_rest)

    teacher_log_total = logsumexp_apart(teacher_logprobs, teacher_max, is_best)
    is_masked = (student_total == 0) | (tl.max((ids != -1).to(tl.int32)) == 0)
    if EVENTS == "tail":
        teacher_rest = log1mexp(tl.minimum(teacher_log_total, LARGEST_TOTAL))
        teacher_rest = tl.where(num_ids < vocab_size, teacher_rest, float("-inf"))
        # Served log-probs are rounded: their total may be a little off 1, or above it.
        teacher_log_total = tl.log(tl.exp(teacher_log_total) + tl.exp(teacher_rest))
        teacher_rest -= teacher_log_total
    if EVENTS != "truncated":
        is_masked = is_masked | (teacher_log_total == float("-inf"))
        teacher_logprobs -= teacher_log_total

    # Value and costs
    log_ratio = log_ratio_of_events(student_logprobs, teacher_logprobs)
    terms, costs = DIVERGENCE(student_logprobs, teacher_logprobs, log_ratio, parameter, complement)
    if EVENTS == "truncated":  # costs are given up to a multiple of p, which drops out only where all of p is counted
        costs += truncated_cost * p
    divergence = tl.sum(terms)
    total_cost = tl.sum(costs)
    student_entropy = -tl.sum(times_exp(p, student_logprobs))
    teacher_entropy = -tl.sum(times_exp(tl.exp(teacher_logprobs), teacher_logprobs))
    rest_cost = 0.0
    if EVENTS == "tail":
        log_ratio = log_ratio_of_events(student_rest, teacher_rest)
        rest_term, rest_cost = DIVERGENCE(student_rest, teacher_rest, log_ratio, parameter, complement)
        divergence += rest_term
        total_cost += rest_cost
        student_entropy -= times_exp(p_rest, student_rest)
        teacher_entropy -= times_exp(tl.exp(teacher_rest), teacher_rest)
    is_foreign = tl.max(is_outside.to(tl.int32)) > 0
    divergence = tl.where(is_foreign, float("nan"), tl.where(is_masked, 0.0, divergence))
    teacher_entropy = tl.where(is_foreign, float("nan"), tl.where(is_masked, 0.0, teacher_entropy))
    agreement = tl.where((num_larger == 0) & (is_masked == 0), 1.0, 0.0)
    is_nan = divergence != divergence
    tl.store(divergence_ptr + row, divergence)
    tl.store(student_entropy_ptr + row, tl.where(is_masked, 0.0, student_entropy))
    tl.store(teacher_entropy_ptr + row, teacher_entropy)
    tl.store(agreement_ptr + row, tl.where(is_nan, divergence, agreement))

    # A NaN student may leave the value alone, as where the teacher gives nothing to the ids of a truncated sum.
    is_nan_row = is_nan | ((student_total != student_total) & (is_masked == 0))
    has_no_gradient = is_masked | (divergence == float("inf")) | is_nan_row
    factor = 1.0
    if gradient_unit_ptr is not None:
        if IS_HALF_GRADIENT:
            # |d(logits)| <= bound, which becomes at most 2^15
            bound = (3.0 + gradient_bound_slope * tl.abs(tl.where(has_no_gradient, 0.0, divergence))) * slope
            bound = tl.minimum(bound, 3e38)
            factor = tl.exp2(tl.minimum(15.0 - tl.ceil(tl.log2(bound)), 100.0))
        # NaN in the unit, not in the row, so that a row with upstream gradient 0 does not poison a sum over rows. A row without
        # gradient has a unit of 0: its hidden state may hold anything.
        unit = tl.where(has_no_gradient, 0.0, 1.0 / factor)
        tl.store(gradient_unit_ptr + row, tl.where(is_nan_row, float("nan"), unit))
    if gradient_ptr is not None:
        gradient_row_ptr = gradient_ptr + row * gradient_row_stride
        if has_no_gradient:
            write_zero_row(gradient_row_ptr, vocab_size, BLOCK_VOCAB)
        else:
            # The gradient sums to 0: an event of probability above 1/2 gets minus the sum of the others, which is more exact.
            id_gradient = costs - p * total_cost
            rest_gradient = rest_cost - p_rest * total_cost
            if EVENTS == "tail":
                rest_gradient = tl.where(p_rest > 0.5, -tl.sum(id_gradient), rest_gradient)
            sum_of_others = tl.sum(tl.where(p > 0.5, 0.0, id_gradient)) + rest_gradient
            id_gradient = tl.where(p > 0.5, -sum_of_others, id_gradient)
            if EVENTS == "renormalized":
                write_zero_row(gradient_row_ptr, vocab_size, BLOCK_VOCAB)
                tl.debug_barrier()
            else:
                scale = tl.where(rest_sum > 0, rest_gradient / rest_sum, 0.0) * factor
                write_softmax_row(
                    gradient_row_ptr, row_ptr, tile_max_ptr, bias_ptr, column_stride, slope, softcap, vocab_size,
                    rest_max, scale, BLOCK_VOCAB, IS_HALF_GRADIENT,
                )  # fmt: skip
            id_gradient *= factor * head_slope(student_logits, slope, softcap)
            stored = as_stored(id_gradient, gradient_row_ptr, IS_HALF_GRADIENT)
            tl.store(gradient_row_ptr + id_columns, stored, mask=is_id)


class TopkOutputs(NamedTuple):
    """The fields of `DivergenceOutput` that this op has, float32."""

    divergence_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    top1_agreement_N: Tensor


def launch_topk_divergence(
    logits: LogitRows,
    picked: PickedLogits,
    teacher_logprobs_N_K: Tensor,
    divergence: tuple[str, float],
    events: Events,
    vocab_size: int,
    outputs: TopkOutputs,
    gradient: RowGradient,
    *,
    tile: TileConfig | None = None,
) -> None:
    """Fill `outputs` and what is wanted of the gradient.

    Args:
        logits: N rows, out of which the ids of `picked` were taken.
        teacher_logprobs_N_K: contiguous, any float dtype.
        divergence: `Divergence.kernel()`.
        gradient: as `launch_divergence_rows`.
    """
    num_rows, num_ids = picked.ids_n_K.shape
    if num_rows == 0:
        return
    name, parameter = divergence
    kernel = DIVERGENCE_KERNELS[name]
    tile = tile or choose_one_sided_tile_config(vocab_size, num_ids)
    bound_slope = 4.0 if events is Events.TRUNCATED else 2.0 * (1.0 + abs(parameter))
    with torch.accelerator.device_index(outputs.divergence_N.device.index):
        topk_divergence_kernel[(num_rows,)](
            logits.logits,
            logits.tile_max,
            logits.bias,
            picked.ids_n_K,
            picked.logits_n_K,
            teacher_logprobs_N_K,
            *outputs,
            gradient.logits_n_V,
            gradient.unit_n,
            vocab_size,
            *logits.strides(),
            0 if gradient.logits_n_V is None else gradient.logits_n_V.stride(0),
            logits.slope,
            logits.softcap,
            parameter,
            1.0 - parameter,
            gradient_bound_slope=0.0 if kernel.is_gradient_bounded else bound_slope,
            truncated_cost=kernel.truncated_cost or 0.0,
            DIVERGENCE=kernel.function,
            EVENTS=events.value,
            NUM_IDS=num_ids,
            BLOCK_IDS=triton.next_power_of_2(num_ids),
            BLOCK_VOCAB=tile.block_vocab,
            IS_HALF_GRADIENT=gradient.dtype == torch.float16,
            **tile.launch_options(),
        )
