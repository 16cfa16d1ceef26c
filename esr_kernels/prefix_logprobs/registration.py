"""`prefix_logprobs` as two torch.library ops on slots: opaque to torch.compile, one launcher for CUDA and for the interpreter."""

import torch
from torch import Tensor

from esr_kernels.gather_logprobs.forward_kernel import LogprobOutputs, SourceRows, launch_logprob_rows
from esr_kernels.logit_rows import LogitRows
from esr_kernels.prefix_logprobs.backward_kernel import launch_logprob_gradient

FORWARD = "esr_kernels::prefix_logprobs_forward"
BACKWARD = "esr_kernels::prefix_logprobs_backward"

# `rows` index the first two axes of the logits, flattened. Results: log-probs, entropies, top-1 flags, and the sums for backward.
torch.library.define(
    FORWARD, "(Tensor logits, Tensor rows, Tensor token_ids, float temperature) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    BACKWARD,
    "(Tensor upstream, Tensor logits, Tensor rows, Tensor token_ids, Tensor sums, float temperature) -> Tensor",
)


def _allocate(token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_slots = token_ids.shape[0]
    logprob_N, entropy_N, sums_3_N = (
        token_ids.new_empty(shape, dtype=torch.float32) for shape in (num_slots, num_slots, (3, num_slots))
    )
    return logprob_N, entropy_N, token_ids.new_empty(num_slots, dtype=torch.bool), sums_3_N


@torch.library.impl(FORWARD, ("CPU", "CUDA"))
def _forward(logits, rows, token_ids, temperature) -> tuple[Tensor, ...]:
    logprob_N, entropy_N, is_top1_N, sums_3_N = _allocate(token_ids)
    launch_logprob_rows(
        LogitRows(logits, 1 / temperature),
        token_ids.contiguous()[:, None],
        logits.shape[2],
        LogprobOutputs(logprob_N[:, None], entropy_N, is_top1_N),
        source=SourceRows(rows.contiguous(), sums_3_N),
    )
    return logprob_N, entropy_N, is_top1_N, sums_3_N


@torch.library.register_fake(FORWARD)
def _fake_forward(logits, rows, token_ids, temperature) -> tuple[Tensor, ...]:
    return _allocate(token_ids)


@torch.library.impl(BACKWARD, ("CPU", "CUDA"))
def _backward(upstream, logits, rows, token_ids, sums, temperature) -> Tensor:
    source = SourceRows(rows.contiguous(), sums)
    return launch_logprob_gradient(upstream, logits, source, token_ids.contiguous(), 1 / temperature)


@torch.library.register_fake(BACKWARD)
def _fake_backward(upstream, logits, rows, token_ids, sums, temperature) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
