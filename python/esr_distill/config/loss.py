"""What is minimised."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require

DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha_divergence"
]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Args:
        divergence: Divergence between student and teacher at each position.
        divergence_parameter: beta of jsd, lam of the skew KLs, alpha of alpha_divergence; unset for the others.
        loss_temperature: Temperature of both distributions in the loss.
        prefix_tokens: Train only the first this many response tokens; unset trains the whole rollout.
        normalizer: sequence_mean averages over a rollout's positions, then over rollouts (the paper's code); token_mean
            averages over all positions of the batch; sum adds over positions and averages over rollouts (the paper's equation).
        merge_stop_ids: Score all end-of-sequence ids of both models as one event.
        vocab_size: Cut both vocabularies to this many ids before the softmax, for padded heads of unequal width.
    """

    divergence: DivergenceName = "reverse_kl"
    divergence_parameter: float | None = None
    loss_temperature: float = 1.0
    prefix_tokens: int | None = None
    normalizer: Literal["sequence_mean", "token_mean", "sum"] = "sequence_mean"
    merge_stop_ids: bool = True
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        require(self.loss_temperature > 0, "loss.loss_temperature", "> 0", self.loss_temperature)
        tokens, vocab_size = self.prefix_tokens, self.vocab_size
        require(tokens is None or tokens >= 1, "loss.prefix_tokens", ">= 1 or unset", tokens)
        require(vocab_size is None or vocab_size >= 1, "loss.vocab_size", ">= 1 or unset", vocab_size)
