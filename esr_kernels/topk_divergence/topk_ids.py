"""Which ids to compare: the likeliest of a model, alone or united with those of another."""

import torch
from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_same_device,
    check_tensor,
    check_workspace_bytes,
)
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.output_projection.matrix_product import matmul_float32, product_dtype
from esr_kernels.output_projection.plan import MAX_CHUNK_ROWS, default_workspace_bytes

OP = "select_topk_ids"


def select_topk_ids(
    hidden_N_D: Tensor,
    head: OutputHead | Tensor,
    num_ids: int,
    *,
    united_with_N_K: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """The `num_ids` likeliest ids of each row, for `topk_divergence` and `gather_logprobs`. Equivalent PyTorch:

        head.logits(hidden).topk(num_ids).indices

    With `united_with_N_K`, for instance a teacher's ids: these first, then the likeliest, with -1 in place of every id that
    stands earlier in its row. Both ops take -1 for an empty slot. Forward KL needs the ids of the teacher, reverse KL those of
    the student, and Jensen-Shannon both; the other model's log-probs at them come from `gather_logprobs`::

        ids = select_topk_ids(student_hidden, student_head, 64, united_with_N_K=teacher_ids)
        teacher_logprobs = gather_logprobs(teacher_hidden, teacher_head, ids)
        topk_divergence(student_hidden, student_head, ids, teacher_logprobs, GeneralizedJSD(0.5))

    Plain PyTorch on any device, without gradient: `torch.topk` on one chunk of rows after another, products of 16-bit hidden
    states and weights of one dtype summed in float32. Memory: 4 V for each row of a chunk (8 V in float64); where the dtypes
    differ also 4 V D of the converted weight. Logit scale and soft cap do not change the order and are left out: ids that a soft
    cap makes equal keep their order.

    Args:
        hidden_N_D: (N, D), any float dtype.
        head: `OutputHead` or a bare weight (V, D).
        num_ids: M in [1, V]. Among equal logits the choice is that of `torch.topk`.
        united_with_N_K: (N, K) int32 or int64, or None. Ids that it repeats become -1 too.
        workspace_bytes: > 0 or None; the most memory that logits may take, at least one row; None as in `linear_divergence`.

    Returns:
        ids (N, M) int64, with `united_with_N_K` (N, K + M).

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or number.
    """
    head = as_output_head(OP, "head", head)
    sizes: dict[str, int] = {}
    check_tensor(OP, "hidden_N_D", hidden_N_D, "N D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "head.weight", head.weight, "V D", sizes, FLOAT_DTYPES)
    if united_with_N_K is not None:
        check_tensor(OP, "united_with_N_K", united_with_N_K, "N K", sizes, INTEGER_DTYPES)
    tensors = {"hidden_N_D": hidden_N_D, "head.weight": head.weight, "head.bias": head.bias}
    check_same_device(OP, **tensors, united_with_N_K=united_with_N_K)
    if isinstance(num_ids, bool) or not isinstance(num_ids, int):
        raise TypeError(f"{OP}: num_ids must be an int in [1, V], got {type(num_ids).__name__}")
    if not 1 <= num_ids <= sizes["V"]:
        raise ValueError(f"{OP}: num_ids must be in [1, V] = [1, {sizes['V']}], got {num_ids}")
    check_workspace_bytes(OP, workspace_bytes)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_N_D.device)

    num_rows, row_bytes = sizes["N"], sizes["V"] * max(4, hidden_N_D.dtype.itemsize)
    chunk_rows = max(1, min(num_rows, MAX_CHUNK_ROWS, workspace_bytes // row_bytes))
    ids_N_M = torch.empty((num_rows, num_ids), dtype=torch.int64, device=hidden_N_D.device)
    with torch.no_grad(), torch.autocast(hidden_N_D.device.type, enabled=False):
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            ids_N_M[rows] = order_preserving_logits(hidden_N_D[rows], head).topk(num_ids).indices
    if united_with_N_K is None:
        return ids_N_M
    ids_N_K = torch.cat([united_with_N_K.long(), ids_N_M], dim=1)
    return ids_N_K.masked_fill(is_repeated(ids_N_K), -1)


def order_preserving_logits(hidden_n_D: Tensor, head: OutputHead) -> Tensor:
    """hidden @ weight.T + bias in float32, float64 for float64 hidden states."""
    if hidden_n_D.dtype == torch.float64:
        logits_n_V = hidden_n_D @ head.weight.double().T
    else:
        dtype = product_dtype(hidden_n_D, head.weight)
        logits_n_V = hidden_n_D.new_empty((hidden_n_D.shape[0], head.vocab_size), dtype=torch.float32)
        matmul_float32(hidden_n_D.to(dtype), head.weight.to(dtype).T, out=logits_n_V)
    return logits_n_V if head.bias is None else logits_n_V.add_(head.bias)


def is_repeated(ids_N_K: Tensor) -> Tensor:
    """True where an earlier slot of the row holds the same id."""
    ordered_N_K, slots_N_K = ids_N_K.sort(dim=-1, stable=True)
    repeats_N_K = torch.zeros_like(ordered_N_K, dtype=torch.bool)
    repeats_N_K[:, 1:] = ordered_N_K[:, 1:] == ordered_N_K[:, :-1]
    return torch.zeros_like(repeats_N_K).scatter(-1, slots_N_K, repeats_N_K)
