"""Factors of the weight of a token."""

import torch
from torch import Tensor

from esr_distill.config import WeightRule
from esr_distill.prefix_positions import PrefixPositions
from esr_kernels import DivergenceOutput


def factor_of(rule: WeightRule, positions: PrefixPositions, divergence: DivergenceOutput) -> Tensor:
    """(N,) in float32, detached; config.WeightRule has the formulas."""
    slot_N = positions.slot_N.float()
    if rule.kind == "decay":
        return torch.exp(-rule.rate * (slot_N - (rule.start or 0)).clamp_min(0)).clamp_min(rule.floor or 0.0)
    if rule.kind == "sigmoid":
        return torch.sigmoid(rule.rate * (slot_N - rule.start))
    ratio_N = (divergence.teacher_logprob_N - divergence.student_logprob_N).abs().double()
    return (1 + rule.rate * (1 - share_before(ratio_N, positions.row_N))).float()


def share_before(value_N: Tensor, row_N: Tensor) -> Tensor:
    """Sum of the values before each position within its rollout, over the rollout's total; 0 where the total is 0.

    Positions are ordered by rollout and then by slot.
    """
    if len(value_N) == 0:
        return value_N
    before_N = value_N.cumsum(0) - value_N
    total_B = torch.zeros(int(row_N.max()) + 1, dtype=value_N.dtype, device=value_N.device).index_add(0, row_N, value_N)
    count_B = torch.bincount(row_N)
    first_B = (count_B.cumsum(0) - count_B).clamp_max(len(value_N) - 1)
    within_N = before_N - before_N[first_B[row_N]]
    return within_N / total_B[row_N].clamp_min(1e-8)
