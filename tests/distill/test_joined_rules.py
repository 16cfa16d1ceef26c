"""Do rules of rules keep what a reader would say, on batches written by hand?  pytest tests/distill/test_joined_rules.py"""

import math

import pytest
import torch
import yaml
from test_token_selection import ALL, DIVERGENCE, LENGTHS, REQUESTS, ROLLOUTS, RULES, kept, selected, tokens

from esr_distill.config import SelectionConfig, SelectionRule
from esr_distill.config_file import parse_train_options
from esr_distill.input_error import InputError
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.token_selection import TokenSelection
from esr_distill.token_selection.selection import weights_of
from esr_kernels import DivergenceOutput


def rule(text: str) -> SelectionRule:
    """A rule as a file would write it."""
    given = yaml.safe_load(text)
    rules = given.pop("rules", None)
    return SelectionRule(**given, rules=rules and [rule(yaml.safe_dump(inner)) for inner in rules])


FIRST_3, SEVEN_OR_NINE = "{kind: prefix, tokens: 3}", "{kind: token_ids, token_ids: [7, 9]}"
BEST = "{kind: top, score: divergence, tokens: 1}"
# Rollouts 5 6 7 8 9 | 6 7 end | 5; divergences .1 .9 .3 .2 .5 | .4 .8 .6 | .7
TREES = {
    "A and B, or C": (
        f"{{kind: any, rules: [{{kind: all, rules: [{FIRST_3}, {SEVEN_OR_NINE}]}}, {{kind: suffix, start: 4}}]}}",
        tokens([2, 4], [1], []),
    ),
    "not (A and B, or C)": (
        f"{{kind: any, complement: true, rules: [{{kind: all, rules: [{FIRST_3}, {SEVEN_OR_NINE}]}}, "
        "{kind: suffix, start: 4}]}",
        tokens([0, 1, 3], [0, 2], [0]),
    ),
    "A, and neither B nor C": (
        f"{{kind: all, rules: [{FIRST_3}, {{kind: any, complement: true, rules: [{SEVEN_OR_NINE}, "
        "{kind: suffix, start: 2}]}]}",
        tokens([0, 1], [0], [0]),
    ),
    "the best of a suffix, or A": (  # among all tokens the best of the first two rollouts is token 1, not in the suffix
        f"{{kind: any, rules: [{{kind: all, rules: [{{kind: suffix, start: 2}}, {BEST}]}}, {{kind: prefix, tokens: 1}}]}}",
        tokens([0, 4], [0, 2], [0]),
    ),
    "not the best of a suffix": (
        f"{{kind: all, complement: true, rules: [{{kind: suffix, start: 2}}, {BEST}]}}",
        tokens([0, 1, 2, 3], [0, 1], [0]),
    ),
    "the best outside of a nested group": (  # ids 5 and 6 | 6 | 5 are left out: .3 .2 .5 | .8 .6 | none
        f"{{kind: all, rules: [{{kind: all, rules: [{{kind: token_ids, token_ids: [5, 6], complement: true}}]}}, {BEST}]}}",
        tokens([4], [1], []),
    ),
    "the best of finished rollouts, and all of others": (
        f"{{kind: any, rules: [{{kind: all, rules: [{{kind: finished}}, {BEST}]}}, {{kind: finished, complement: true}}]}}",
        tokens([0, 1, 2, 3, 4], [1], [0]),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_by_hand(name):
    text, expected = TREES[name]
    assert kept(rules=[rule(text)]) == expected


@pytest.mark.parametrize("name", [name for name, (rules, _) in RULES.items() if rules])
@pytest.mark.parametrize("kind", ["all", "any"])
def test_a_group_of_one_rule_is_that_rule(name, kind):
    rules, expected = RULES[name]
    assert kept(rules=[SelectionRule(kind, rules=rules)]) == sorted(expected)
    assert kept(rules=[SelectionRule("any", rules=[SelectionRule(kind, rules=rules)])], combine="any") == sorted(
        expected
    )


def test_only_what_a_tree_can_keep_is_scored():
    text = f"{{kind: any, rules: [{{kind: all, rules: [{{kind: prefix, tokens: 2}}, {BEST}]}}, {{kind: suffix, start: 4}}]}}"
    assert selected(rules=[rule(text)])["scored"] == tokens([0, 1, 4], [0, 1], [0])
    # Any token may be other than the best.
    text = f"{{kind: all, complement: true, rules: [{{kind: prefix, tokens: 2}}, {BEST}]}}"
    assert selected(rules=[rule(text)])["scored"] == ALL
    text = f"{{kind: any, complement: true, rules: [{{kind: prefix, tokens: 2}}, {BEST}]}}"
    assert selected(rules=[rule(text)])["scored"] == tokens([2, 3, 4], [2], [])


def test_a_tree_does_not_hide_what_is_not_a_number(monkeypatch):
    monkeypatch.setattr("test_token_selection.DIVERGENCE", [*DIVERGENCE[:3], math.nan, *DIVERGENCE[4:]])
    text = "{kind: any, complement: true, rules: [{kind: threshold, score: divergence, at_most: 9}]}"
    assert kept(rules=[rule(text)]) == [(0, 3)]


def test_masks_of_processes_are_lists_of_the_innermost_rules():
    """Of two processes with the rollouts 0 and 1, 2: as `across_processes` joins them."""
    text = (
        f"{{kind: any, rules: [{{kind: all, rules: [{FIRST_3}, {{kind: top, score: divergence, tokens: 2, scope: batch}}]}}, "
        "{kind: token_ids, token_ids: [8]}]}"
    )
    selection = TokenSelection.of(ROLLOUTS, SelectionConfig([rule(text)]), REQUESTS, 0)
    assert [mask is None for mask in selection.masks] == [False, True, False]
    places = torch.tensor([(row, slot) for row, length in enumerate(LENGTHS) for slot in range(length)])
    parts = [places[:5], places[5:]]
    positions = [PrefixPositions(part[:, 0], part[:, 1] + 1, part[:, 1], part[:, 1]) for part in parts]
    kept_before = [selection.kept_before_N(part) for part in positions]
    values = torch.tensor(DIVERGENCE)
    weights_N = weights_of(
        selection.config,
        [None if first is None else torch.cat([first, second]) for first, second in zip(*kept_before, strict=True)],
        PrefixPositions(*(torch.cat([getattr(part, name) for part in positions]) for name in vars(positions[0]))),
        DivergenceOutput(*[values] * 6),
    )
    # .9 and .8 are the best of the first three tokens of each rollout; id 8 is token 3
    assert weights_N.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("inner", "option"),
    [
        ("{kind: rows, score: divergence, share: 0.5}", "kind rows in selection.rules"),
        ("{kind: top, score: divergence, tokens: 2, scope: batch}", "scope batch in selection.rules"),
        ("{kind: top, score: tip, tokens: 2}", "score tip in selection.rules"),
        ("{kind: top, score: divergence, tokens: 2}", None),
    ],
)
def test_a_rule_that_compares_rollouts_is_seen_inside_others(inner, option):
    text = f"{{kind: any, rules: [{{kind: finished}}, {{kind: all, rules: [{{kind: suffix, start: 1}}, {inner}]}}]}}"
    assert SelectionConfig([rule(text)]).compares_rollouts == option


def test_rules_of_rules_come_from_a_flag():
    text = TREES["A and B, or C"][0]
    options = ["--model.student", "s", "--model.teacher", "t", "--data.prompts", "p", "--selection.rules", f"[{text}]"]
    assert parse_train_options(options).selection.rules == [rule(text)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectionRule("any"), r"selection\.rules\.rules must be set for any, got None"),
        (lambda: SelectionRule("all", rules=[]), r"selection\.rules\.rules must be one or more, got \[\]"),
        (
            lambda: SelectionRule("finished", rules=[SelectionRule("finished")]),
            r"rules\.rules must be unset for finished",
        ),
        (
            lambda: SelectionRule("all", rules=[SelectionRule("finished")], tokens=3),
            r"rules\.tokens must be unset for all",
        ),
    ],
)
def test_wrong_groups_are_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()
