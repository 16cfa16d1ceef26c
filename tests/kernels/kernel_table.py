"""Every kernel of the library as it is launched: what tests/kernels/test_compiled_kernels.py compiles.

A row is a name and a call of the kernel's launcher with tensors that have no memory. One row for each divergence, and one
for each choice that changes the code: dtype, stop ids, what the head does.
"""

import torch
from compiled_kernels import launched

from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS
from esr_kernels.linear_divergence.tile_relative_kernel import launch_store_tile_relative
from esr_kernels.token_divergence.backward_kernel import launch_divergence_gradient
from esr_kernels.token_divergence.forward_kernel import launch_divergence_rows
from esr_kernels.token_divergence.row_tensors import LogitRows, RowOutputs, RowState

ROWS, VOCAB = 4096, 151936


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_rows(divergence: str, dtype: torch.dtype, *, vocab: int = VOCAB, num_stop_ids: int = 0, **head):
    logits = LogitRows(empty(ROWS, vocab, dtype=dtype), 0.7, **head)
    token_ids = empty(ROWS, dtype=torch.int64)
    stop_ids = empty(num_stop_ids, dtype=torch.int32) if num_stop_ids else None
    outputs, state = RowOutputs.allocate(token_ids), RowState.allocate(token_ids)
    launch_divergence_rows(logits, logits, (divergence, 0.3), token_ids, stop_ids, vocab, outputs, state=state)


def gradient_rows(divergence: str, dtype: torch.dtype, *, vocab: int = VOCAB, num_stop_ids: int = 0):
    logits = LogitRows(empty(ROWS, vocab, dtype=dtype), 0.7)
    upstream = empty(ROWS, dtype=torch.float32)
    stop_ids = empty(num_stop_ids, dtype=torch.int32) if num_stop_ids else None
    state = RowState.allocate(upstream)
    launch_divergence_gradient(upstream, logits, logits, (divergence, 0.3), state, stop_ids, vocab)


def fused_gradient_rows(divergence: str, dtype: torch.dtype, *, gradient_dtype: torch.dtype = torch.float16, **head):
    """d(logits) with the value: what `linear_divergence` does."""
    logits = LogitRows(empty(ROWS, VOCAB, dtype=dtype), 0.7, **head)
    unit = empty(ROWS, dtype=torch.float32)
    gradient = empty(ROWS, VOCAB, dtype=gradient_dtype)
    launch_divergence_rows(
        logits, logits, (divergence, 0.3), None, None, VOCAB, RowOutputs.allocate(unit),
        gradient_N_V=gradient, gradient_unit_N=unit, gradient_dtype=gradient_dtype,
    )  # fmt: skip


def tile_relative_logits(**head):
    logits = LogitRows(empty(ROWS, 16384, dtype=torch.float32), 0.7, **head)
    relative, tile_max = empty(ROWS, VOCAB, dtype=torch.float16), empty(ROWS, VOCAB // 128, dtype=torch.float32)
    outputs = relative[:, :16384], tile_max[:, :128]
    launch_store_tile_relative(logits, logits, (*outputs, *outputs))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BIAS = empty(VOCAB, dtype=BF16)
TILE_MAX = empty(ROWS, VOCAB // 128, dtype=FP32)

VARIANTS = []
for divergence in DIVERGENCE_KERNELS:
    VARIANTS += launched(f"rows, {divergence}", forward_rows, divergence, BF16)
    VARIANTS += launched(f"gradient, {divergence}", gradient_rows, divergence, BF16)
    VARIANTS += launched(f"rows and gradient, {divergence}", fused_gradient_rows, divergence, FP32)
for divergence in ("ReverseKL", "GeneralizedJSD"):
    VARIANTS += launched(f"rows, {divergence}, fp32", forward_rows, divergence, FP32)
    VARIANTS += launched(f"rows, {divergence}, 3 stop ids", forward_rows, divergence, BF16, num_stop_ids=3)
    VARIANTS += launched(f"gradient, {divergence}, 3 stop ids", gradient_rows, divergence, BF16, num_stop_ids=3)
    VARIANTS += launched(
        f"rows and gradient, {divergence}, bias and soft cap",
        fused_gradient_rows,
        divergence,
        FP32,
        softcap=30.0,
        bias=BIAS,
    )
    VARIANTS += launched(
        f"rows and gradient, {divergence}, tile-relative",
        fused_gradient_rows,
        divergence,
        FP16,
        tile_max=TILE_MAX,
    )
VARIANTS += launched("rows, ReverseKL, odd vocabulary", forward_rows, "ReverseKL", BF16, vocab=50257)
VARIANTS += launched(
    "rows and gradient in fp32, ReverseKL", fused_gradient_rows, "ReverseKL", FP32, gradient_dtype=FP32
)
VARIANTS += launched("tile-relative logits", tile_relative_logits)
VARIANTS += launched("tile-relative logits, bias and soft cap", tile_relative_logits, softcap=30.0, bias=BIAS[:16384])
