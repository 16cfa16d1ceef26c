"""Public entry of `linear_prefix_logprobs`: what it computes, the checks, and the choice of implementation."""

from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    check_positive,
    check_same_device,
    check_tensor,
    check_workspace_bytes,
)
from esr_kernels.impl import Impl, check_impl, require_kernels
from esr_kernels.linear_prefix_logprobs.reference import linear_prefix_logprobs_reference
from esr_kernels.logit_storage import LogitStorage, check_logit_storage
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.prefix_logprobs.prefix_checks import check_prefix
from esr_kernels.prefix_logprobs.result import PrefixLogprobs

OP = "linear_prefix_logprobs"


def linear_prefix_logprobs(
    hidden_B_T_D: Tensor,
    head: OutputHead | Tensor,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    *,
    lengths_B: Tensor | None = None,
    temperature: float = 1.0,
    logits: LogitStorage = LogitStorage.AUTO,
    workspace_bytes: int | None = None,
    impl: Impl | str = Impl.FUSED,
) -> PrefixLogprobs:
    """`prefix_logprobs(head.logits(hidden), ...)` that projects the rows of valid slots only.

    Everything said there about slots, outputs and edge cases holds here. The logits of the other rows are never computed; their
    hidden states are never read and their gradient is exactly 0. Differentiable in the hidden states and in the weight and bias
    of the head, with any upstream gradient per slot. A head that does not require grad gets none.

    How many rows are projected is a number that the host must know. With `starts_B` and `lengths_B` on the CPU they are exactly
    the N valid slots. On another device, where the host does not wait for them, and inside torch.compile, they are
    N = B min(horizon, T - 1): what is invalid among these is projected as zeros. At the default horizons of Early Stopping
    Rollout few slots are; for full rollouts of mixed lengths keep starts and lengths on the CPU.

    Under FUSED hidden states and weights are multiplied, and d(logits) and the head converted, as `linear_divergence` says; the
    logit of the token itself is always float32. With n rows per chunk and g = 2 bytes (4 for float32 models), beyond inputs and
    results:

                          FLOP / (2 N V D)   memory
        no gradient       1                  4 n V  (FLOAT32), 2 n V (TILE_RELATIVE_FP16); N D of compacted rows, here and below
        frozen head       2                  the same, 4 N D and a slice of 16384 ids of the weight in 2 bytes: the input gradient
                                             is made in forward; in backward 4 N D
        trained head      3                  the same, and g N V of d(logits) kept for backward, where they fit in
                                             `workspace_bytes`; then in backward 6 N D and a slice of 16384 ids of the weight in
                                             2 and of its gradient in 4 bytes
        ... where not     4                  in backward 4 n V or 2 n V, and 4 V D for the weight's gradient

    With TILE_RELATIVE_FP16 also 4 n 2048 for the slice on its way, and for float32 models 4 n V of d(logits) beside the logits.
    Nothing of size (B, T, V) exists, and nothing of size (N, V) without a gradient of the head. Results repeat bit by bit.

    Args:
        hidden_B_T_D: any float dtype; column t predicts column t + 1.
        head: `OutputHead` or a bare weight (V, D).
        token_ids_B_T, horizon, temperature: as `prefix_logprobs`, also for the values that are checked on the CPU only.
        starts_B, lengths_B: as `prefix_logprobs`, on the CPU under the same conditions.
        logits: how FUSED stores logits; changes bytes and rounding, not the definition. AUTO takes FLOAT32 unless too few rows
            of it fit in `workspace_bytes`. REFERENCE keeps float32.
        workspace_bytes: > 0 or None; the most memory FUSED may hold for logits and kept d(logits), None for a sixteenth of the
            device's memory (1 GiB on a CPU). REFERENCE holds the logits of all valid slots.
        impl: see `Impl`.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `prefix_logprobs`.
        ValueError: `workspace_bytes` does not hold the logits of one row.
    """
    sizes: dict[str, int] = {}
    check_tensor(OP, "hidden_B_T_D", hidden_B_T_D, "B T D", sizes, FLOAT_DTYPES)
    head = as_output_head(OP, "head", head)
    check_tensor(OP, "head.weight", head.weight, "V D", sizes, FLOAT_DTYPES)
    check_prefix(OP, token_ids_B_T, starts_B, horizon, lengths_B, sizes)
    temperature = check_positive(OP, "temperature", temperature)
    floats = {"hidden_B_T_D": hidden_B_T_D, "head.weight": head.weight, "head.bias": head.bias}
    check_same_device(OP, **floats, token_ids_B_T=token_ids_B_T)
    logits = check_logit_storage(OP, logits)
    check_workspace_bytes(OP, workspace_bytes)
    arguments = hidden_B_T_D, head, token_ids_B_T, starts_B, horizon, lengths_B, temperature
    if check_impl(OP, impl) is Impl.REFERENCE:
        return linear_prefix_logprobs_reference(*arguments)
    require_kernels(OP, **floats)
    from esr_kernels.linear_prefix_logprobs.autograd import linear_prefix_logprobs_fused  # imports Triton

    return linear_prefix_logprobs_fused(*arguments, logits, workspace_bytes)
