"""Public entry of `prefix_logprobs`: what it computes, the checks, and the choice of implementation."""

from torch import Tensor

from esr_kernels.checks import FLOAT_DTYPES, check_positive, check_same_device, check_tensor
from esr_kernels.impl import Impl, check_impl, require_kernels
from esr_kernels.prefix_logprobs.prefix_checks import check_prefix
from esr_kernels.prefix_logprobs.reference import prefix_logprobs_reference
from esr_kernels.prefix_logprobs.result import PrefixLogprobs

OP = "prefix_logprobs"


def prefix_logprobs(
    logits_B_T_V: Tensor,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    *,
    lengths_B: Tensor | None = None,
    temperature: float = 1.0,
    impl: Impl | str = Impl.FUSED,
) -> PrefixLogprobs:
    """Log-prob and entropy of the first `horizon` response tokens of each rollout. Equivalent PyTorch, at valid (b, t):

        row = (logits[b, starts[b] - 1 + t] / temperature).log_softmax(-1)     # predicts column starts[b] + t
        logprobs[b, t] = row[token_ids[b, starts[b] + t]]
        entropy[b, t] = -(row.exp() * row).sum()
        is_top1[b, t] = row.argmax() == token_ids[b, starts[b] + t]            # ties: the lowest id is the largest

    Slot t of row b is valid iff t < min(horizon, lengths[b]), starts[b] + t < T and starts[b] >= 1. At the other slots
    the mask and the top-1 flag are False, log-prob and entropy are 0, the upstream gradient is ignored, and the logits and
    token ids are never read: NaN there changes neither the result nor the gradient, which is exactly 0. A response that
    ends inside the prefix (with its EOS, which counts) ends where `lengths_B` says: tokens are not compared with any id.

    Log-probs are differentiable with any upstream gradient; entropies are detached. Computed in float32, in float64 for
    float64 logits (REFERENCE only). The prefix is that of Early Stopping Rollout (arXiv 2605.27028, Eq. 2).

    FUSED (esr_kernels/gather_logprobs/forward_kernel.py, esr_kernels/prefix_logprobs/backward_kernel.py) reads each row of the
    prefix once in forward and once in backward, where it writes the gradient: with n valid slots 2 and 4 bytes per logit of n
    rows at 16 bits, and about 25 FLOP. The gradient is dense: its zeros are B T V elements written. Memory beyond the
    results: about 40 bytes a slot. `linear_prefix_logprobs` avoids logits and gradient of the other rows altogether.

    Args:
        logits_B_T_V: any float dtype and strides; row t predicts column t + 1.
        token_ids_B_T: int32 or int64; at valid slots in [0, V).
        starts_B: column of the first response token of each row, >= 1. On the logits' device, or on the CPU, from where it is
            copied without waiting: a pinned buffer must not be overwritten before the device has read it, and a CUDA graph
            must not be captured with starts on the CPU.
        horizon: K >= 0, slots per row. 0 gives tensors of shape (B, 0).
        lengths_B: response tokens of each row, on the device of `starts_B`; default T - starts_B.
        temperature: > 0, divides the logits.
        impl: see `Impl`.

    Edge cases, in value and gradient:
        - A -inf logit is probability 0: it adds 0 to the entropy, and its own log-prob is -inf.
        - A row whose logits are all -inf has log-prob -inf, entropy 0, no top-1 token and gradient 0.
        - A NaN or +inf logit makes log-prob and entropy of its own slot NaN, its flag False and the row's gradient NaN
          (under FUSED 0 where the upstream gradient is 0), and touches no other slot.
        - FUSED keeps the digits of 1 - p for a token that is nearly certain: in its log-prob and in its gradient.

    Values of integer tensors are checked on the CPU only. On other devices the host does not wait for them: slots of
    starts or lengths out of range are masked, and token ids out of range give a log-prob of NaN without gradient.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or number; on the CPU also start < 1, start > T,
            length < 0, start + length > T, or a token id of a valid slot outside [0, V).
        TypeError: `impl` is FUSED and the logits are float64.
        NotImplementedError: `impl` is FUSED and Triton or a CUDA device is missing.
        RuntimeError: a second derivative is asked of FUSED.
    """
    sizes: dict[str, int] = {}
    check_tensor(OP, "logits_B_T_V", logits_B_T_V, "B T V", sizes, FLOAT_DTYPES)
    check_prefix(OP, token_ids_B_T, starts_B, horizon, lengths_B, sizes)
    temperature = check_positive(OP, "temperature", temperature)
    check_same_device(OP, logits_B_T_V=logits_B_T_V, token_ids_B_T=token_ids_B_T)
    arguments = logits_B_T_V, token_ids_B_T, starts_B, horizon, lengths_B, temperature
    if check_impl(OP, impl) is Impl.REFERENCE:
        return prefix_logprobs_reference(*arguments)
    require_kernels(OP, logits_B_T_V=logits_B_T_V)
    from esr_kernels.prefix_logprobs.autograd import prefix_logprobs_fused  # imports Triton

    return prefix_logprobs_fused(*arguments)
