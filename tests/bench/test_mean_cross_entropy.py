"""B3: are the cross entropies of the peers called right, and is what is a little wrong refused?

python -m pytest tests/bench/test_mean_cross_entropy.py

Stand-ins have the parameters and the semantics that were read in the wheels of QuACK, cut-cross-entropy and Liger.
"""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from esr_kernels import Impl
from esr_kernels.testing.logprob_oracle import evaluate_linear_prefix_logprobs

TRAINED = ("hidden", "weight")
START, HORIZON = 3, 4
PEERS = ("QuACK chunked", "QuACK scaled-exp", "cut-cross-entropy", "Liger fused_linear_cross_entropy")


def mean_of_counted(hidden, weight, target, ignore_index):
    """Without torch's cross_entropy, which is one of those under test."""
    counted = [i for i, token in enumerate(target.tolist()) if token != ignore_index]
    logits = hidden @ weight.T
    losses = [logits[i].logsumexp(-1) - logits[i, target[i]] for i in counted]
    return torch.stack(losses).mean()


def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None):
    assert (chunk_size, reduction, tuned) == (4096, "mean", True) and isinstance(use_scaled_exp, bool)
    assert len(x) % 8 == 0 or use_scaled_exp
    return mean_of_counted(x, weight, target, ignore_index)


def quack_supported(x, weight, chunk_size, reduction):
    return chunk_size % 128 == 0 and reduction == "mean"


def cut_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    assert (softcap, reduction, shift, filter_eps) == (None, "mean", False, "high")
    return mean_of_counted(e, c, targets, ignore_index)


def liger(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, *options):
    assert (bias, ce_weight, lse_square_scale, options) == (None, None, 0.0, ())
    return mean_of_counted(_input, weight, target, ignore_index), None, None, None


MODULES = {
    "quack.linear_cross_entropy": {
        "chunked_linear_cross_entropy": quack,
        "scaled_exp_lce_supported": quack_supported,
    },
    "cut_cross_entropy": {"linear_cross_entropy": cut_cross_entropy},
    "liger_kernel.ops.fused_linear_cross_entropy": {
        "LigerFusedLinearCrossEntropyFunction": SimpleNamespace(apply=liger)
    },
}


@pytest.fixture
def cross_entropies(bench, monkeypatch):
    """All ways to the mean, the peers by stand-ins."""
    for name, contents in MODULES.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    module = bench("baselines.cross_entropy")
    assert tuple(module.CROSS_ENTROPY_PEERS) == PEERS
    return {
        "bfloat16": module.of_bfloat16_logits,
        "float32": module.of_float32_logits,
        **module.CROSS_ENTROPY_PEERS,
    }


@pytest.fixture
def group_and_stopwatch(bench):
    stopwatch = bench("timing").Stopwatch(torch.device("cpu"))
    ceilings = bench("ceilings").Ceilings(stopwatch, is_smoke=True)
    (make_group,) = bench("cases.prefix_cases").b3_groups(bench("cases.settings").smoke_settings(), ceilings)
    return make_group(), stopwatch


def rollouts_of(bench):
    settings = bench("cases.settings").smoke_settings()
    return bench("cases.prefix_rollouts").make_rollouts(settings, 16, start=START, tokens=HORIZON, dtype=torch.float32)


def upstream_of(ignored=()):
    """-1 / their number in all slots but the ignored ones."""
    upstream_B_K = torch.ones(2, HORIZON)
    for slot in ignored:
        upstream_B_K[slot] = 0
    return -upstream_B_K / upstream_B_K.sum()


@pytest.mark.parametrize("ignored", [(), ((0, 1), (1, 3), (1, 0))])
@pytest.mark.parametrize("name", ["bfloat16", "float32", *PEERS])
def test_a_mean_is_that_of_our_log_probs(bench, cross_entropies, name, ignored):
    rollouts, upstream_B_K = rollouts_of(bench), upstream_of(ignored)
    expected = evaluate_linear_prefix_logprobs(rollouts, upstream_B_K, impl=Impl.REFERENCE, trained=TRAINED)
    expected["loss"] = (expected["logprobs"] * upstream_B_K).sum()
    run = bench("baselines.cross_entropy").run_mean_on_rollouts
    results = run(cross_entropies[name], rollouts, upstream_B_K, start=START, trained=TRAINED)
    assert set(results) == {"loss", "grad_hidden", "grad_weight"}
    for key, tensor in results.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)
    frozen = run(cross_entropies[name], rollouts, upstream_B_K, start=START, trained=("hidden",))
    assert set(frozen) == {"loss", "grad_hidden"}


def test_a_mean_by_hand(bench, cross_entropies):
    """4 rows of logits (log 3, 0), 4 of (0, log 7), which are ignored, 8 of (log 15, 0): token 1 has p 1/4 and 1/16."""
    rows = torch.tensor([[3.0, 1.0], [1.0, 7.0], [15.0, 1.0]]).log()
    hidden = rows.repeat_interleave(torch.tensor([4, 4, 8]), 0)
    tokens = torch.tensor([1] * 4 + [-100] * 4 + [1] * 8)
    expected = (4 * math.log(4) + 8 * math.log(16)) / 12
    for name, function in cross_entropies.items():
        assert float(function(hidden, torch.eye(2), tokens)) == pytest.approx(expected, rel=1e-6), name


def test_what_quack_does_not_take_is_said(bench, cross_entropies, monkeypatch):
    module, hidden, tokens = bench("baselines.cross_entropy"), torch.ones(5, 3), torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="QuACK: the number of rows must be a multiple of 8, got 5"):
        module.quack_chunked(hidden, torch.ones(7, 3), tokens)
    monkeypatch.setattr(sys.modules["quack.linear_cross_entropy"], "scaled_exp_lce_supported", lambda *_: False)
    with pytest.raises(bench("baselines.peers").NotInstalled, match="QuACK: its scaled-exp form needs Hopper"):
        module.quack_scaled_exp(hidden, torch.ones(7, 3), tokens)


def measure(bench, group, stopwatch):
    rows = bench("cases.comparison").measured_rows(group, stopwatch, bench("timing").Budget(0.1, 1, fewest=2, most=2))
    return {row["implementation"]: row for row in rows}


def by_reference(inputs, upstream_B_K):
    results = evaluate_linear_prefix_logprobs(inputs, upstream_B_K, impl=Impl.REFERENCE, trained=TRAINED)
    return results | {"loss": (results["logprobs"] * upstream_B_K).sum()}


def test_the_case_compares_a_scalar_with_an_upstream_gradient_that_is_the_same_everywhere(bench, group_and_stopwatch):
    group, stopwatch = group_and_stopwatch
    # 2 rollouts of 2 tokens, all of which the gate compares; 3 products of 2 N V D
    assert torch.equal(group.upstream, torch.full((2, 2), -0.25)) and torch.equal(group.gate_upstream, group.upstream)
    assert (group.counted_flop, group.setting["N"], group.setting["D"]) == (2 * 4 * 200 * 3 * 16, 4, 16)
    assert group.setting["upstream"] == "the same for all slots" and group.floor_ms > 0
    names = ["ours, float32", "ours, tile_relative_fp16", "compile, bfloat16 logits", "compile, float32 logits"]
    assert [candidate.name for candidate in group.candidates] == [*names, *PEERS]
    assert [candidate.facts.get("scalar_loss", False) for candidate in group.candidates] == [False] * 2 + [True] * 6
    kept = [candidate for candidate in group.candidates if not candidate.name.startswith("ours")]
    ours = bench("cases.comparison").Candidate("ours", by_reference)
    rows = measure(bench, dataclasses.replace(group, candidates=[ours, *kept]), stopwatch)
    for name in ("ours", *names[2:]):
        assert rows[name]["status"] == "timed" and rows[name]["errors"].keys() >= {"loss", "grad_hidden", "grad_weight"}
    assert rows["compile, float32 logits"]["errors"]["loss"] < 1e-6


@pytest.mark.parametrize("most_rows", [256, 3, 1])  # all slots, and some
def test_one_percent_in_any_result_of_ours_is_refused(bench, monkeypatch, most_rows):
    comparison = bench("cases.comparison")
    monkeypatch.setattr(comparison, "GATE_ROWS", most_rows)
    stopwatch = bench("timing").Stopwatch(torch.device("cpu"))
    ceilings = bench("ceilings").Ceilings(stopwatch, is_smoke=True)
    (make_group,) = bench("cases.prefix_cases").b3_groups(bench("cases.settings").smoke_settings(), ceilings)
    group = make_group()
    assert float(group.gate_upstream.sum()) == pytest.approx(-1) and (group.gate_upstream != 0).sum() == min(
        most_rows, 4
    )

    def perturbed(name):
        def run(inputs, upstream_B_K):
            results = by_reference(inputs, upstream_B_K)
            return results if name is None else results | {name: 1.01 * results[name]}

        return comparison.Candidate(name or "right", run)

    names = ("loss", "logprobs", "entropy", "grad_hidden", "grad_weight")
    candidates = [perturbed(name) for name in (None, *names)]
    rows = measure(bench, dataclasses.replace(group, candidates=candidates), stopwatch)
    assert rows.pop("right")["status"] == "timed"
    for name, row in rows.items():
        assert row["status"] == "refused" and row["message"].startswith(f"{name}: ") and "median_ms" not in row


def test_another_that_computes_something_else_is_refused(bench, group_and_stopwatch, cross_entropies):
    """A loss of the sum in place of the mean, and the gradient of other rows."""
    group, stopwatch = group_and_stopwatch
    module, comparison = bench("baselines.cross_entropy"), bench("cases.comparison")

    def candidate(name, function):
        def run(inputs, upstream_B_K):
            return module.run_mean_on_rollouts(function, inputs, upstream_B_K, start=3, trained=TRAINED)

        return comparison.Candidate(name, run, is_ours=False, norm_limit=comparison.SOMETHING_ELSE)

    right = cross_entropies["float32"]
    candidates = [
        candidate("right", right),
        candidate("sum", lambda hidden, weight, tokens: len(tokens) * right(hidden, weight, tokens)),
        candidate("turned", lambda hidden, weight, tokens: right(hidden.roll(1, 0), weight, tokens)),
    ]
    rows = measure(bench, dataclasses.replace(group, candidates=candidates), stopwatch)
    assert [rows[name]["status"] for name in ("right", "sum", "turned")] == ["timed", "refused", "refused"]


def test_peers_that_are_not_installed_say_so(bench, group_and_stopwatch, monkeypatch):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    group, stopwatch = group_and_stopwatch
    kept = [candidate for candidate in group.candidates if candidate.name in PEERS]
    rows = measure(bench, dataclasses.replace(group, candidates=kept), stopwatch)
    projects = ("QuACK", "QuACK", "cut-cross-entropy", "Liger")
    for name, project in zip(PEERS, projects, strict=True):
        assert rows[name]["status"] == "not installed" and rows[name]["message"].startswith(f"{project}: ")
