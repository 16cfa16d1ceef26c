"""Public entry of `gather_logprobs`: what it computes, the checks, and the choice of implementation."""

from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_positive,
    check_same_device,
    check_tensor,
    check_workspace_bytes,
)
from esr_kernels.gather_logprobs.reference import gather_logprobs_reference
from esr_kernels.impl import Impl, check_impl, check_number_of_ids, require_kernels
from esr_kernels.logit_storage import LogitStorage, check_logit_storage
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.value_checks import can_look_at, check_values

OP = "gather_logprobs"


def gather_logprobs(
    hidden_N_D: Tensor,
    head: OutputHead | Tensor,
    token_ids_N_K: Tensor,
    *,
    temperature: float = 1.0,
    logits: LogitStorage = LogitStorage.AUTO,
    workspace_bytes: int | None = None,
    impl: Impl | str = Impl.FUSED,
) -> Tensor:
    """Log-probs of K ids per row, for instance the top-k of another model. Equivalent PyTorch:

        (head.logits(hidden) / temperature).log_softmax(-1).gather(1, token_ids)     # 0 where token_ids is -1

    Id -1 is padding: log-prob 0, no gradient; the hidden state of a row of padding plays no part and its gradient is
    exactly 0. An id may occur more than once in a row: each occurrence has its own value and its own upstream gradient.
    Differentiable in the hidden states and in the weight and bias of the head, with any upstream gradient per id.

    Under FUSED hidden states and weights are multiplied, and d(logits) and the head converted, as `linear_divergence` says; the
    logits of the ids themselves are always float32. A row of padding is projected like the others and its result discarded.
    Another K compiles the kernels again.
    With n rows per chunk and g = 2 bytes (4 for float32 models), s = 4 bytes (FLOAT32) or 2 (TILE_RELATIVE_FP16), beyond inputs
    and results:

                                        FLOP / (2 N V D)   memory
        no gradient                     1                  s n V
        gradient of hidden states       2                  s N V kept for backward, where all rows and their d(logits) fit in
                                                           `workspace_bytes`; then in backward g N V, 6 N D, a slice of 16384 ids
                                                           of the weight in 2 bytes
        gradient of hidden and head     3                  the same, and in backward a slice of the weight's gradient in 4 bytes
        ... where they do not fit       1 more             in forward s n V; in backward s n V and 4 V D for the weight's gradient

    With TILE_RELATIVE_FP16 also 4 n 2048 for the slice on its way, and recomputing for float32 models 4 n V of d(logits).

    Args:
        hidden_N_D: any float dtype.
        head: `OutputHead` or a bare weight (V, D).
        token_ids_N_K: int32 or int64 in [-1, V). Checked on the CPU only; elsewhere other values give a log-prob of NaN
            without gradient. FUSED takes at most 1024 ids a row.
        temperature: > 0, divides the logits.
        logits, workspace_bytes: as `linear_prefix_logprobs`.
        impl: see `Impl`.

    Returns:
        logprobs_N_K: float32, or float64 for float64 hidden states (REFERENCE only).

    Edge cases: a logit of -inf is probability 0, with log-prob -inf; a row whose logits are all -inf has log-probs -inf and
    gradient 0; NaN or +inf among the logits of a row makes its log-probs NaN, and the gradient of that row (0 where its
    upstream gradients are all 0). The gradient of the head sums over rows, so it is NaN as soon as one of them is.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or number; on the CPU also an id outside [-1, V).
        TypeError: `impl` is FUSED and an input is float64.
        ValueError: `impl` is FUSED and K > 1024, or `workspace_bytes` does not hold the logits of one row.
        NotImplementedError: `impl` is FUSED and Triton or a CUDA device is missing.
        RuntimeError: a second derivative is asked of FUSED.
    """
    sizes: dict[str, int] = {}
    check_tensor(OP, "hidden_N_D", hidden_N_D, "N D", sizes, FLOAT_DTYPES)
    head = as_output_head(OP, "head", head)
    check_tensor(OP, "head.weight", head.weight, "V D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "token_ids_N_K", token_ids_N_K, "N K", sizes, INTEGER_DTYPES)
    temperature = check_positive(OP, "temperature", temperature)
    floats = {"hidden_N_D": hidden_N_D, "head.weight": head.weight, "head.bias": head.bias}
    check_same_device(OP, **floats, token_ids_N_K=token_ids_N_K)
    if can_look_at(token_ids_N_K):
        check_values(OP, "token_ids_N_K", token_ids_N_K, -1, sizes["V"] - 1)
    logits = check_logit_storage(OP, logits)
    check_workspace_bytes(OP, workspace_bytes)
    if check_impl(OP, impl) is Impl.REFERENCE:
        return gather_logprobs_reference(hidden_N_D, head, token_ids_N_K, temperature)
    require_kernels(OP, **floats)
    check_number_of_ids(OP, "token_ids_N_K", sizes["K"])
    from esr_kernels.gather_logprobs.autograd import gather_logprobs_fused  # imports Triton

    return gather_logprobs_fused(hidden_N_D, head, token_ids_N_K, temperature, logits, workspace_bytes)
