"""Rules that need what the models say of the tokens: masks (N,) over candidate positions, by their scores."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from esr_distill.config import SelectionRule
from esr_distill.prefix_positions import PrefixPositions
from esr_kernels import DivergenceOutput


def score_of(name: str, divergence: DivergenceOutput) -> Tensor:
    """The score of each position, detached; config.SelectionRule says what each is."""
    if name == "divergence":
        return divergence.divergence_N.detach()
    if name == "student_entropy":
        return divergence.student_entropy_N
    if name == "teacher_entropy":
        return divergence.teacher_entropy_N
    if name == "surprise":
        return -divergence.teacher_logprob_N
    if name == "teacher_logprob":
        return divergence.teacher_logprob_N
    if name == "log_ratio":
        return (divergence.teacher_logprob_N - divergence.student_logprob_N).abs()
    if name == "disagreement":
        return 1 - divergence.top1_agreement_N
    entropy_N, divergence_N = (scaled_to_1(score_of(part, divergence)) for part in ("student_entropy", "divergence"))
    return entropy_N + divergence_N - entropy_N * divergence_N


def scaled_to_1(value_N: Tensor) -> Tensor:
    """Least 0, largest 1; all 0 where they are equal."""
    if len(value_N) == 0:
        return value_N
    least, largest = value_N.min(), value_N.max()
    return (value_N - least) / (largest - least).clamp_min(torch.finfo(value_N.dtype).tiny)


def mask_of_scored_rule(rule: SelectionRule, positions: PrefixPositions, divergence: DivergenceOutput) -> Tensor:
    """What the rule keeps of these positions."""
    row_N = positions.row_N
    if rule.kind == "divergence_share":
        kept_N = prefix_with_share(positions.slot_N, divergence.divergence_N.detach(), rule.share)
    else:
        score_N = score_of(rule.score, divergence)
        if rule.kind == "threshold":
            kept_N = torch.ones_like(score_N, dtype=torch.bool)
            if rule.at_least is not None:
                kept_N &= score_N >= rule.at_least
            if rule.at_most is not None:
                kept_N &= score_N <= rule.at_most
        elif rule.kind == "rows":
            kept_N = in_best_rows(row_N, score_N, rule.share)
        else:
            kept_N = highest(row_N if rule.scope == "rollout" else torch.zeros_like(row_N), score_N, rule)
    return ~kept_N if rule.complement else kept_N


def rounded_up(share: float, count: int) -> int:
    """ceil(share x count), of the share as it is written: 0.15 of 100 is 15, whatever the product of floats is."""
    return math.ceil(Fraction(str(share)) * count)


def highest(group_N: Tensor, score_N: Tensor, rule: SelectionRule) -> Tensor:
    """The tokens of the highest score in each group; of equal ones the earlier. NaN counts as the lowest."""
    score_N = score_N.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    by_score_N = score_N.sort(descending=True, stable=True).indices
    order_N = by_score_N[group_N[by_score_N].sort(stable=True).indices]  # group by group, each from high to low
    count_G = torch.bincount(group_N)
    first_G = count_G.cumsum(0) - count_G
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_G[group_N[order_N]]
    if rule.tokens is not None:
        return rank_N < rule.tokens
    limits = [rounded_up(rule.share, count) for count in count_G.tolist()]
    return rank_N < torch.tensor(limits, dtype=rank_N.dtype, device=rank_N.device)[group_N]


def in_best_rows(row_N: Tensor, score_N: Tensor, share: float) -> Tensor:
    """All tokens of the share of rollouts whose mean score is highest, of those that have a token here."""
    if len(row_N) == 0:
        return torch.zeros_like(row_N, dtype=torch.bool)
    count_B = torch.bincount(row_N)
    sum_B = torch.zeros(len(count_B), dtype=score_N.dtype, device=score_N.device).index_add(0, row_N, score_N)
    mean_B = torch.where(count_B > 0, sum_B / count_B.clamp_min(1), -math.inf)
    limit = rounded_up(share, int((count_B > 0).sum()))
    best = mean_B.sort(descending=True, stable=True).indices[:limit]
    return torch.isin(row_N, best)


def prefix_with_share(slot_N: Tensor, divergence_N: Tensor, share: float) -> Tensor:
    """The slots up to the first at which the cumulative mean divergence by slot reaches the share of its total."""
    if len(slot_N) == 0:
        return torch.zeros_like(slot_N, dtype=torch.bool)
    count_K = torch.bincount(slot_N)
    sum_K = torch.zeros(len(count_K), dtype=divergence_N.dtype, device=slot_N.device).index_add(0, slot_N, divergence_N)
    cumulative_K = (sum_K / count_K.clamp_min(1)).double().cumsum(0)
    last = int((cumulative_K < share * cumulative_K[-1]).sum())
    return slot_N <= last
