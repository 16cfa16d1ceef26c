"""Checks of the arguments that say where a prefix lies, shared by the ops that take one."""

from torch import Tensor

from esr_kernels.checks import INTEGER_DTYPES, check_same_device, check_tensor
from esr_kernels.prefix_logprobs.prefix_slots import prefix_mask
from esr_kernels.value_checks import can_look_at, check_values


def check_prefix(
    op: str, token_ids_B_T: Tensor, starts_B: Tensor, horizon: int, lengths_B: Tensor | None, sizes: dict[str, int]
) -> None:
    """Shapes, dtypes and devices, and on the CPU values; `sizes` holds B, T and V.

    Raises:
        TypeError, ValueError: as `prefix_logprobs`.
    """
    check_tensor(op, "token_ids_B_T", token_ids_B_T, "B T", sizes, INTEGER_DTYPES)
    check_tensor(op, "starts_B", starts_B, "B", sizes, INTEGER_DTYPES)
    if lengths_B is not None:
        check_tensor(op, "lengths_B", lengths_B, "B", sizes, INTEGER_DTYPES)
    if starts_B.device.type == "cpu":  # the host's own numbers, wherever the other tensors are
        check_same_device(op, starts_B=starts_B, lengths_B=lengths_B)
    else:
        check_same_device(op, token_ids_B_T=token_ids_B_T, starts_B=starts_B, lengths_B=lengths_B)
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise TypeError(f"{op}: horizon must be an int >= 0, got {type(horizon).__name__}")
    if horizon < 0:
        raise ValueError(f"{op}: horizon must be >= 0, got {horizon}")
    if not can_look_at(starts_B):
        return
    check_values(op, "starts_B", starts_B, 1, sizes["T"])
    if lengths_B is not None:
        check_values(op, "lengths_B", lengths_B, 0, sizes["T"] - starts_B, limit="T - start")
    if can_look_at(token_ids_B_T):
        mask_B_K = prefix_mask(starts_B, lengths_B, horizon, sizes["T"])
        check_response_tokens(op, token_ids_B_T, starts_B, mask_B_K, sizes["V"])


def check_response_tokens(op: str, token_ids_B_T: Tensor, starts_B: Tensor, mask_B_K: Tensor, vocab_size: int) -> None:
    """Raise with the first slot of a response whose token is outside [0, V)."""
    batch_N, slot_N = mask_B_K.nonzero(as_tuple=True)
    response_N = token_ids_B_T[batch_N, starts_B[batch_N] + slot_N]
    outside_N = (response_N < 0) | (response_N >= vocab_size)
    if outside_N.any():
        n = int(outside_N.nonzero()[0])
        raise ValueError(
            f"{op}: token_ids_B_T must be in [0, V) = [0, {vocab_size}) at the slots of the response, "
            f"got {int(response_N[n])} in row {int(batch_N[n])}, slot {int(slot_N[n])}"
        )
