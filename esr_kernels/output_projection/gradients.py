"""From d(logits) to the gradients of hidden states, weight and bias, vocabulary slice by vocabulary slice.

With g the upstream gradient of the rows and dZ their d(logits) for upstream 1:

    d(hidden) = diag(g) dZ weight        d(weight) = dZ^T diag(g) hidden        d(bias) = dZ^T g

so g never touches dZ, which is therefore made once, for any g.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.matrix_product import (
    gradient_dtype,
    matmul_float32,
    weight_as,
    weighted_rows_as,
)

# Vocabulary ids taken at once: 64 MiB of converted weight at D = 2048 and 128 MiB of its gradient in float32.
SLICE_IDS = 16384


class Needs(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def vocab_slices(vocab_size: int) -> Iterator[slice]:
    for start in range(0, vocab_size, SLICE_IDS):
        yield slice(start, min(start + SLICE_IDS, vocab_size))


def accumulate_hidden_gradient(gradient_n_V: Tensor, weight_V_D: Tensor, out_n_D: Tensor) -> None:
    """out = gradient @ weight[:V] in float32; the weight may have more rows than the gradient columns."""
    for ids in vocab_slices(gradient_n_V.shape[1]):
        operand_M_D, factor = weight_as(gradient_n_V.dtype, weight_V_D[ids])
        matmul_float32(gradient_n_V[:, ids], operand_M_D, out=out_n_D, accumulate=ids.start > 0)
    if factor != 1:
        out_n_D.div_(factor)


def row_weights(upstream_N: Tensor, gradient_unit_N: Tensor) -> Tensor:
    """What multiplies a row of stored d(logits); 0 for upstream 0 even where the row is NaN."""
    return torch.where(upstream_N == 0, 0.0, upstream_N.float() * gradient_unit_N)


def weigh_hidden_gradient(sum_N_D: Tensor, weight_N: Tensor, dtype: torch.dtype) -> Tensor:
    """sum * weight in `dtype`, 0 for weight 0; overwrites `sum_N_D`."""
    return sum_N_D.mul_(weight_N[:, None]).masked_fill_(weight_N[:, None] == 0, 0.0).to(dtype)


class HeadGradient:
    """d(weight) or d(bias), summed over chunks of rows in float32: rows of it are d(logits)^T (row weight * operand).

    The operand is the hidden states, or a column of ones for the bias.
    """

    def __init__(self, like: Tensor, operand_N_D: Tensor, weight_N: Tensor, gradient_dtype: torch.dtype) -> None:
        self.operand_N_D, self.unit = weighted_rows_as(gradient_dtype, operand_N_D, weight_N)
        self.like = like
        self.sum_V_D: Tensor | None = None

    def add(self, rows: slice, gradient_n_V: Tensor) -> None:
        """Add a chunk of rows, to a float32 sum over all chunks."""
        is_first = self.sum_V_D is None
        if is_first:
            shape = (gradient_n_V.shape[1], self.operand_N_D.shape[1])
            self.sum_V_D = self.operand_N_D.new_empty(shape, dtype=torch.float32)
        for ids in vocab_slices(gradient_n_V.shape[1]):
            self._product(rows, gradient_n_V[:, ids], self.sum_V_D[ids], accumulate=not is_first)

    def of_one_chunk(self, gradient_N_V: Tensor) -> Tensor:
        """The gradient where all rows are one chunk: no float32 copy of it, but for one slice, ever exists."""
        vocab_size = gradient_N_V.shape[1]
        gradient_V_D = self._allocate(vocab_size)
        shape = (min(vocab_size, SLICE_IDS), self.operand_N_D.shape[1])
        buffer = self.operand_N_D.new_empty(shape, dtype=torch.float32)
        for ids in vocab_slices(vocab_size):
            slice_M_D = buffer[: ids.stop - ids.start]
            self._product(slice(None), gradient_N_V[:, ids], slice_M_D, accumulate=False)
            torch.mul(slice_M_D, self.unit, out=gradient_V_D[ids])
        return gradient_V_D.view_as(self.like)

    def result(self) -> Tensor:
        """The gradient of the chunks that were added."""
        vocab_size = 0 if self.sum_V_D is None else self.sum_V_D.shape[0]
        gradient_V_D = self._allocate(vocab_size)
        if self.sum_V_D is not None:
            torch.mul(self.sum_V_D, self.unit, out=gradient_V_D[:vocab_size])
        return gradient_V_D.view_as(self.like)

    def _product(self, rows: slice, gradient_n_M: Tensor, out_M_D: Tensor, accumulate: bool) -> None:
        matmul_float32(gradient_n_M.T, self.operand_N_D[rows], out=out_M_D, accumulate=accumulate)

    def _allocate(self, vocab_size: int) -> Tensor:
        """(V, D) or (V, 1) of the parameter's dtype; the ids past the vocabulary cut are 0, the others not yet written."""
        gradient_V_D = self.like.new_empty((self.like.shape[0], self.operand_N_D.shape[1]))
        gradient_V_D[vocab_size:].zero_()
        return gradient_V_D


def head_gradients(
    hidden_N_D: Tensor, weight_V_D: Tensor, bias_V: Tensor | None, weight_N: Tensor, dtype: torch.dtype, needs: Needs
) -> tuple[HeadGradient | None, HeadGradient | None]:
    """Accumulators for weight and bias, where they are needed."""
    weight = HeadGradient(weight_V_D, hidden_N_D, weight_N, dtype) if needs.weight else None
    ones_N_1 = hidden_N_D.new_ones((hidden_N_D.shape[0], 1))
    return weight, HeadGradient(bias_V, ones_N_1, weight_N, dtype) if needs.bias else None


def backward_of_kept(
    upstream_N: Tensor,
    gradient_logits_N_V: Tensor,
    gradient_unit_N: Tensor,
    hidden_N_D: Tensor,
    weight_V_D: Tensor,
    bias_V: Tensor | None,
    vocab_size: int,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from kept d(logits), which stay unchanged.

    Memory beyond the results: (N, D) float32 and float16, and one slice of converted weight and of its float32 gradient.
    FLOP: 2 N V D for each of hidden states and weight.
    """
    gradient_logits_N_V = gradient_logits_N_V[:, :vocab_size]
    weight_N = row_weights(upstream_N, gradient_unit_N)
    hidden_gradient = None
    if needs.hidden:
        sum_N_D = hidden_N_D.new_empty(hidden_N_D.shape, dtype=torch.float32)
        accumulate_hidden_gradient(gradient_logits_N_V, weight_V_D, sum_N_D)
        hidden_gradient = weigh_hidden_gradient(sum_N_D, weight_N, hidden_N_D.dtype)
        del sum_N_D
    weight, bias = head_gradients(hidden_N_D, weight_V_D, bias_V, weight_N, gradient_logits_N_V.dtype, needs)
    return (
        hidden_gradient,
        None if weight is None else weight.of_one_chunk(gradient_logits_N_V),
        None if bias is None else bias.of_one_chunk(gradient_logits_N_V),
    )


def gradients_of_chunks(
    chunks: Iterable[tuple[slice, Tensor]], weight_N: Tensor, hidden_N_D: Tensor, head: OutputHead, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from d(logits) (n, V) of one chunk of rows at a time.

    `weight_N` is what multiplies a row. Memory beyond the results: (N, D) float16, the weight's gradient in float32, (n, D)
    float32.
    """
    dtype = gradient_dtype(hidden_N_D, head.weight)
    weight, bias = head_gradients(hidden_N_D, head.weight, head.bias, weight_N, dtype, needs)
    hidden_gradient = torch.empty_like(hidden_N_D, memory_format=torch.contiguous_format) if needs.hidden else None
    for rows, gradient_n_V in chunks:
        if needs.hidden:
            sum_n_D = hidden_N_D.new_empty((rows.stop - rows.start, hidden_N_D.shape[1]), dtype=torch.float32)
            accumulate_hidden_gradient(gradient_n_V, head.weight, sum_n_D)
            hidden_gradient[rows] = weigh_hidden_gradient(sum_n_D, weight_N[rows], hidden_N_D.dtype)
        if weight is not None:
            weight.add(rows, gradient_n_V)
        if bias is not None:
            bias.add(rows, gradient_n_V)
    return (
        hidden_gradient,
        None if weight is None else weight.result(),
        None if bias is None else bias.result(),
    )
