"""Are times, rates and floors computed as they are said to be?  pytest tests/bench/test_measurement.py"""

from functools import partial

import pytest
import torch


def test_a_budget_drops_repetitions_and_never_all(bench):
    budget = bench("timing").Budget(1000.0, 10)
    assert budget.repetitions(call_seconds=1e-3, num_candidates=4) == 50
    assert budget.repetitions(call_seconds=1.0, num_candidates=4) == 8  # 0.4 * 1000 s / 10 groups / 4, in whole rounds
    assert budget.repetitions(call_seconds=60.0, num_candidates=4) == 4
    assert bench("timing").Budget(1e-9, 10).repetitions(call_seconds=1e-3, num_candidates=1) == 4


def test_summary_is_by_percentiles_and_the_least_host_time(bench):
    timing = bench("timing")
    samples = [timing.Sample(device_ms, 11 - device_ms) for device_ms in range(11)]
    assert timing.summary(samples) == pytest.approx(
        {"median_ms": 5, "p10_ms": 1, "p90_ms": 9, "repetitions": 11, "host_ms": 1}
    )


def test_rates_and_ratios(bench):
    derived = bench("cases.comparison").derived
    memory = {"status": "timed", "median_ms": 2.0, "floor_ms": None, "counted_bytes": 6e9, "schedule_bytes": 8e9}
    assert derived(memory, copy_gb_per_s=4000) == pytest.approx(
        {"gb_per_s": 3000, "share_of_copy": 0.75, "schedule_share_of_copy": 1.0}
    )
    compute = {"status": "timed", "median_ms": 15.0, "floor_ms": 12.0, "counted_flop": 9e12}
    assert derived(compute, copy_gb_per_s=4000) == pytest.approx({"ratio_to_products": 1.25, "tflop_per_s": 600})
    assert derived({"status": "refused"}, copy_gb_per_s=4000) == {}


def test_the_floor_is_the_sum_of_the_products(bench, monkeypatch):
    ceilings, timing = bench("ceilings"), bench("timing")
    measured = ceilings.Ceilings(timing.Stopwatch(torch.device("cpu")), is_smoke=True)
    milliseconds = {
        ("logits", 3): 1.0,
        ("logits", 5): 10.0,
        ("hidden_gradient", 3): 100.0,
        ("weight_gradient", 3): 1000.0,
    }
    monkeypatch.setattr(measured, "gemm_ms", lambda product, rows, vocab_size, size: milliseconds[product, size])
    work = partial(ceilings.LinearWork.of, 4, 10, 3)
    two_sides = work(teacher_size=5, trained=("student_hidden", "student_weight"))
    assert (measured.floor_ms(two_sides), two_sides.flop()) == (1111.0, 2 * 4 * 10 * (3 + 5 + 3 + 3))
    assert measured.floor_ms(work(teacher_size=5, trained=("student_hidden",))) == 111.0
    assert measured.floor_ms(work(trained=("hidden", "weight"))) == 1101.0
    forward = work(trained=())
    assert (measured.floor_ms(forward), forward.flop()) == (1.0, 2 * 4 * 10 * 3)


def test_a_prefix_is_compared_with_all_rows_of_the_same_op(bench):
    row = {
        "status": "timed",
        "is_ours": True,
        "op": "a",
        "implementation": "short",
        "horizon": 1,
        "N": 3,
        "median_ms": 1.0,
    }
    rows = [
        row,
        row | {"implementation": "full", "horizon": 20, "N": 60, "median_ms": 25.0},
        row | {"implementation": "peer", "horizon": 20, "N": 60, "median_ms": 40.0, "is_ours": False},
        row | {"implementation": "other op", "horizon": 20, "N": 60, "op": "b"},
        row | {"implementation": "refused", "horizon": 20, "status": "refused"},
    ]
    assert bench("reports.ops_report").horizon_lines(rows) == [
        "- a: short takes 0.0400 of the time of full, on 0.0500 of its rows.",
        "- a: short takes 0.0250 of the time of peer, on 0.0500 of its rows.",
        "",
    ]
    assert bench("reports.ops_report").horizon_lines([{"status": "timed"}]) == []


def test_a_sweep_restores_the_constant_and_knows_its_name(bench):
    sweeps = bench("cases.sweeps")
    before = sweeps.gradients.SLICE_IDS
    with sweeps.constant_as("SLICE_IDS", 128, (sweeps.gradients,)):
        assert [ids.stop - ids.start for ids in sweeps.gradients.vocab_slices(300)] == [128, 128, 44]
    assert sweeps.gradients.SLICE_IDS == before
    with pytest.raises(AttributeError, match="SLICE_WIDTH"):
        with sweeps.constant_as("SLICE_WIDTH", 128, (sweeps.gradients,)):
            pass
