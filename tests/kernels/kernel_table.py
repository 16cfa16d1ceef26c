"""Every kernel of the library as it is launched: what tests/kernels/test_compiled_kernels.py compiles.

A row is a name and a call of the kernel's launcher with tensors that have no memory. One row for each divergence, and one
for each choice that changes the code: dtype, stop ids, what the head does.
"""

import torch
from compiled_kernels import launched

from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS
from esr_kernels.gather_logprobs.forward_kernel import LogprobOutputs, SourceRows, launch_logprob_rows
from esr_kernels.logit_rows import LogitRows
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits, launch_pick_logits
from esr_kernels.output_projection.tile_relative_kernel import launch_store_tile_relative
from esr_kernels.prefix_logprobs.backward_kernel import launch_logprob_gradient
from esr_kernels.row_gradient import NO_GRADIENT, RowGradient
from esr_kernels.token_divergence.backward_kernel import launch_divergence_gradient
from esr_kernels.token_divergence.forward_kernel import launch_divergence_rows
from esr_kernels.token_divergence.row_tensors import RowOutputs, RowState
from esr_kernels.topk_divergence.forward_kernel import Events, TopkOutputs, launch_topk_divergence

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
        gradient=RowGradient(gradient, unit, gradient_dtype),
    )  # fmt: skip


def tile_relative_logits(num_sides: int = 2, **head):
    logits = LogitRows(empty(ROWS, 16384, dtype=torch.float32), 0.7, **head)
    relative, tile_max = empty(ROWS, VOCAB, dtype=torch.float16), empty(ROWS, VOCAB // 128, dtype=torch.float32)
    out = LogitRows(relative[:, :16384], 0.7, tile_max=tile_max[:, :128])
    launch_store_tile_relative(*[(logits, out)] * num_sides)


def prefix_slots(dtype: torch.dtype, *, vocab: int = VOCAB):
    """`prefix_logprobs`: slots of (B, T, V) logits, forward and backward."""
    num_slots, logits = ROWS // 2, empty(32, 256, vocab, dtype=dtype)
    ids, rows = (empty(num_slots, dtype=torch.int64) for _ in range(2))
    source = SourceRows(rows, empty(3, num_slots, dtype=torch.float32))
    launch_logprob_rows(LogitRows(logits, 0.7), ids[:, None], vocab, token_outputs(num_slots), source=source)
    launch_logprob_gradient(empty(num_slots, dtype=torch.float32), logits, source, ids, 0.7)


def token_rows(dtype: torch.dtype, *, gradient_dtype: torch.dtype = torch.float16, **head):
    """`linear_prefix_logprobs`: one picked id a row, d(logits) with the value."""
    logits, ids = LogitRows(empty(ROWS, VOCAB, dtype=dtype), 0.7, **head), empty(ROWS, 1, dtype=torch.int64)
    unit, gradient = empty(ROWS, dtype=torch.float32), empty(ROWS, VOCAB, dtype=gradient_dtype)
    launch_logprob_rows(
        logits, ids, VOCAB, token_outputs(ROWS), picked_N_K=empty(ROWS, 1, dtype=torch.float32),
        gradient=RowGradient(gradient, unit, gradient_dtype),
    )  # fmt: skip


def gathered_rows(num_ids: int, dtype: torch.dtype, *, has_gradient: bool, **head):
    """`gather_logprobs`: K picked ids a row; d(logits) for K upstream gradients."""
    logits, ids = LogitRows(empty(ROWS, VOCAB, dtype=dtype), 0.7, **head), empty(ROWS, num_ids, dtype=torch.int64)
    logprobs, picked, upstream = (empty(ROWS, num_ids, dtype=torch.float32) for _ in range(3))
    options = {}
    if has_gradient:
        unit, gradient = empty(ROWS, dtype=torch.float32), empty(ROWS, VOCAB, dtype=torch.float16)
        options = {"upstream_N_K": upstream, "gradient": RowGradient(gradient, unit, torch.float16)}
    launch_logprob_rows(logits, ids, VOCAB, LogprobOutputs(logprobs), picked_N_K=picked, **options)


def topk_rows(
    num_ids: int, dtype: torch.dtype, divergence: str, events: Events = Events.TAIL, *, has_gradient: bool = True, **head
):  # fmt: skip
    """`topk_divergence`, with or without d(logits)."""
    logits, ids = LogitRows(empty(ROWS, VOCAB, dtype=dtype), 0.7, **head), empty(ROWS, num_ids, dtype=torch.int64)
    picked = PickedLogits(ids, empty(ROWS, num_ids, dtype=torch.float32), True)
    teacher_logprobs = empty(ROWS, num_ids, dtype=torch.float32)
    unit, gradient = empty(ROWS, dtype=torch.float32), empty(ROWS, VOCAB, dtype=torch.float16)
    outputs = TopkOutputs(*(empty(ROWS, dtype=torch.float32) for _ in TopkOutputs._fields))
    row_gradient = RowGradient(gradient, unit, torch.float16) if has_gradient else NO_GRADIENT
    settings = (divergence, 0.3), events, VOCAB
    launch_topk_divergence(logits, picked, teacher_logprobs, *settings, outputs, row_gradient)


def picked_logits(num_ids: int, *, is_excluded: bool, **head):
    logits, ids = (
        LogitRows(empty(ROWS, VOCAB, dtype=torch.float32), 0.7, **head),
        empty(ROWS, num_ids, dtype=torch.int64),
    )
    picked = PickedLogits(ids, empty(ROWS, num_ids, dtype=torch.float32), is_excluded)
    launch_pick_logits(logits, slice(0, VOCAB), picked)


def token_outputs(num_rows: int) -> LogprobOutputs:
    logprob, entropy = (empty(num_rows, dtype=torch.float32) for _ in range(2))
    return LogprobOutputs(logprob[:, None], entropy, empty(num_rows, dtype=torch.bool))


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
VARIANTS += launched("tile-relative logits of one side", tile_relative_logits, 1)

HEAD = {"softcap": 30.0, "bias": BIAS}
TILES = {"tile_max": TILE_MAX}
VARIANTS += launched("prefix slots, bf16", prefix_slots, BF16)
VARIANTS += launched("prefix slots, fp32", prefix_slots, FP32)
VARIANTS += launched("prefix slots, odd vocabulary", prefix_slots, BF16, vocab=50257)
VARIANTS += launched("token rows", token_rows, FP32)
VARIANTS += launched("token rows, bias and soft cap", token_rows, FP32, **HEAD)
VARIANTS += launched("token rows, tile-relative", token_rows, FP16, **TILES)
VARIANTS += launched("token rows, gradient in fp32", token_rows, FP32, gradient_dtype=FP32)
for num_ids in (20, 256, 1024):
    VARIANTS += launched(f"{num_ids} ids", gathered_rows, num_ids, FP32, has_gradient=False)
    VARIANTS += launched(f"{num_ids} ids and gradient", gathered_rows, num_ids, FP32, has_gradient=True)
    for divergence in DIVERGENCE_KERNELS:
        VARIANTS += launched(f"top {num_ids}, {divergence}", topk_rows, num_ids, FP32, divergence)
VARIANTS += launched("256 ids and gradient, tile-relative", gathered_rows, 256, FP16, has_gradient=True, **TILES)
VARIANTS += launched("top 256, forward alone", topk_rows, 256, FP32, "ReverseKL", has_gradient=False)
VARIANTS += launched("top 256, tile-relative", topk_rows, 256, FP16, "GeneralizedJSD", **TILES)
VARIANTS += launched("top 256, bias and soft cap", topk_rows, 256, FP32, "GeneralizedJSD", **HEAD)
for events in (Events.RENORMALIZED, Events.TRUNCATED):
    VARIANTS += launched(f"top 256, {events.value}", topk_rows, 256, FP32, "GeneralizedJSD", events)
VARIANTS += launched("picked logits", picked_logits, 1, is_excluded=False)
VARIANTS += launched("picked logits, taken out", picked_logits, 256, is_excluded=True, **HEAD)
