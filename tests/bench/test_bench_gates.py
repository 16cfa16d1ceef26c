"""Do the gates of the prefix and top-k cases refuse what is a little wrong?  pytest tests/bench/test_bench_gates.py"""

import dataclasses
from functools import partial

import pytest
import torch

from esr_kernels import ForwardKL, Impl, prefix_logprobs
from esr_kernels.testing.logprob_oracle import evaluate_linear_prefix_logprobs, evaluate_topk_divergence

TRAINED = ("hidden", "weight")
OF_PREFIX = ("logprobs", "entropy", "mask", "is_top1")
OF_TOPK = ("divergence", "student_entropy", "teacher_entropy", "top1_agreement")
OF_HEAD_TRAINED = ("grad_hidden", "grad_weight")


@pytest.fixture
def stopwatch(bench):
    return bench("timing").Stopwatch(torch.device("cpu"))


@pytest.fixture
def group_of(bench, stopwatch):
    """A group of a smoke run: (module, name of its makers, index)."""

    def make(module, makers, index):
        ceilings = bench("ceilings").Ceilings(stopwatch, is_smoke=True)
        return getattr(bench(module), makers)(bench("cases.settings").smoke_settings(), ceilings)[index]()

    return make


def by_reference(inputs, upstream, *, op):
    """The results of a fused candidate, computed by the op's reference."""
    if op == "linear_prefix_logprobs":
        return evaluate_linear_prefix_logprobs(inputs, upstream, impl=Impl.REFERENCE, trained=TRAINED)
    if op == "topk_divergence":
        return evaluate_topk_divergence(inputs, ForwardKL(), upstream, impl=Impl.REFERENCE, trained=TRAINED)
    rollouts = inputs.rollouts
    arguments = inputs.logits_B_T_V, rollouts.token_ids_B_T, rollouts.starts_B, rollouts.horizon
    output = prefix_logprobs(*arguments, lengths_B=rollouts.lengths_B, impl=Impl.REFERENCE)
    return {name.removesuffix("_B_K"): tensor for name, tensor in output._asdict().items()}


def with_error_in(name, inputs, upstream, *, op):
    """One percent in one of the results; a flag, which 1 % does not change, is flipped."""
    results = by_reference(inputs, upstream, op=op)
    if name == "top1_agreement":
        results[name] = 1 - results[name]
    elif name is not None:
        results[name] = ~results[name] if results[name].dtype == torch.bool else 1.01 * results[name]
    return results


@pytest.mark.parametrize("most_rows", [256, 3, 1])  # all of them, and some
@pytest.mark.parametrize(
    "group, names",
    [
        (("cases.prefix_cases", "b2_groups", 0), OF_PREFIX + OF_HEAD_TRAINED),
        (("cases.prefix_cases", "b4_groups", 0), OF_PREFIX + OF_HEAD_TRAINED),
        (("cases.prefix_cases", "b4_groups", 1), OF_PREFIX),
        (("cases.topk_cases", "l6_groups", 1), OF_TOPK + OF_HEAD_TRAINED),
    ],
)
def test_one_percent_in_any_result_is_refused(bench, stopwatch, group_of, monkeypatch, group, names, most_rows):
    comparison, timing = bench("cases.comparison"), bench("timing")
    monkeypatch.setattr(comparison, "GATE_ROWS", most_rows)
    group = group_of(*group)
    candidates = [
        comparison.Candidate(name or "right", partial(with_error_in, name, op=group.setting["op"]))
        for name in (None, *names)
    ]
    group = dataclasses.replace(group, candidates=candidates)
    rows = {row["implementation"]: row for row in comparison.measured_rows(group, stopwatch, timing.Budget(0.1, 1))}
    assert rows.pop("right")["status"] == "timed"
    assert set(rows) == set(names)
    for name, row in rows.items():
        assert row["status"] == "refused" and row["message"].startswith(f"{name}: "), row
        assert "median_ms" not in row


@pytest.mark.parametrize("name", ["logprobs", "grad_hidden"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_right_numbers_at_another_token_or_rollout_are_refused(bench, stopwatch, group_of, name, axis):
    group, comparison = group_of("cases.prefix_cases", "b2_groups", 0), bench("cases.comparison")

    def moved(inputs, upstream):
        results = by_reference(inputs, upstream, op=group.setting["op"])
        return results | {name: results[name].roll(1, axis)}

    row, is_good = comparison.prepared_row(group, comparison.Candidate("moved", moved), stopwatch)
    assert row["status"] == "refused" and row["message"].startswith(f"{name}: ") and not is_good
