"""Which slots of a rollout's prefix hold a response token, and where its token and the row that predicts it stand."""

from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = 2**31 - 1  # beyond every vocabulary: a token that is none, in a slot that should hold one


class PrefixSlots(NamedTuple):
    """One entry per slot; where the mask is False, `batch_B_K` and `row_B_K` still point into the tensors."""

    mask_B_K: Tensor  # bool
    batch_B_K: Tensor  # int64, index of the rollout
    row_B_K: Tensor  # int64, column of the row that predicts the token: one before the token's own
    token_B_K: Tensor  # int64, the token; -1 where the mask is False


def prefix_mask(starts_B: Tensor, lengths_B: Tensor | None, horizon: int, num_columns: int) -> Tensor:
    """Slot t is valid iff t < min(horizon, length), start + t < T and start >= 1; bool (B, horizon)."""
    slot_K = torch.arange(horizon, device=starts_B.device)
    # Not starts + slot < T, which may overflow where a start is no column.
    in_tensor_B_K = (starts_B[:, None] >= 1) & (slot_K < num_columns - starts_B[:, None])
    return in_tensor_B_K if lengths_B is None else in_tensor_B_K & (slot_K < lengths_B[:, None])


def select_prefix_slots(token_ids_B_T: Tensor, starts_B: Tensor, lengths_B: Tensor | None, horizon: int) -> PrefixSlots:
    """Slots of all rollouts, on the device of the token ids; the host does not wait for it."""
    (batch_size, num_columns), device = token_ids_B_T.shape, token_ids_B_T.device
    starts_B = starts_B.to(device, torch.int64, non_blocking=True)
    lengths_B = None if lengths_B is None else lengths_B.to(device, torch.int64, non_blocking=True)
    mask_B_K = prefix_mask(starts_B, lengths_B, horizon, num_columns)
    if num_columns < 2:  # a lone column is predicted by no row
        zeros_B_K = torch.zeros(mask_B_K.shape, dtype=torch.int64, device=device)
        return PrefixSlots(mask_B_K, zeros_B_K, zeros_B_K, zeros_B_K - 1)
    column_B_K = (starts_B[:, None] + torch.arange(horizon, device=device)).clamp(1, num_columns - 1)
    token_B_K = token_ids_B_T.gather(1, column_B_K).long()
    token_B_K = token_B_K.masked_fill(token_B_K < 0, NO_TOKEN).masked_fill(~mask_B_K, -1)
    batch_B_K = torch.arange(batch_size, device=device)[:, None].expand_as(column_B_K)
    return PrefixSlots(mask_B_K, batch_B_K, column_B_K - 1, token_B_K)
