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
        loss_temperature: Temperature T of both distributions in the loss. The loss is not multiplied by T^2, as some definitions
            have it to keep the size of the gradient: a T above 1 makes both smaller.
        prefix_tokens: Train only the first this many response tokens; unset trains the whole rollout.
        normalizer: sequence_mean averages over a rollout's positions, then over rollouts (the paper's code); token_mean
            averages over all positions of the batch; sum adds over positions and averages over rollouts (the paper's equation);
            fixed adds over all and divides by loss.denominator. A token whose weight is 0 is no position.
        denominator: Divisor of the fixed normaliser, the same in every step.
        gated_divergence: A second divergence, added where the teacher is unsure; unset is none.
        gate_coefficient: Its factor.
        gate_entropy: Entropy of the teacher, in nats, above which it is added.
        merge_stop_ids: Score all end-of-sequence ids of both models as one event.
        vocab_size: Cut both vocabularies to this many ids before the softmax, for padded heads of unequal width.
    """

    divergence: DivergenceName = "reverse_kl"
    divergence_parameter: float | None = None
    loss_temperature: float = 1.0
    prefix_tokens: int | None = None
    normalizer: Literal["sequence_mean", "token_mean", "sum", "fixed"] = "sequence_mean"
    denominator: float | None = None
    gated_divergence: Literal["reverse_kl", "forward_kl", "total_variation"] | None = None
    gate_coefficient: float | None = None
    gate_entropy: float | None = None
    merge_stop_ids: bool = True
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        require(self.loss_temperature > 0, "loss.loss_temperature", "> 0", self.loss_temperature)
        tokens, vocab_size = self.prefix_tokens, self.vocab_size
        require(tokens is None or tokens >= 1, "loss.prefix_tokens", ">= 1 or unset", tokens)
        require(vocab_size is None or vocab_size >= 1, "loss.vocab_size", ">= 1 or unset", vocab_size)
        is_fixed = self.normalizer == "fixed"
        must_be = f"{'> 0' if is_fixed else 'unset'} for loss.normalizer {self.normalizer}"
        is_right = (self.denominator is not None) == is_fixed and (not is_fixed or self.denominator > 0)
        require(is_right, "loss.denominator", must_be, self.denominator)
        for name in ("gate_coefficient", "gate_entropy"):
            value, is_wanted = getattr(self, name), self.gated_divergence is not None
            must_be = "> 0 with loss.gated_divergence" if is_wanted else "unset without loss.gated_divergence"
            require((value is not None) == is_wanted and (value is None or value > 0), f"loss.{name}", must_be, value)
