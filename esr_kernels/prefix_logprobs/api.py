"""Log-probs of the first K response tokens of each rollout, and log-probs of many ids per row."""

import torch
from torch import Tensor

from esr_kernels.checks import FLOAT_DTYPES, INTEGER_DTYPES, check_positive, check_same_device, check_tensor
from esr_kernels.impl import Impl, require_reference
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.prefix_logprobs.reference import (
    gather_logprobs_reference,
    linear_prefix_logprobs_reference,
    prefix_logprobs_reference,
    prefix_mask,
)
from esr_kernels.prefix_logprobs.result import PrefixLogprobs


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

    Slot t of row b is valid iff t < min(horizon, lengths[b]), starts[b] + t < T and starts[b] >= 1. At the other slots
    the mask is False, log-prob and entropy are 0, the upstream gradient is ignored, and the logits and token ids are
    never read: NaN there changes neither the result nor the gradient, which is exactly 0.

    Log-probs are differentiable with any upstream gradient; entropies are detached. Computed in float32, in float64 for
    float64 logits. A -inf logit is probability 0: it adds 0 to the entropy, and its own log-prob is -inf.

    Args:
        logits_B_T_V: any float dtype; row t predicts column t + 1.
        token_ids_B_T: int32 or int64; at valid slots in [0, V).
        starts_B: column of the first response token of each row, >= 1.
        horizon: K >= 0, slots per row. 0 gives tensors of shape (B, 0).
        lengths_B: response tokens of each row; default T - starts_B.
        temperature: > 0, divides the logits.
        impl: see `Impl`.

    Values of integer tensors are checked on the CPU only. On other devices the host does not wait for them: slots of
    starts or lengths out of range are masked, and token ids out of range are undefined.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or number; on the CPU also start < 1, start > T,
            length < 0, start + length > T, or a token id of a valid slot outside [0, V).
        NotImplementedError: `impl` is FUSED, not built yet.
    """
    op = "prefix_logprobs"
    sizes: dict[str, int] = {}
    check_tensor(op, "logits_B_T_V", logits_B_T_V, "B T V", sizes, FLOAT_DTYPES)
    _check_prefix(op, token_ids_B_T, starts_B, horizon, lengths_B, sizes)
    temperature = check_positive(op, "temperature", temperature)
    check_same_device(
        op, logits_B_T_V=logits_B_T_V, token_ids_B_T=token_ids_B_T, starts_B=starts_B, lengths_B=lengths_B
    )
    require_reference(op, impl)
    return prefix_logprobs_reference(logits_B_T_V, token_ids_B_T, starts_B, horizon, lengths_B, temperature)


def linear_prefix_logprobs(
    hidden_B_T_D: Tensor,
    head: OutputHead | Tensor,
    token_ids_B_T: Tensor,
    starts_B: Tensor,
    horizon: int,
    *,
    lengths_B: Tensor | None = None,
    temperature: float = 1.0,
    impl: Impl | str = Impl.FUSED,
) -> PrefixLogprobs:
    """`prefix_logprobs(head.logits(hidden), ...)` that projects the rows of valid slots only.

    The logits of the other rows are never computed. Hidden states of invalid slots are never read and their gradient is
    exactly 0. Differentiable in the hidden states and in the weight and bias of the head.

    Args:
        hidden_B_T_D: any float dtype; column t predicts column t + 1.
        head: `OutputHead` or a bare weight (V, D).
        token_ids_B_T, starts_B, horizon, lengths_B, temperature, impl: see `prefix_logprobs`, also for the values that
            are checked on the CPU only.

    Raises:
        TypeError, ValueError, NotImplementedError: as `prefix_logprobs`.
    """
    op = "linear_prefix_logprobs"
    sizes: dict[str, int] = {}
    check_tensor(op, "hidden_B_T_D", hidden_B_T_D, "B T D", sizes, FLOAT_DTYPES)
    head = as_output_head(op, "head", head)
    check_tensor(op, "head.weight", head.weight, "V D", sizes, FLOAT_DTYPES)
    _check_prefix(op, token_ids_B_T, starts_B, horizon, lengths_B, sizes)
    temperature = check_positive(op, "temperature", temperature)
    check_same_device(
        op,
        hidden_B_T_D=hidden_B_T_D,
        head_weight=head.weight,
        head_bias=head.bias,
        token_ids_B_T=token_ids_B_T,
        starts_B=starts_B,
        lengths_B=lengths_B,
    )
    require_reference(op, impl)
    return linear_prefix_logprobs_reference(
        hidden_B_T_D, head, token_ids_B_T, starts_B, horizon, lengths_B, temperature
    )


def gather_logprobs(
    hidden_N_D: Tensor,
    head: OutputHead | Tensor,
    token_ids_N_K: Tensor,
    *,
    temperature: float = 1.0,
    impl: Impl | str = Impl.FUSED,
) -> Tensor:
    """Log-probs of K ids per row, for instance the top-k of another model. Equivalent PyTorch:

        (head.logits(hidden) / temperature).log_softmax(-1).gather(1, token_ids)     # 0 where token_ids is -1

    Id -1 is padding: log-prob 0, no gradient; the hidden state of a row of padding is never read and its gradient is
    exactly 0. An id may occur more than once in a row: each occurrence has its own value and its own upstream gradient.
    Differentiable in the hidden states and in the weight and bias of the head.

    Args:
        hidden_N_D: any float dtype.
        head: `OutputHead` or a bare weight (V, D).
        token_ids_N_K: int32 or int64 in [-1, V). Checked on the CPU only; elsewhere other values are undefined.
        temperature: > 0, divides the logits.
        impl: see `Impl`.

    Returns:
        logprobs_N_K: float32, or float64 for float64 hidden states.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device or number; on the CPU also an id outside [-1, V).
        NotImplementedError: `impl` is FUSED, not built yet.
    """
    op = "gather_logprobs"
    sizes: dict[str, int] = {}
    check_tensor(op, "hidden_N_D", hidden_N_D, "N D", sizes, FLOAT_DTYPES)
    head = as_output_head(op, "head", head)
    check_tensor(op, "head.weight", head.weight, "V D", sizes, FLOAT_DTYPES)
    check_tensor(op, "token_ids_N_K", token_ids_N_K, "N K", sizes, INTEGER_DTYPES)
    temperature = check_positive(op, "temperature", temperature)
    check_same_device(
        op, hidden_N_D=hidden_N_D, head_weight=head.weight, head_bias=head.bias, token_ids_N_K=token_ids_N_K
    )
    if token_ids_N_K.device.type == "cpu":
        _check_values(op, "token_ids_N_K", token_ids_N_K, -1, sizes["V"] - 1)
    require_reference(op, impl)
    return gather_logprobs_reference(hidden_N_D, head, token_ids_N_K, temperature)


def _check_prefix(
    op: str, token_ids_B_T: Tensor, starts_B: Tensor, horizon: int, lengths_B: Tensor | None, sizes: dict[str, int]
) -> None:
    """Shapes and dtypes of the integer arguments, and on the CPU their values; `sizes` holds B, T and V."""
    check_tensor(op, "token_ids_B_T", token_ids_B_T, "B T", sizes, INTEGER_DTYPES)
    check_tensor(op, "starts_B", starts_B, "B", sizes, INTEGER_DTYPES)
    if lengths_B is not None:
        check_tensor(op, "lengths_B", lengths_B, "B", sizes, INTEGER_DTYPES)
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise TypeError(f"{op}: horizon must be an int >= 0, got {type(horizon).__name__}")
    if horizon < 0:
        raise ValueError(f"{op}: horizon must be >= 0, got {horizon}")
    if any(t is not None and t.device.type != "cpu" for t in (token_ids_B_T, starts_B, lengths_B)):
        return
    _check_values(op, "starts_B", starts_B, 1, sizes["T"])
    if lengths_B is not None:
        _check_values(op, "lengths_B", lengths_B, 0, sizes["T"] - starts_B, limit="T - start")
    mask_B_K = prefix_mask(starts_B, lengths_B, horizon, sizes["T"])
    batch_N, slot_N = mask_B_K.nonzero(as_tuple=True)
    response_N = token_ids_B_T[batch_N, starts_B[batch_N] + slot_N]
    outside_N = (response_N < 0) | (response_N >= sizes["V"])
    if outside_N.any():
        n = int(outside_N.nonzero()[0])
        raise ValueError(
            f"{op}: token_ids_B_T must be in [0, V) = [0, {sizes['V']}) at the slots of the response, "
            f"got {int(response_N[n])} in row {int(batch_N[n])}, slot {int(slot_N[n])}"
        )


def _check_values(op: str, name: str, values: Tensor, least: int, most: int | Tensor, limit: str = "") -> None:
    """Raise with the first row that holds a value outside [least, most]; `limit` names a `most` given per row."""
    outside = (values < least) | (values > most)
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        bound = int(torch.as_tensor(most).expand(values.shape)[index])
        bound = f"{limit} = {bound}" if limit else f"{bound}"
        raise ValueError(f"{op}: {name} must be in [{least}, {bound}], got {int(values[index])} in row {index[0]}")
