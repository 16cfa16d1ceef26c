"""Rules that need lengths, positions and token ids alone: masks (B, K) over response slots."""

import numpy as np
import torch
from torch import Tensor

from esr_distill.config import SelectionRule
from esr_distill.rollout.rollout_batch import RolloutBatch, response_mask
from esr_distill.token_selection.token_classes import ids_of_rule


def mask_of_rule(
    rule: SelectionRule, rollouts: RolloutBatch, lengths_B: Tensor, request_ids_B: Tensor, seed: int
) -> Tensor:
    """The tokens that the rule keeps, True only within the first `lengths_B` tokens of each response, which it is about."""
    ids_B_K = rollouts.response_ids_B_K
    in_response_B_K = response_mask(lengths_B, ids_B_K.shape[1])
    slot_K = torch.arange(ids_B_K.shape[1], device=ids_B_K.device)
    if rule.kind == "prefix":
        kept_B_K = slot_K < rule.tokens
    elif rule.kind == "suffix":
        kept_B_K = slot_K >= rule.start
    elif rule.kind == "window":
        start_B_1 = window_start(rule, lengths_B, request_ids_B, seed)[:, None]
        kept_B_K = (slot_K >= start_B_1) & (slot_K < start_B_1 + rule.tokens)
    elif rule.kind == "scatter":
        kept_B_K = scattered(rule.tokens, lengths_B, ids_B_K.shape[1], request_ids_B, seed)
    elif rule.kind in ("token_ids", "token_classes"):
        kept_B_K = torch.isin(ids_B_K, torch.tensor(ids_of_rule(rule), device=ids_B_K.device))
    else:  # finished
        kept_B_K = rollouts.stopped_by_eos_B[:, None].expand_as(ids_B_K)
    return in_response_B_K & (~kept_B_K if rule.complement else kept_B_K)


def window_start(rule: SelectionRule, lengths_B: Tensor, request_ids_B: Tensor, seed: int) -> Tensor:
    """First slot of each rollout's window; 0 where the rollout is not longer than the window."""
    last_B = (lengths_B - rule.tokens).clamp_min(0)
    if rule.start == "middle":
        return last_B // 2
    if rule.start == "last":
        return last_B
    if rule.start == "random":
        starts = [
            int(stream.integers(last + 1))
            for stream, last in zip(streams(request_ids_B, seed), last_B.tolist(), strict=True)
        ]
        return torch.tensor(starts, device=lengths_B.device)
    return torch.full_like(lengths_B, rule.start)


def scattered(count: int, lengths_B: Tensor, width: int, request_ids_B: Tensor, seed: int) -> Tensor:
    """`count` slots of each response, or all of a shorter one, drawn without replacement."""
    kept_B_K = torch.zeros(len(lengths_B), width, dtype=torch.bool)
    for row, (stream, length) in enumerate(zip(streams(request_ids_B, seed), lengths_B.tolist(), strict=True)):
        kept_B_K[row, stream.permutation(length)[:count]] = True
    return kept_B_K.to(lengths_B.device)


def streams(request_ids_B: Tensor, seed: int):
    """A random stream for each rollout, of the run's seed and the rollout's number alone: not of the batch or the device.

    The sampler's own stream is another: it has the same key, but numpy's Philox has 64-bit words and another counter.
    """
    for request_id in request_ids_B.tolist():
        yield np.random.Generator(np.random.Philox(key=[seed, request_id]))
