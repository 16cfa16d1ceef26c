"""AdamW and its schedule."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: Peak learning rate.
        betas: Decay rates of the two moments.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are scaled down to this norm.
        schedule: Shape of the learning rate after the warm-up.
        warmup_fraction: Share of the steps in which the learning rate rises from 0.
        accumulation_steps: Parts in which a process scores its rollouts of a step, one after the other, which takes less memory;
            loss and gradient are those of the whole step in any case.
    """

    learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.1
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", "> 0", self.learning_rate)
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "in [0, 1)", self.betas)
        require(self.weight_decay >= 0, "optimizer.weight_decay", ">= 0", self.weight_decay)
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "> 0", self.max_grad_norm)
        require(0 <= self.warmup_fraction < 1, "optimizer.warmup_fraction", "in [0, 1)", self.warmup_fraction)
        require(self.accumulation_steps >= 1, "optimizer.accumulation_steps", ">= 1", self.accumulation_steps)
