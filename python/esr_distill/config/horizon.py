"""How far rollouts run, step by step."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require

# For each kind the fields that must be set.
FIELDS = {
    "fixed": set(),
    "linear": {"start"},
    "stairs": {"start", "increment", "every"},
    "fraction": {"fraction"},
    "adaptive": {"start", "increment", "agreement"},
}


@dataclass(frozen=True)
class HorizonScheduleConfig:
    """The horizon of step s of S, never above rollout.horizon = H.

    Args:
        kind: fixed is H; linear is start + floor((H - start) s / S) (the paper's progressive run, start 1); stairs is start +
            increment floor(s / every) (POPD, arXiv 2605.31490); fraction is fraction H rounded up (TOPD, same paper); adaptive
            begins at start and moves by increment with the measured agreement of the models, see agreement.
        start: Horizon of the first step.
        increment: Tokens that a move adds or takes.
        every: Steps between two stairs.
        fraction: Above 0, at most 1.
        agreement: Share of tokens in the last quarter of the horizon at which the two models' likeliest ids must agree, as a mean
            over steps with weights 0.9, 0.9^2, ...: where it is reached the horizon grows by increment, where missed by more
            than 0.05 it shrinks, never below start. Steps in which no rollout reaches that quarter change nothing. The rule is
            ours; its idea, long windows while the models agree, is that of Prune-OPD (arXiv 2605.07804).
    """

    kind: Literal["fixed", "linear", "stairs", "fraction", "adaptive"] = "fixed"
    start: int | None = None
    increment: int | None = None
    every: int | None = None
    fraction: float | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "increment", "every", "fraction", "agreement"):
            value, is_wanted = getattr(self, name), name in FIELDS[self.kind]
            must_be = f"{'set' if is_wanted else 'unset'} for horizon.kind {self.kind}"
            require((value is not None) == is_wanted, f"horizon.{name}", must_be, value)
        for name in ("start", "increment", "every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"horizon.{name}", ">= 1", value)
        for name in ("fraction", "agreement"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"horizon.{name}", "above 0 and at most 1", value)
