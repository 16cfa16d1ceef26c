"""Whether an adaptive horizon gets to see the last tokens of rollouts, by which it moves."""

import torch
from torch import Tensor

from esr_distill.config import SelectionConfig, TrainConfig
from esr_distill.input_error import InputError
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.token_selection.joined_rules import bounds
from esr_distill.token_selection.position_rules import mask_of_rule


def check_late_tokens(config: TrainConfig) -> None:
    """Raises InputError where no rollout has a token in the last quarter of its horizon that the rules could keep."""
    if config.horizon.kind != "adaptive":
        return
    for horizon in (config.horizon.start, config.rollout.horizon):
        if not tokens_within_reach(config.selection, horizon)[3 * horizon // 4 :].any():
            raise InputError(
                "selection.rules must leave tokens of the last quarter of a rollout for horizon.kind adaptive, which moves by "
                f"them, got none at a horizon of {horizon}"
            )


def tokens_within_reach(config: SelectionConfig, horizon: int) -> Tensor:
    """(K,) bool: the tokens of an unfinished rollout of `horizon` tokens that the rules could keep, whatever is drawn."""
    everywhere_1_K = torch.ones(1, horizon, dtype=torch.bool)
    if config.joined_rule is None:
        return everywhere_1_K[0]
    ids_1_K, lengths_1, zeros_1_K = everywhere_1_K.long(), torch.tensor([horizon]), torch.zeros(1, horizon)
    rollouts = RolloutBatch(ids_1_K, ids_1_K, 0, lengths_1, torch.tensor([False]), zeros_1_K, zeros_1_K)
    masks = [
        mask_of_rule(rule, rollouts, lengths_1, torch.tensor([0]), 0)
        if rule.kind in ("prefix", "suffix", "window") and rule.start != "random"
        else None
        for rule in config.leaves
    ]
    return bounds(config.joined_rule, masks, everywhere_1_K)[1][0]
