"""`gather_logprobs` as two torch.library ops; their common arguments are those of the other linear ops."""

import torch
from torch import Tensor

from esr_kernels.gather_logprobs.rows import GatherRows, KeptLogits, gather_backward, gather_forward
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_projection.gradients import Needs
from esr_kernels.output_projection.plan import LinearPlan, Schedule, padded_vocab_size
from esr_kernels.output_projection.registration import (
    COMMON_INPUTS,
    NUM_COMMON,
    CommonInputs,
    empty_for_none,
    fake_gradients,
)
from esr_kernels.tile_config import TILE_COLUMNS

FORWARD = "esr_kernels::gather_logprobs_forward"
BACKWARD = "esr_kernels::gather_logprobs_backward"

INPUTS = f"{COMMON_INPUTS}, Tensor token_ids, float temperature"
# Results of forward: the log-probs, then the fields of KeptLogits. Of backward: the gradients of hidden states, weight and
# bias, empty where not needed.
torch.library.define(FORWARD, f"({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    "(Tensor upstream, bool[] needs, Tensor kept_logits, Tensor kept_tile_max, Tensor picked, "
    f"{INPUTS}) -> (Tensor, Tensor, Tensor)",
)


def inputs_and_plan(arguments: tuple) -> tuple[GatherRows, LinearPlan]:
    common, (token_ids, temperature) = CommonInputs(*arguments[:NUM_COMMON]), arguments[NUM_COMMON:]
    return GatherRows(common.hidden_N_D, common.head(), token_ids.contiguous(), temperature), common.plan()


@torch.library.impl(FORWARD, ("CPU", "CUDA"))
def _forward(*arguments) -> tuple[Tensor, ...]:
    # An enclosing autocast region would cast the operands, and so store the logits in 16 bits.
    with torch.autocast(arguments[0].device.type, enabled=False):
        logprobs_N_K, kept = gather_forward(*inputs_and_plan(arguments))
    return logprobs_N_K, *kept


@torch.library.register_fake(FORWARD)
def _fake_forward(*arguments) -> tuple[Tensor, ...]:
    inputs, plan = inputs_and_plan(arguments)
    logprobs_N_K = torch.empty_like(inputs.token_ids_N_K, dtype=torch.float32)
    num_rows, width = inputs.hidden_N_D.shape[0], padded_vocab_size(inputs.head.vocab_size)
    if plan.schedule is not Schedule.KEEP:
        return logprobs_N_K, *KeptLogits.nothing(logprobs_N_K)
    is_float32 = plan.storage is LogitStorage.FLOAT32
    logits_N_V = logprobs_N_K.new_empty((num_rows, width), dtype=torch.float32 if is_float32 else torch.float16)
    tile_max_N_W = logprobs_N_K.new_empty(0 if is_float32 else (num_rows, width // TILE_COLUMNS))
    return logprobs_N_K, logits_N_V, tile_max_N_W, torch.empty_like(logprobs_N_K)


@torch.library.impl(BACKWARD, ("CPU", "CUDA"))
def _backward(upstream, needs, kept_logits, kept_tile_max, picked, *arguments) -> tuple[Tensor, ...]:
    kept = KeptLogits(kept_logits, kept_tile_max, picked)
    with torch.autocast(upstream.device.type, enabled=False):
        gradients = gather_backward(upstream, kept, *inputs_and_plan(arguments), Needs(*needs))
    return empty_for_none(upstream, gradients)


@torch.library.register_fake(BACKWARD)
def _fake_backward(upstream, needs, kept_logits, kept_tile_max, picked, *arguments) -> tuple[Tensor, ...]:
    return fake_gradients(upstream, arguments[:3], needs)
