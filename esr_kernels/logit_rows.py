"""Rows of logits as the row kernels read them."""

from typing import NamedTuple

from torch import Tensor


class LogitRows(NamedTuple):
    """(N, >= V) logits as stored, and what the head still does to them.

    With `tile_max` they are float16 relative to the maxima (N, V / 128 rounded up) of their 128-column tiles, and complete.
    Else the tempered logits are softcap * tanh((logits + bias) * slope / softcap), or (logits + bias) * slope.
    """

    logits: Tensor | None  # None: there are none
    slope: float  # logit_scale / loss_temperature
    softcap: float | None = None  # soft cap of the head / loss_temperature
    bias: Tensor | None = None
    tile_max: Tensor | None = None

    def strides(self) -> tuple[int, int, int]:
        row, column = (0, 0) if self.logits is None else self.logits.stride()
        return row, column, 0 if self.tile_max is None else self.tile_max.stride(0)

    def rows(self, rows: slice) -> "LogitRows":
        tile_max = None if self.tile_max is None else self.tile_max[rows]
        return self._replace(logits=self.logits[rows], tile_max=tile_max)
