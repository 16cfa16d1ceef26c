"""Which of the drawn tokens train, and with what weight."""

from dataclasses import dataclass, field
from typing import Literal

from esr_distill.config.require import require

RuleKind = Literal[
    "prefix", "window", "suffix", "scatter", "top", "threshold", "token_ids", "divergence_share", "finished", "rows"
]
ScoreName = Literal[
    "divergence",
    "student_entropy",
    "teacher_entropy",
    "surprise",
    "teacher_logprob",
    "log_ratio",
    "disagreement",
    "tip",
]
WeightKind = Literal["decay", "sigmoid", "prefix_ratio"]

# For each kind the fields that must be set, and those that may be.
RULE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "prefix": ({"tokens"}, set()),
    "window": ({"tokens", "start"}, set()),
    "suffix": ({"start"}, set()),
    "scatter": ({"tokens"}, set()),
    "top": ({"score"}, {"tokens", "share"}),
    "threshold": ({"score"}, {"at_least", "at_most"}),
    "token_ids": ({"token_ids"}, set()),
    "divergence_share": ({"share"}, set()),
    "finished": (set(), set()),
    "rows": ({"score", "share"}, set()),
}
WEIGHT_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "decay": ({"rate"}, {"start", "floor"}),
    "sigmoid": ({"rate", "start"}, set()),
    "prefix_ratio": ({"rate"}, set()),
}
# Rules that need the models' scores of the tokens; the others know positions, ids and lengths alone.
SCORED_KINDS = ("top", "threshold", "divergence_share", "rows")


def _check_fields(
    option: str, kind: str, given: dict[str, object], known: dict[str, tuple[set[str], set[str]]]
) -> None:
    must, may = known[kind]
    given_names = {name for name, value in given.items() if value is not None}
    for name in sorted(must - given_names):
        require(False, f"{option}.{name}", f"set for {kind}", None)
    for name in sorted(given_names - must - may):
        require(False, f"{option}.{name}", f"unset for {kind}", given[name])


@dataclass(frozen=True)
class SelectionRule:
    """One rule: the tokens that it keeps. t counts the response tokens of a rollout from 0; n is how many it has.

    Args:
        kind: prefix keeps t < tokens; window a run of `tokens` from `start` on; suffix t >= start; scatter `tokens` tokens drawn
            without replacement; top those of the highest score, `tokens` or a `share` of them in each rollout or in the batch;
            threshold those whose score is at_least and at_most so much; token_ids the ids named; divergence_share the shortest
            prefix of all rollouts that holds this share of the batch's divergence by position; finished all tokens of rollouts
            that ended with an end-of-sequence id; rows all tokens of the `share` of rollouts whose mean score is highest.
        tokens: How many. A rollout that has fewer keeps what it has.
        start: First token, or middle, last or random for a window: (n - tokens) / 2 rounded down, n - tokens, drawn uniformly
            from 0 to n - tokens.
        score: Of a token: divergence; student_entropy and teacher_entropy in nats; surprise -log q(token) and teacher_logprob
            log q(token) of the teacher's q; log_ratio |log q(token) - log p(token)|; disagreement 1 where the likeliest ids
            differ; tip e + d - e d of student entropy and divergence, each scaled to 0 to 1 over the batch (arXiv 2604.14084).
        share: Above 0, at most 1; numbers of tokens and rollouts are rounded up.
        scope: Whether top compares tokens within each rollout or all of the batch.
        at_least: Least score kept.
        at_most: Largest score kept.
        token_ids: Ids kept.
        complement: Keep what the rule does not keep.
    """

    kind: RuleKind = "prefix"
    tokens: int | None = None
    start: int | Literal["middle", "last", "random"] | None = None
    score: ScoreName | None = None
    share: float | None = None
    scope: Literal["rollout", "batch"] = "rollout"
    at_least: float | None = None
    at_most: float | None = None
    token_ids: list[int] | None = None
    complement: bool = False

    def __post_init__(self) -> None:
        option = "selection.rules"
        given = {
            name: getattr(self, name)
            for name in ("tokens", "start", "score", "share", "at_least", "at_most", "token_ids")
        }
        _check_fields(option, self.kind, given, RULE_FIELDS)
        require(self.tokens is None or self.tokens >= 1, f"{option}.tokens", ">= 1", self.tokens)
        require(self.share is None or 0 < self.share <= 1, f"{option}.share", "above 0 and at most 1", self.share)
        is_number = isinstance(self.start, int)
        require(not is_number or self.start >= 0, f"{option}.start", ">= 0", self.start)
        require(
            self.kind == "window" or self.start is None or is_number,
            f"{option}.start",
            "a number for suffix",
            self.start,
        )
        if self.kind == "top":
            require(
                (self.tokens is None) != (self.share is None), f"{option}.tokens", "set for top, or share", self.tokens
            )
        require(self.scope == "rollout" or self.kind == "top", f"{option}.scope", "rollout but for top", self.scope)
        if self.kind == "threshold":
            has_bound = self.at_least is not None or self.at_most is not None
            require(has_bound, f"{option}.at_least", "set for threshold, or at_most, or both", self.at_least)
        require(
            self.token_ids is None or len(self.token_ids) > 0, f"{option}.token_ids", "one id or more", self.token_ids
        )

    @property
    def needs_scores(self) -> bool:
        return self.kind in SCORED_KINDS


@dataclass(frozen=True)
class WeightRule:
    """One factor of the weight of a kept token.

    Args:
        kind: decay is exp(-rate max(0, t - start)), at least floor; sigmoid is 1 / (1 + exp(-rate (t - start))), rising where
            rate > 0; prefix_ratio is 1 + rate (1 - A_t / A) with A_t the sum of |log q - log p| of the rollout's tokens
            before t and A of all its tokens (arXiv 2606.22600, gamma = rate), for candidates of the selection alone.
        rate: Positive but for sigmoid, which falls where it is negative.
        start: Token from which a decay falls (0 if unset), or at which a sigmoid is one half.
        floor: Least weight of a decay; unset is 0.
    """

    kind: WeightKind = "decay"
    rate: float | None = None
    start: int | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        option = "selection.weights"
        given = {"rate": self.rate, "start": self.start, "floor": self.floor}
        _check_fields(option, self.kind, given, WEIGHT_FIELDS)
        is_sigmoid = self.kind == "sigmoid"
        require(self.rate > 0 or (is_sigmoid and self.rate < 0), f"{option}.rate", "> 0 (sigmoid: not 0)", self.rate)
        require(self.start is None or self.start >= 0, f"{option}.start", ">= 0", self.start)
        require(self.floor is None or 0 <= self.floor < 1, f"{option}.floor", "in [0, 1)", self.floor)


@dataclass(frozen=True)
class SelectionConfig:
    """Which of the drawn tokens train; without rules all of them, as far as loss.prefix_tokens goes.

    Args:
        rules: Rules in YAML or JSON, e.g. [{kind: window, tokens: 100, start: middle}]. Scores are of the tokens that the rules
            without scores leave (with combine: all).
        combine: Whether a token must be kept by all rules or by any.
        weights: Factors of the weight of a kept token, e.g. [{kind: decay, rate: 0.015, start: 100, floor: 0.05}].
        rescale_weights: Scale the weights of a batch so that their mean over kept tokens is 1.
        keep_eos: Let the end-of-sequence token of a rollout train.
    """

    rules: list[SelectionRule] = field(default_factory=list)
    combine: Literal["all", "any"] = "all"
    weights: list[WeightRule] = field(default_factory=list)
    rescale_weights: bool = False
    keep_eos: bool = True

    def __post_init__(self) -> None:
        require(
            not self.rescale_weights or bool(self.weights),
            "selection.rescale_weights",
            "false unless selection.weights are given",
            True,
        )

    @property
    def compares_rollouts(self) -> str | None:
        """The first option that compares the rollouts of a whole batch, None where each is looked at by itself."""
        for rule in self.rules:
            if rule.kind in ("divergence_share", "rows"):
                return f"kind {rule.kind} in selection.rules"
            if rule.scope == "batch":
                return "scope batch in selection.rules"
            if rule.score == "tip":
                return "score tip in selection.rules"
        return "selection.rescale_weights" if self.rescale_weights else None
