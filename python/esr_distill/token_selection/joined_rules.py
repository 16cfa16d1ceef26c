"""Rules that join rules. What the innermost ones keep is a flat list of masks, in the order of `SelectionConfig.leaves`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from esr_distill.config import SelectionRule
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.token_selection.score_rules import mask_of_scored_rule
from esr_kernels import DivergenceOutput


def bounds(rule: SelectionRule, masks: list[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that the rule keeps whatever its unknown masks (None) are, and tokens that it can keep.

    Args:
        masks: of the rule's leaves, all of the shape of `like`.
    """
    if rule.rules is None:
        known = masks[0]
        return (torch.zeros_like(like), torch.ones_like(like)) if known is None else (known, known)
    parts = [bounds(inner, of_inner, like) for inner, of_inner in inner_rules(rule, masks)]
    least, most = (joined(rule, list(side)) for side in zip(*parts, strict=True))
    return (~most, ~least) if rule.complement else (least, most)


def kept_by(
    rule: SelectionRule,
    masks: list[Tensor | None],
    positions: PrefixPositions,
    divergence: DivergenceOutput,
    compared_N: Tensor,
) -> Tensor:
    """What the rule keeps of candidates, with the scores known.

    Args:
        masks: (N,) of the rule's leaves, None for those that need scores.
        compared_N: the candidates whose scores are compared; such a leaf keeps no other.
    """
    if rule.rules is None:
        return kept_by_scores(rule, positions, divergence, compared_N) if masks[0] is None else masks[0]
    inner = list(inner_rules(rule, masks))
    if rule.kind == "all":
        for other, of_other in inner:
            compared_N = compared_N & bounds(other, of_other, compared_N)[1]
    kept_N = joined(rule, [kept_by(other, mine, positions, divergence, compared_N) for other, mine in inner])
    return ~kept_N if rule.complement else kept_N


def kept_by_scores(
    rule: SelectionRule, positions: PrefixPositions, divergence: DivergenceOutput, compared_N: Tensor
) -> Tensor:
    chosen = compared_N.nonzero().squeeze(1)
    of_chosen = PrefixPositions(**{name: place_N[chosen] for name, place_N in vars(positions).items()})
    kept_N = torch.zeros_like(compared_N)
    kept_N[chosen] = mask_of_scored_rule(
        rule, of_chosen, DivergenceOutput(*(value_N[chosen] for value_N in divergence))
    )
    return kept_N


def inner_rules(rule: SelectionRule, masks: list[Tensor | None]) -> Iterator[tuple[SelectionRule, list[Tensor | None]]]:
    """The rules that this one joins, each with the masks of its own leaves."""
    first = 0
    for inner in rule.rules:
        last = first + len(inner.leaves)
        yield inner, masks[first:last]
        first = last


def joined(rule: SelectionRule, masks: list[Tensor]) -> Tensor:
    stacked = torch.stack(masks)
    return stacked.all(0) if rule.kind == "all" else stacked.any(0)
