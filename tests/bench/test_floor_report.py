"""Is the share of the floor the floor over the measured time?  pytest tests/bench/test_floor_report.py"""

import dataclasses

import pytest


def test_shares_by_hand(bench):
    """A step that takes exactly twice its floor in every stage but backward, which takes ten times."""
    floor, models = bench("floor"), bench("rollout_models")
    shape = floor.load_shape("tiny", "--student", "float32")
    rates = bench("gpu_rates").Rates(1e9, 1e10, "a device", "by hand")
    setting = floor.StepSetting(3, 6, 5)
    floors = floor.step_floor(shape, shape, setting, rates)
    seconds = {stage: 2 * each.seconds for stage, each in floors.items()} | {
        "backward": 10 * floors["backward"].seconds
    }
    row = {
        "pair": "tiny<-tiny",
        "dtype": "float32",
        "implementation": "ours",
        "status": "timed",
        "stage_s": seconds,
        "student_shape": dataclasses.asdict(shape),
        "teacher_shape": dataclasses.asdict(shape),
        **dataclasses.asdict(setting),
    }
    machine = {"gpu": "a device", "commit": "abc", "processor": "p", "torch_threads": 1}
    results = {"machine": machine, "rates": {"copy_gb_per_s": 1.0, "flop_per_s": 1e10}, "rows": [row]}
    assert "tiny" in models.SHAPES
    cells = bench("reports.floor_report").floor_shares_table(results).splitlines()[-1].split(" | ")
    by_stage = dict(zip(floor.STAGES, cells[4:10], strict=True))
    assert by_stage["rollout"].startswith("50.0% (") and by_stage["backward"].startswith("10.0% (")
    total = sum(each.seconds for each in floors.values())
    assert float(cells[3]) == pytest.approx(1e3 * total, rel=1e-2)
    assert cells[10].startswith(f"{total / sum(seconds.values()):.1%}")
    assert bench("reports.floor_report").floor_shares_table(results | {"rows": []}) == ""
