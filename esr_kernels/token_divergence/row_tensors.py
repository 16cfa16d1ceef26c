"""The tensors of the row kernels, as values: rows of logits going in, one number per row coming out."""

from typing import NamedTuple

import torch
from torch import Tensor


class LogitRows(NamedTuple):
    """(N, >= V) logits as stored, and what the head still does to them.

    With `tile_max` they are float16 relative to the maxima (N, V / 128 rounded up) of their 128-column tiles, and complete.
    Else the tempered logits are softcap * tanh((logits + bias) * slope / softcap), or (logits + bias) * slope.
    """

    logits: Tensor
    slope: float  # logit_scale / loss_temperature
    softcap: float | None = None  # soft cap of the head / loss_temperature
    bias: Tensor | None = None
    tile_max: Tensor | None = None

    def strides(self) -> tuple[int, int, int]:
        return (*self.logits.stride(), 0 if self.tile_max is None else self.tile_max.stride(0))

    def rows(self, rows: slice) -> "LogitRows":
        tile_max = None if self.tile_max is None else self.tile_max[rows]
        return self._replace(logits=self.logits[rows], tile_max=tile_max)


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
