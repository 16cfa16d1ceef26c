"""The rules of a selection on one batch of rollouts: before the models score it, and after."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esr_distill.config import SelectionConfig
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.rollout.rollout_batch import RolloutBatch, response_mask
from esr_distill.token_selection.joined_rules import bounds, kept_by
from esr_distill.token_selection.position_rules import mask_of_rule
from esr_distill.token_selection.weights import factor_of
from esr_kernels import DivergenceOutput


@dataclass(frozen=True)
class TokenSelection:
    """Two calls around the scoring of a batch:

        selection = TokenSelection.of(rollouts, config.selection, request_ids_B, seed)
        positions = select_prefix_positions(rollouts, prefix_tokens, selection.candidates_B_K)
        weights_N = selection.weights_N(positions, divergence)

    Attributes:
        masks: what each of `config.leaves` keeps, (B, K); None for the rules that need scores.
        candidates_B_K: the tokens that must be scored: no other can be kept.
    """

    config: SelectionConfig
    masks: list[Tensor | None]
    candidates_B_K: Tensor

    @classmethod
    def of(cls, rollouts: RolloutBatch, config: SelectionConfig, request_ids_B: Tensor, seed: int) -> "TokenSelection":
        lengths_B = rollouts.response_lengths_B
        if not config.keep_eos:
            lengths_B = lengths_B - rollouts.stopped_by_eos_B.long()
        candidates_B_K = response_mask(lengths_B, rollouts.response_ids_B_K.shape[1])
        masks = [
            None if rule.needs_scores else mask_of_rule(rule, rollouts, lengths_B, request_ids_B, seed)
            for rule in config.leaves
        ]
        if config.joined_rule is not None:
            candidates_B_K = candidates_B_K & bounds(config.joined_rule, masks, candidates_B_K)[1]
        return cls(config, masks, candidates_B_K)

    def weights_N(self, positions: PrefixPositions, divergence: DivergenceOutput) -> Tensor:
        """Weight of each candidate, float32 and detached; 0 where it is not kept."""
        return weights_of(self.config, self.kept_before_N(positions), positions, divergence)

    def kept_before_N(self, positions: PrefixPositions) -> list[Tensor | None]:
        """Which candidates each of `config.leaves` keeps; None for the rules that need scores."""
        return [None if mask is None else mask[positions.row_N, positions.slot_N] for mask in self.masks]


def weights_of(
    config: SelectionConfig,
    kept_before_N: list[Tensor | None],
    positions: PrefixPositions,
    divergence: DivergenceOutput,
) -> Tensor:
    """`TokenSelection.weights_N` of candidates of any batch, given what rules without scores keep of them."""
    kept_N = torch.ones_like(positions.row_N, dtype=torch.bool)
    rule = config.joined_rule
    if rule is not None and rule.needs_scores:
        kept_N = kept_by(rule, kept_before_N, positions, divergence, kept_N)
        # A divergence that is NaN always trains: left out, it would hide what must stop the run.
        kept_N = kept_N | divergence.divergence_N.isnan()
    weights_N = kept_N.float()
    for rule in config.weights:
        weights_N = weights_N * factor_of(rule, positions, divergence)
    if config.rescale_weights:
        weights_N = weights_N * (kept_N.sum() / weights_N.sum().clamp_min(torch.finfo(torch.float32).tiny))
    return weights_N
