"""What the row kernels of a divergence write, as values: one number per row."""

from typing import NamedTuple

import torch
from torch import Tensor


class RowOutputs(NamedTuple):
    """The fields of `DivergenceOutput`, float32, in its order."""

    divergence_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    student_logprob_N: Tensor
    teacher_logprob_N: Tensor
    top1_agreement_N: Tensor

    @classmethod
    def allocate(cls, like: Tensor) -> "RowOutputs":
        return cls(*(like.new_empty(like.shape[0], dtype=torch.float32) for _ in cls._fields))

    def rows(self, rows: slice) -> "RowOutputs":
        return RowOutputs(*(tensor[rows] for tensor in self))


class RowState(NamedTuple):
    """What the gradient of a row needs besides its logits."""

    sums_5_N: Tensor  # student max, student sum (0: no gradient), teacher max, teacher sum, sum of weighted costs
    student_top1_N: Tensor  # int32

    @classmethod
    def allocate(cls, like: Tensor) -> "RowState":
        return cls(
            like.new_empty((5, like.shape[0]), dtype=torch.float32), like.new_empty(like.shape[0], dtype=torch.int32)
        )


def stop_ids_on_device(stop_ids: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Two or more stop ids as an int32 tensor, filled on the device: no copy from the host, so also inside a CUDA graph."""
    if len(stop_ids) < 2:
        return None
    return torch.stack([torch.full((), i, dtype=torch.int32, device=device) for i in sorted(stop_ids)])
