"""Hidden states of a chunk of rows to the stored logits of one side or of both, in buffers that the chunks share."""

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.logit_rows import LogitRows
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.matrix_product import matmul_float32, product_dtype
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits, launch_pick_logits
from esr_kernels.output_projection.plan import PROJECTION_COLUMNS, padded_vocab_size
from esr_kernels.output_projection.tile_relative_kernel import launch_store_tile_relative
from esr_kernels.tile_config import TILE_COLUMNS

# Where the dtypes of hidden states and weight differ, as many weight rows are converted to float32 at once.
CONVERSION_ROWS = 16384


class Side(NamedTuple):
    """Hidden states and head of student or teacher, cut to the shared vocabulary."""

    hidden_N_D: Tensor
    weight_V_D: Tensor
    bias_V: Tensor | None
    slope: float  # logit_scale / temperature
    softcap: float | None  # soft cap / temperature

    @classmethod
    def of(cls, hidden_N_D: Tensor, head: OutputHead, temperature: float, vocab_size: int) -> "Side":
        return cls(
            hidden_N_D,
            head.weight[:vocab_size],
            None if head.bias is None else head.bias[:vocab_size].contiguous(),
            head.logit_scale / temperature,
            None if head.softcap is None else head.softcap / temperature,
        )

    def project(self, rows: slice, ids: slice, out_n_M: Tensor) -> LogitRows:
        """hidden[rows] @ weight[ids].T in float32, and what the head still does to it."""
        dtype = product_dtype(self.hidden_N_D, self.weight_V_D)
        hidden_n_D = self.hidden_N_D[rows].to(dtype)
        step = ids.stop - ids.start if self.weight_V_D.dtype == dtype else CONVERSION_ROWS
        for start in range(ids.start, ids.stop, step):
            stop = min(start + step, ids.stop)
            out = out_n_M[:, start - ids.start : stop - ids.start]
            matmul_float32(hidden_n_D, self.weight_V_D[start:stop].to(dtype).T, out=out)
        return LogitRows(out_n_M, self.slope, self.softcap, None if self.bias_V is None else self.bias_V[ids])


class StoredSide:
    """Where the logits of one side are kept, by storage; `slice` holds float32 logits on their way to 16 bits."""

    def __init__(self, side: Side, chunk_rows: int, storage: LogitStorage) -> None:
        self.side = side
        width = padded_vocab_size(side.weight_V_D.shape[0])

        def buffer(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return side.hidden_N_D.new_empty((chunk_rows, columns), dtype=dtype)

        if storage is LogitStorage.FLOAT32:
            self.logits, self.tile_max, self.slice = buffer(width), None, None
        else:
            self.logits, self.tile_max = buffer(width, torch.float16), buffer(width // TILE_COLUMNS)
            self.slice = buffer(min(width, PROJECTION_COLUMNS))

    def rows(self, num_rows: int) -> LogitRows:
        """The stored logits of the first rows, tile-relative: complete but for their slope and soft cap in a gradient."""
        return LogitRows(self.logits[:num_rows], self.side.slope, self.side.softcap, None, self.tile_max[:num_rows])


class Projection:
    """Projects one side or both, chunk after chunk."""

    def __init__(self, student: Side, teacher: Side | None, chunk_rows: int, storage: LogitStorage) -> None:
        self.storage = storage
        self.vocab_size = student.weight_V_D.shape[0]
        self.student = StoredSide(student, chunk_rows, storage)
        self.teacher = None if teacher is None else StoredSide(teacher, chunk_rows, storage)

    def project(self, rows: slice, picked: PickedLogits | None = None) -> tuple[LogitRows, LogitRows | None]:
        """Logits of these rows, in memory that the next call reuses.

        With `picked`, the student's logits at its ids are put there in float32 before they are stored.
        """
        if self.storage is LogitStorage.FLOAT32:
            return self._project_float32(rows, picked)
        return self._project_tile_relative(rows, picked)

    def _project_float32(self, rows: slice, picked: PickedLogits | None) -> tuple[LogitRows, LogitRows | None]:
        num_rows, ids = rows.stop - rows.start, slice(0, self.vocab_size)
        student = self.student.side.project(rows, ids, self.student.logits[:num_rows])
        if picked is not None:
            launch_pick_logits(student, ids, picked)
        if self.teacher is None:
            return student, None
        return student, self.teacher.side.project(rows, ids, self.teacher.logits[:num_rows])

    def _project_tile_relative(self, rows: slice, picked: PickedLogits | None) -> tuple[LogitRows, LogitRows | None]:
        """By slices narrow enough for the float32 logits to be stored again while they are in the cache."""
        num_rows = rows.stop - rows.start
        sides = [side for side in (self.student, self.teacher) if side is not None]
        stored = [side.rows(num_rows) for side in sides]
        for start in range(0, self.vocab_size, PROJECTION_COLUMNS):
            ids = slice(start, min(start + PROJECTION_COLUMNS, self.vocab_size))
            tiles = slice(start // TILE_COLUMNS, -(-ids.stop // TILE_COLUMNS))
            exact = [side.side.project(rows, ids, side.slice[:num_rows, : ids.stop - start]) for side in sides]
            if picked is not None:
                launch_pick_logits(exact[0], ids, picked)
            out = [s._replace(logits=s.logits[:, ids], tile_max=s.tile_max[:, tiles]) for s in stored]
            launch_store_tile_relative(*zip(exact, out, strict=True))
        return stored[0], stored[1] if len(stored) > 1 else None

    def gradient_buffer(self, dtype: torch.dtype) -> Tensor:
        """(chunk_rows, >= V) of `dtype` in the memory of the student's logits, which the row kernel has read when it writes."""
        logits = self.student.logits
        if dtype.itemsize <= logits.dtype.itemsize:
            return logits.view(dtype)
        return torch.empty_like(logits, dtype=dtype)  # float32 gradients of tile-relative logits
