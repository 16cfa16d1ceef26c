"""Hidden states of a chunk of rows to the stored logits of both sides, in buffers that the chunks share."""

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.linear_divergence.matrix_product import matmul_float32, product_dtype
from esr_kernels.linear_divergence.plan import PROJECTION_COLUMNS, padded_vocab_size
from esr_kernels.linear_divergence.tile_relative_kernel import launch_store_tile_relative
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.tile_config import TILE_COLUMNS
from esr_kernels.token_divergence.row_tensors import LogitRows

# Where the dtypes of hidden states and weight differ, as many weight rows are converted to float32 at once.
CONVERSION_ROWS = 16384


class Side(NamedTuple):
    """Hidden states and head of student or teacher, cut to the shared vocabulary."""

    hidden_N_D: Tensor
    weight_V_D: Tensor
    bias_V: Tensor | None
    slope: float  # logit_scale / loss_temperature
    softcap: float | None  # soft cap / loss_temperature

    @classmethod
    def of(cls, hidden_N_D: Tensor, head: OutputHead, loss_temperature: float, vocab_size: int) -> "Side":
        return cls(
            hidden_N_D,
            head.weight[:vocab_size],
            None if head.bias is None else head.bias[:vocab_size].contiguous(),
            head.logit_scale / loss_temperature,
            None if head.softcap is None else head.softcap / loss_temperature,
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


class Projection:
    """Projects both sides, chunk after chunk."""

    def __init__(self, student: Side, teacher: Side, chunk_rows: int, storage: LogitStorage) -> None:
        self.student, self.teacher, self.storage = student, teacher, storage
        self.vocab_size = student.weight_V_D.shape[0]
        width = padded_vocab_size(self.vocab_size)

        def buffer(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return student.hidden_N_D.new_empty((chunk_rows, columns), dtype=dtype)

        dtype = torch.float32 if storage is LogitStorage.FLOAT32 else torch.float16
        self.student_logits, self.teacher_logits = buffer(width, dtype), buffer(width, dtype)
        if storage is not LogitStorage.FLOAT32:
            self.tile_max = buffer(width // TILE_COLUMNS), buffer(width // TILE_COLUMNS)
            slice_width = min(width, PROJECTION_COLUMNS)
            self.slices = buffer(slice_width), buffer(slice_width)

    def project(self, rows: slice) -> tuple[LogitRows, LogitRows]:
        """Logits of these rows, in memory that the next call reuses."""
        num_rows = rows.stop - rows.start
        student_logits, teacher_logits = self.student_logits[:num_rows], self.teacher_logits[:num_rows]
        if self.storage is LogitStorage.FLOAT32:
            ids = slice(0, self.vocab_size)
            return self.student.project(rows, ids, student_logits), self.teacher.project(rows, ids, teacher_logits)

        # Slices narrow enough for the float32 logits to be stored again while they are in the cache.
        student_max, teacher_max = (maxima[:num_rows] for maxima in self.tile_max)
        for start in range(0, self.vocab_size, PROJECTION_COLUMNS):
            ids = slice(start, min(start + PROJECTION_COLUMNS, self.vocab_size))
            tiles = slice(start // TILE_COLUMNS, -(-ids.stop // TILE_COLUMNS))
            student_slice, teacher_slice = (plain[:num_rows, : ids.stop - start] for plain in self.slices)
            launch_store_tile_relative(
                self.student.project(rows, ids, student_slice),
                self.teacher.project(rows, ids, teacher_slice),
                (student_logits[:, ids], student_max[:, tiles], teacher_logits[:, ids], teacher_max[:, tiles]),
            )
        student = LogitRows(student_logits, self.student.slope, self.student.softcap, None, student_max)
        return student, LogitRows(teacher_logits, self.teacher.slope, self.teacher.softcap, None, teacher_max)

    def gradient_buffer(self, dtype: torch.dtype) -> Tensor:
        """(chunk_rows, >= V) of `dtype` in the memory of the student's logits, which the row kernel has read when it writes."""
        if dtype.itemsize <= self.student_logits.dtype.itemsize:
            return self.student_logits.view(dtype)
        return torch.empty_like(self.student_logits, dtype=dtype)  # float32 gradients of tile-relative logits
