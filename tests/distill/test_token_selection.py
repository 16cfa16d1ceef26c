"""Which tokens train, and with what weight, on batches written by hand?  pytest tests/distill/test_token_selection.py"""

import math

import pytest
import torch
from tiny_models import EOS, make_rollouts

from esr_distill.config import SelectionConfig, SelectionRule, WeightRule
from esr_distill.distill_loss import normalize_divergence
from esr_distill.input_error import InputError
from esr_distill.prefix_positions import select_prefix_positions
from esr_distill.token_selection import TokenSelection
from esr_kernels import DivergenceOutput

# Three rollouts of 5, 3 and 1 tokens; the second ended by itself.
RESPONSES = [[5, 6, 7, 8, 9], [6, 7, EOS], [5]]
ROLLOUTS = make_rollouts([[1, 8], [1], [1, 9]], RESPONSES)
LENGTHS = [5, 3, 1]
REQUESTS = torch.tensor([40, 41, 42])
# Scores of the nine tokens, rollout by rollout.
DIVERGENCE = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.8, 0.6, 0.7]
STUDENT_ENTROPY = [1.0, 0.0, 2.0, 4.0, 1.0, 3.0, 1.0, 0.0, 2.0]
TEACHER_ENTROPY = [0.5, 1.5, 0.7, 0.9, 0.1, 0.8, 0.81, 0.3, 1.0]
STUDENT_LOGPROB = [-1.0, -2.0, -1.0, -0.5, -1.0, -1.0, -3.0, -1.0, -1.0]
TEACHER_LOGPROB = [-2.0, -1.0, -1.0, -2.5, -1.0, -2.0, -1.0, -4.0, -9.0]
AGREEMENT = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def selected(prefix_tokens: int = 9, seed: int = 0, rollouts=ROLLOUTS, requests=REQUESTS, **config) -> dict:
    """{(rollout, token): weight} of the tokens that are kept, and under "scored" the candidates."""
    selection = TokenSelection.of(rollouts, SelectionConfig(**config), requests, seed)
    positions = select_prefix_positions(rollouts, prefix_tokens, selection.candidates_B_K)
    places = list(zip(positions.row_N.tolist(), positions.slot_N.tolist(), strict=True))
    first = [0, 5, 8]
    picked = [first[row] + slot for row, slot in places]
    scores = (DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_LOGPROB, TEACHER_LOGPROB, AGREEMENT)
    divergence = DivergenceOutput(*(torch.tensor([values[i] for i in picked]) for values in scores))
    weights = selection.weights_N(positions, divergence).tolist()
    return {place: weight for place, weight in zip(places, weights, strict=True) if weight > 0} | {"scored": places}


def kept(**arguments) -> list[tuple[int, int]]:
    found = selected(**arguments)
    found.pop("scored")
    return sorted(found)


def tokens(*slots: list[int]) -> list[tuple[int, int]]:
    return [(row, slot) for row, of_row in enumerate(slots) for slot in of_row]


def rule(kind: str, **fields) -> list[SelectionRule]:
    return [SelectionRule(kind, **fields)]


ALL = tokens([0, 1, 2, 3, 4], [0, 1, 2], [0])
RULES = {
    "none": ([], ALL),
    "prefix": (rule("prefix", tokens=2), tokens([0, 1], [0, 1], [0])),
    "prefix, complement": (rule("prefix", tokens=2, complement=True), tokens([2, 3, 4], [2], [])),
    "suffix": (rule("suffix", start=2), tokens([2, 3, 4], [2], [])),
    "window from a number": (rule("window", tokens=2, start=1), tokens([1, 2], [1, 2], [])),
    "window in the middle": (rule("window", tokens=2, start="middle"), tokens([1, 2], [0, 1], [0])),
    "last window": (rule("window", tokens=2, start="last"), tokens([3, 4], [1, 2], [0])),
    "ids": (rule("token_ids", token_ids=[7, EOS]), tokens([2], [1, 2], [])),
    "finished": (rule("finished"), tokens([], [0, 1, 2], [])),
    "unfinished": (rule("finished", complement=True), tokens([0, 1, 2, 3, 4], [], [0])),
    "top in each rollout": (rule("top", score="divergence", tokens=2), tokens([1, 4], [1, 2], [0])),
    "top share in each rollout": (rule("top", score="divergence", share=0.4), tokens([1, 4], [1, 2], [0])),
    "top of the batch": (rule("top", score="divergence", tokens=3, scope="batch"), tokens([1], [1], [0])),
    "ties go to the earlier": (rule("top", score="student_entropy", tokens=2), tokens([2, 3], [0, 1], [0])),
    "threshold from below": (rule("threshold", score="teacher_entropy", at_least=0.8), tokens([1, 3], [0, 1], [0])),
    "threshold from both sides": (
        rule("threshold", score="teacher_entropy", at_least=0.5, at_most=0.8),
        tokens([0, 2], [0], []),
    ),
    "surprise": (rule("threshold", score="surprise", at_least=2.5), tokens([3], [2], [0])),
    "log ratio": (rule("top", score="log_ratio", tokens=1), tokens([3], [2], [0])),
    "disagreement": (rule("threshold", score="disagreement", at_least=1), tokens([1, 4], [2], [])),
    # mean log q: -1.5, -7/3, -9: the better two of three
    "rows": (rule("rows", score="teacher_logprob", share=0.5), tokens([0, 1, 2, 3, 4], [0, 1, 2], [])),
    # by token: 0.4, 0.85, 0.45, 0.2, 0.5; of 2.4 the first two hold 1.25
    "share of the divergence": (rule("divergence_share", share=0.5), tokens([0, 1], [0, 1], [0])),
    "all of the divergence": (rule("divergence_share", share=1.0), ALL),
    # (e + d - e d) with e = H / 4 and d = (D - 0.1) / 0.8: .25 1 .625 1 .625 .84375 .90625 .625 .875
    "tip": (rule("top", score="tip", share=0.5, scope="batch"), tokens([1, 3], [0, 1], [0])),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_by_hand(name):
    rules, expected = RULES[name]
    assert kept(rules=rules) == sorted(expected)


def test_rules_are_joined_by_all_or_any():
    rules = [SelectionRule("prefix", tokens=3), SelectionRule("token_ids", token_ids=[7, 9])]
    assert kept(rules=rules) == tokens([2], [1], [])
    assert kept(rules=rules, combine="any") == tokens([0, 1, 2, 4], [0, 1, 2], [0])
    scored = [SelectionRule("suffix", start=3), SelectionRule("top", score="divergence", tokens=1)]
    assert kept(rules=scored) == tokens([4], [], [])  # the highest of what the suffix leaves
    assert kept(rules=scored, combine="any") == tokens([1, 3, 4], [1], [0])


def test_only_what_can_be_kept_is_scored():
    rules = [SelectionRule("prefix", tokens=2), SelectionRule("top", score="divergence", tokens=1)]
    assert selected(rules=rules)["scored"] == tokens([0, 1], [0, 1], [0])
    assert selected(rules=rules, combine="any")["scored"] == ALL
    assert selected(rules=rules, prefix_tokens=1)["scored"] == tokens([0], [0], [0])


def test_the_end_of_sequence_token_can_be_left_out():
    assert kept(keep_eos=False) == tokens([0, 1, 2, 3, 4], [0, 1], [0])
    # An id that is no end of this rollout stays.
    rollouts = make_rollouts([[1]], [[5, EOS, 6]])
    assert not rollouts.stopped_by_eos_B.item()
    assert kept(rollouts=rollouts, requests=REQUESTS[:1], keep_eos=False) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (rule("prefix", tokens=2), tokens([0, 1], [0, 1], [0])),
        (rule("window", tokens=2, start="last"), tokens([3, 4], [0, 1], [0])),
        (rule("window", tokens=1, start="middle"), tokens([2], [0], [0])),
        (rule("window", tokens=2, start="random"), None),
        (rule("scatter", tokens=2), None),
        (rule("window", tokens=1, start="last", complement=True), tokens([0, 1, 2, 3], [0], [])),
        (rule("top", score="divergence", share=0.5), tokens([1, 2, 4], [1], [0])),
    ],
)
def test_without_the_end_of_sequence_token_the_other_tokens_are_the_rollout(rules, expected):
    """A finished rollout of two tokens and an end keeps as many tokens as one of two that was cut."""
    found = kept(rules=rules, keep_eos=False)
    assert found == expected if expected is not None else [row for row, _ in found] == [0, 0, 1, 1, 2]
    assert (1, 2) not in found


def test_shares_are_rounded_up_from_what_is_written():
    """0.15 x 100 is above 15 in float32, 0.07 x 100 above 7 and 0.55 x 100 above 55 in float64."""
    one = make_rollouts([[1]], [[5] * 100])
    positions = select_prefix_positions(one, 100)
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    divergence = DivergenceOutput(*[values] * 6)
    for share, count in ((0.15, 15), (0.55, 55), (0.07, 7), (0.151, 16), (1.0, 100), (1e-9, 1)):
        config = SelectionConfig(rules=rule("top", score="divergence", share=share))
        weights_N = TokenSelection.of(one, config, REQUESTS[:1], 0).weights_N(positions, divergence)
        assert weights_N.nonzero().squeeze(1).tolist() == sorted(values.argsort(descending=True)[:count].tolist())
    many = make_rollouts([[1]] * 100, [[5]] * 100)
    positions = select_prefix_positions(many, 1)
    for share, count in ((0.07, 7), (0.55, 55)):
        config = SelectionConfig(rules=rule("rows", score="divergence", share=share))
        weights_N = TokenSelection.of(many, config, torch.arange(100), 0).weights_N(positions, divergence)
        assert weights_N.sum() == count


@pytest.mark.parametrize("kind, fields", [("window", {"start": "random"}), ("scatter", {})])
def test_random_choices_are_uniform_and_of_the_rollout_alone(kind, fields):
    """Two of five tokens; each window of two is equally likely, and so is each pair."""
    rollouts = make_rollouts([[1]] * 600, [[5, 6, 7, 8, 9]] * 600)
    requests = torch.arange(600)
    config = SelectionConfig(rules=rule(kind, tokens=2, **fields))
    mask = TokenSelection.of(rollouts, config, requests, 3).candidates_B_K
    assert (mask.sum(1) == 2).all()
    choices: dict[tuple, int] = {}
    for row in mask.tolist():
        choices[tuple(row)] = choices.get(tuple(row), 0) + 1
    outcomes = 4 if kind == "window" else 10
    assert len(choices) == outcomes
    expected = 600 / outcomes
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in choices.values())
    turned = TokenSelection.of(rollouts, config, requests.flip(0), 3).candidates_B_K
    assert (turned == mask.flip(0)).all()  # not of the place in the batch
    assert not (TokenSelection.of(rollouts, config, requests, 4).candidates_B_K == mask).all()


def test_decay_and_sigmoid_by_hand():
    weights = selected(weights=[WeightRule("decay", rate=math.log(2), start=1, floor=0.3)])
    weights.pop("scored")
    by_slot = [1, 1, 0.5, 0.3, 0.3]
    assert weights == pytest.approx({(row, slot): by_slot[slot] for row, slot in ALL})
    rising = selected(rules=rule("prefix", tokens=3), weights=[WeightRule("sigmoid", rate=math.log(3), start=1)])
    rising.pop("scored")
    assert rising == pytest.approx({(row, slot): [0.25, 0.5, 0.75][slot] for row, slot in ALL if slot < 3})


def test_prefix_ratio_by_hand():
    """|log q - log p| of the first rollout: 1 1 0 2 0; of the second 1 2 3; of the third 8."""
    weights = selected(weights=[WeightRule("prefix_ratio", rate=0.5)])
    weights.pop("scored")
    before = [[0, 1 / 4, 2 / 4, 2 / 4, 1], [0, 1 / 6, 3 / 6], [0]]
    assert weights == pytest.approx({(row, slot): 1 + 0.5 * (1 - before[row][slot]) for row, slot in ALL})


def test_factors_multiply_and_can_be_scaled_to_a_mean_of_one():
    rules = rule("prefix", tokens=2)
    factors = [WeightRule("decay", rate=math.log(2)), WeightRule("decay", rate=math.log(2))]
    weights = selected(rules=rules, weights=factors, rescale_weights=True)
    weights.pop("scored")
    # 1, 1/4 | 1, 1/4 | 1, of mean 0.7
    assert weights == pytest.approx(
        {(row, slot): [1, 0.25][slot] / 0.7 for row, slot in tokens([0, 1], [0, 1], [0])}, rel=1e-6
    )


@pytest.mark.parametrize(
    "rules",
    [
        rule("top", score="divergence", tokens=1),
        rule("threshold", score="divergence", at_least=5.0),
        rule("threshold", score="divergence", at_most=5.0, complement=True),
        rule("divergence_share", share=0.1),
        rule("rows", score="divergence", share=0.1),
    ],
)
def test_a_rule_on_scores_does_not_hide_what_is_not_a_number(rules, monkeypatch):
    monkeypatch.setitem(globals(), "DIVERGENCE", [*DIVERGENCE[:3], math.nan, *DIVERGENCE[4:]])
    assert (0, 3) in kept(rules=rules)


def test_a_weight_that_is_not_a_number_reaches_the_loss():
    positions = select_prefix_positions(ROLLOUTS, 9)
    values = torch.tensor(DIVERGENCE)
    logprobs = torch.tensor([*TEACHER_LOGPROB[:3], math.nan, *TEACHER_LOGPROB[4:]])
    divergence = DivergenceOutput(values, values, values, torch.tensor(STUDENT_LOGPROB), logprobs, values)
    config = SelectionConfig(weights=[WeightRule("prefix_ratio", rate=0.5)])
    weights_N = TokenSelection.of(ROLLOUTS, config, REQUESTS, 0).weights_N(positions, divergence)
    assert normalize_divergence(values, weights_N, positions.row_N, 3, "token_mean").isnan()


def test_nothing_is_left():
    found = selected(rules=[SelectionRule("suffix", start=7), SelectionRule("top", score="tip", share=0.5)])
    assert found == {"scored": []}
    assert selected(rules=[*rule("suffix", start=7), *rule("rows", score="tip", share=0.5)]) == {"scored": []}
    assert selected(rules=[*rule("suffix", start=7), *rule("divergence_share", share=0.5)]) == {"scored": []}
    ratio = [WeightRule("prefix_ratio", rate=0.5)]
    assert selected(rules=rule("suffix", start=7), weights=ratio, rescale_weights=True) == {"scored": []}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectionRule("prefix"), r"selection\.rules\.tokens must be set for prefix, got None"),
        (lambda: SelectionRule("suffix", tokens=1, start=0), r"rules\.tokens must be unset for suffix, got 1"),
        (lambda: SelectionRule("suffix", start="last"), r"rules\.start must be a number for suffix, got 'last'"),
        (lambda: SelectionRule("top", score="tip"), r"rules\.tokens must be set for top, or share, got None"),
        (lambda: SelectionRule("top", score="tip", share=1.5), r"rules\.share must be above 0 and at most 1, got 1\.5"),
        (lambda: SelectionRule("prefix", tokens=1, scope="batch"), r"rules\.scope must be rollout but for top"),
        (lambda: SelectionRule("threshold", score="tip"), r"rules\.at_least must be set for threshold, or at_most"),
        (
            lambda: SelectionRule("threshold", score="tip", at_least=math.nan),
            r"at_least must be a finite number, got nan",
        ),
        (
            lambda: SelectionRule("threshold", score="tip", at_most=math.inf),
            r"at_most must be a finite number, got inf",
        ),
        (
            lambda: SelectionRule("threshold", score="tip", at_least=5.0, at_most=1.0),
            r"selection\.rules\.at_least must be at most selection\.rules\.at_most = 1\.0, got 5\.0",
        ),
        (lambda: SelectionRule("token_ids", token_ids=[-3, 7]), r"rules\.token_ids must be ids >= 0, got \[-3, 7\]"),
        (lambda: SelectionRule("token_ids", token_ids=[]), r"rules\.token_ids must be one or more, got \[\]"),
        (lambda: WeightRule("decay", rate=-1.0), r"weights\.rate must be > 0 \(sigmoid: not 0\), got -1\.0"),
        (lambda: WeightRule("sigmoid", rate=1.0), r"weights\.start must be set for sigmoid, got None"),
        (lambda: SelectionConfig(rescale_weights=True), r"selection\.rescale_weights must be false unless"),
    ],
)
def test_wrong_rules_are_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()
