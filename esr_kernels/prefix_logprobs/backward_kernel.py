"""One program per slot: the gradient of its row of logits from the sums that the forward kernel kept.

    d(logits) = upstream (1[j = token] - p_j) / temperature; at the token, 1 - p is the kept share of the others.

The row is read once and its gradient written once. The other rows of the gradient are zeros, which cost one write of all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.gather_logprobs.forward_kernel import SourceRows, source_offset, strides_in_units
from esr_kernels.row_rest_kernel import write_softmax_row
from esr_kernels.tile_config import TileConfig, choose_one_sided_tile_config


@triton.jit(
    do_not_specialize=["num_rows", "columns_per_batch", "upstream_stride", "batch_units", "row_units"],
    do_not_specialize_on_alignment=["upstream_ptr", "rows_ptr", "token_ids_ptr", "sums_ptr"],
)
def logprob_gradient_kernel(
    upstream_ptr, logits_ptr, rows_ptr, token_ids_ptr, sums_ptr, gradient_ptr,
    num_rows, vocab_size, columns_per_batch, upstream_stride,
    stride_unit, batch_units, row_units, column_stride, gradient_row_stride, slope,
    BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
    token = tl.load(token_ids_ptr + row)
    total = tl.load(sums_ptr + num_rows + row)
    # Otherwise the row is not read and its gradient stays 0, whatever it holds.
    if (upstream != 0) & (total != 0) & (token >= 0) & (token < vocab_size):
        row_max = tl.load(sums_ptr + row)
        rest_share = tl.load(sums_ptr + 2 * num_rows + row)
        source = tl.load(rows_ptr + row)
        row_ptr = logits_ptr + source_offset(source, columns_per_batch, batch_units, row_units) * stride_unit
        gradient_row_ptr = gradient_ptr + source * gradient_row_stride
        write_softmax_row(
            gradient_row_ptr, row_ptr, None, None, column_stride, slope, None, vocab_size,
            row_max, -upstream / total, BLOCK_VOCAB, False,
        )  # fmt: skip
        token_gradient = (upstream * rest_share * slope).to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_row_ptr + token, token_gradient)


def launch_logprob_gradient(
    upstream_N: Tensor,
    logits_B_T_V: Tensor,
    source: SourceRows,
    token_ids_N: Tensor,
    slope: float,
    *,
    tile: TileConfig | None = None,
) -> Tensor:
    """Gradient of sum(upstream * log-prob) with respect to (B, T, V) logits, in their dtype, contiguous; 0 in all other rows.

    Memory: the gradient. A row must be that of one slot at most.
    """
    gradient_B_T_V = torch.zeros_like(logits_B_T_V, memory_format=torch.contiguous_format)
    num_rows, vocab_size = token_ids_N.shape[0], logits_B_T_V.shape[2]
    if num_rows == 0:
        return gradient_B_T_V
    tile = tile or choose_one_sided_tile_config(vocab_size, 1)
    with torch.accelerator.device_index(gradient_B_T_V.device.index):
        logprob_gradient_kernel[(num_rows,)](
            upstream_N,
            logits_B_T_V,
            source.rows_N,
            token_ids_N,
            source.sums_3_N,
            gradient_B_T_V,
            num_rows,
            vocab_size,
            logits_B_T_V.shape[1],
            upstream_N.stride(0),
            *strides_in_units(logits_B_T_V),
            logits_B_T_V.stride(2),
            vocab_size,
            slope,
            BLOCK_VOCAB=tile.block_vocab,
            **tile.launch_options(),
        )
    return gradient_B_T_V
