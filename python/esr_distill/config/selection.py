"""Which of the drawn tokens train, and with what weight."""

from dataclasses import dataclass, field
from typing import Literal

from esr_distill.config.require import require, require_finite

RuleKind = Literal[
    "prefix",
    "window",
    "suffix",
    "scatter",
    "top",
    "threshold",
    "token_ids",
    "token_classes",
    "divergence_share",
    "finished",
    "rows",
    "all",
    "any",
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
    "token_classes": ({"table", "classes"}, set()),
    "divergence_share": ({"share"}, set()),
    "finished": (set(), set()),
    "rows": ({"score", "share"}, set()),
    "all": ({"rules"}, set()),
    "any": ({"rules"}, set()),
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
            threshold those whose score is at_least and at_most so much; token_ids the ids named; token_classes the ids that
            `table` puts into one of `classes`; divergence_share the shortest prefix of all rollouts that holds this share of the
            batch's divergence by position; finished all tokens of rollouts that ended with an end-of-sequence id; rows all tokens
            of the `share` of rollouts whose mean score is highest; all and any what all or any of their own `rules` keep.
        tokens: How many. A rollout that has fewer keeps what it has.
        start: First token, or middle, last or random for a window: (n - tokens) / 2 rounded down, n - tokens, drawn uniformly
            from 0 to n - tokens.
        score: Of a token: divergence; student_entropy and teacher_entropy in nats; surprise -log q(token) and teacher_logprob
            log q(token) of the teacher's q; log_ratio |log q(token) - log p(token)|; disagreement 1 where the likeliest ids
            differ; tip e + d - e d of student entropy and divergence, each scaled to 0 to 1 over the tokens of the batch that are
            compared (arXiv 2604.14084).
        share: Above 0, at most 1; numbers of tokens and rollouts are rounded up.
        scope: Whether top compares tokens within each rollout or all of the batch.
        at_least: Least score kept.
        at_most: Largest score kept.
        token_ids: Ids kept.
        complement: Keep what the rule does not keep.
        table: JSON file with the class of each id, {"785": "planning", ...}; an id that it leaves out is in no class. `python -m
            esr_distill.token_selection.paper_classes` writes the paper's classes for a tokenizer.
        classes: Names of classes of the table.
        rules: Rules that all and any join, e.g. (A and B) or C as {kind: any, rules: [{kind: all, rules: [A, B]}, C]}.
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
    table: str | None = None
    classes: list[str] | None = None
    rules: list["SelectionRule"] | None = None

    def __post_init__(self) -> None:
        option = "selection.rules"
        names = ("tokens", "start", "score", "share", "at_least", "at_most", "token_ids", "table", "classes", "rules")
        _check_fields(option, self.kind, {name: getattr(self, name) for name in names}, RULE_FIELDS)
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
            self._check_bounds(option)
        is_id = self.token_ids is None or min(self.token_ids, default=0) >= 0
        require(is_id, f"{option}.token_ids", "ids >= 0", self.token_ids)
        for name in ("token_ids", "classes", "rules"):
            value = getattr(self, name)
            require(value is None or len(value) > 0, f"{option}.{name}", "one or more", value)

    def _check_bounds(self, option: str) -> None:
        least, most = self.at_least, self.at_most
        for name in ("at_least", "at_most"):
            require_finite(f"{option}.{name}", getattr(self, name))
        has_bound = least is not None or most is not None
        require(has_bound, f"{option}.at_least", "set for threshold, or at_most, or both", least)
        is_open = least is None or most is None or least <= most
        require(is_open, f"{option}.at_least", f"at most {option}.at_most = {most}", least)

    @property
    def leaves(self) -> list["SelectionRule"]:
        """The rules in it that have none of their own, in the order in which they are written; itself where it has none."""
        return [self] if self.rules is None else [leaf for rule in self.rules for leaf in rule.leaves]

    @property
    def needs_scores(self) -> bool:
        return any(leaf.kind in SCORED_KINDS for leaf in self.leaves)


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
        rules: Rules in YAML or JSON, e.g. [{kind: window, tokens: 100, start: middle}]. A rule that must hold together with
            others (combine: all, kind: all) compares the scores of those tokens alone that the others can leave, as far as
            positions, ids and lengths say.
        combine: Whether a token must be kept by all rules or by any.
        weights: Factors of the weight of a kept token, e.g. [{kind: decay, rate: 0.015, start: 100, floor: 0.05}].
        rescale_weights: Scale the weights of a batch so that their mean over kept tokens is 1.
        keep_eos: Let the end-of-sequence token of a rollout train; if not, it is no token of the rollout for the rules either.
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
    def joined_rule(self) -> SelectionRule | None:
        """All rules as one, None where there are none."""
        return SelectionRule(self.combine, rules=self.rules) if self.rules else None

    @property
    def leaves(self) -> list[SelectionRule]:
        """The rules without rules of their own, in the order in which they are written."""
        return [leaf for rule in self.rules for leaf in rule.leaves]

    @property
    def compares_rollouts(self) -> str | None:
        """The first option that compares the rollouts of a whole batch, None where each is looked at by itself."""
        for rule in self.leaves:
            if rule.kind in ("divergence_share", "rows"):
                return f"kind {rule.kind} in selection.rules"
            if rule.scope == "batch":
                return "scope batch in selection.rules"
            if rule.score == "tip":
                return "score tip in selection.rules"
        return "selection.rescale_weights" if self.rescale_weights else None
