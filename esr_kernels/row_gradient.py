"""What a row kernel that makes d(logits) together with the value writes of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class RowGradient(NamedTuple):
    """Where a row kernel leaves d(logits) of a chunk for an upstream gradient of 1; None: it is not wanted.

    Row n of `logits_n_V` times `unit_n[n]` is the gradient of the op's first output with respect to hidden @ weight.T + bias.
    """

    logits_n_V: Tensor | None
    unit_n: Tensor | None
    dtype: torch.dtype  # of `logits_n_V`, also where it is not wanted: the unit depends on it


NO_GRADIENT = RowGradient(None, None, torch.float32)
