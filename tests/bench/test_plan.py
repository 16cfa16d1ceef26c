"""Are predicted times floors over measured shares, and is measured time predicted by the shares of other cases?

python -m pytest tests/bench/test_plan.py
"""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
MEDIAN_ERROR = 0.35


@pytest.fixture(scope="module")
def plan(bench):
    return bench("plan")


@pytest.fixture(scope="module")
def floor(bench):
    return bench("floor")


def toy(floor, **changes):
    sizes = {"layers": 2, "hidden": 8, "intermediate": 10, "heads": 4, "kv_heads": 2, "head_dim": 3, "vocab_size": 11}
    return floor.ModelShape(**(sizes | {"tied": True, "dtype_bytes": 2} | changes))


TOY_PARAMETERS = 2 * (8 * 12 * 2 + 8 * 6 * 2 + 3 * 8 * 10) + 8 * 11


def some_rates(floor):
    return floor.Rates(1e9, 1e12, "it", "test")


def step_row(floor, setting, stage_s, **changes):
    """A row of a result file as bench/bench_esr_speedup.py writes it."""
    shape = dataclasses.asdict(toy(floor))
    row = {"pair": "a<-b", "student": "a", "teacher": "b", "dtype": "bfloat16", "batch_size": setting.batch_size}
    row |= {"prompt": setting.prompt, "horizon": setting.horizon, "implementation": "ours", "status": "timed"}
    row |= {"student_shape": shape, "teacher_shape": shape, "stage_s": stage_s, "step_s": sum(stage_s.values())}
    return row | changes


def results_of(rows, gpu="NVIDIA H200", **changes):
    machine = {"gpu": gpu, "processor": "P", "torch_threads": 2, "commit": "abc"}
    rates = {"copy_gb_per_s": 1.0, "flop_per_s": 1e12}
    return {"machine": machine, "rates": rates, "is_smoke": False, "is_finished": True, "rows": rows} | changes


def test_without_shares_the_floors_stand_alone(plan, floor):
    setting = floor.StepSetting(4, 5, 3)
    predicted = plan.predict(toy(floor), toy(floor), setting, some_rates(floor))
    floors = floor.step_floor(toy(floor), toy(floor), setting, some_rates(floor))
    assert predicted.shares is None and predicted.communication_s == {}
    assert predicted.stage_s == {stage: of_stage.seconds for stage, of_stage in floors.items()}
    assert predicted.step_s == predicted.exposed_step_s == sum(predicted.stage_s.values())
    assert predicted.tokens_per_s == 4 * 3 / predicted.step_s


def test_a_step_is_predicted_by_hand(plan, floor):
    """Shares are interpolated between logarithms of the work of a launch, and those at the ends hold outside."""
    setting, rates = floor.StepSetting(4, 5, 3), some_rates(floor)
    floors = floor.step_floor(toy(floor), toy(floor), setting, rates)
    launches = dict.fromkeys(floor.STAGES, 2) | {"rollout": 2 * 3, "divergence": 1}  # layers, and tokens of a rollout
    work = {stage: floors[stage].seconds / launches[stage] for stage in floor.STAGES}
    points = {stage: [(work[stage] / 10, 0.1), (work[stage] * 1000, 0.9)] for stage in floor.STAGES}
    points["divergence"] = [(10 * work["divergence"], 0.5), (20 * work["divergence"], 0.8)]
    points["backward"] = [(work["backward"] / 20, 0.3), (work["backward"] / 20, 0.6), (work["backward"] / 30, 0.01)]
    predicted = plan.predict(toy(floor), toy(floor), setting, rates, plan.MeasuredShares(points, "test"))
    between = 0.1 * 9**0.25  # a quarter of the way from a tenth to a thousand times
    expected = dict.fromkeys(floor.STAGES, between) | {"divergence": 0.5, "backward": math.sqrt(0.3 * 0.6)}
    assert predicted.shares == pytest.approx(expected)
    assert predicted.outside == {"divergence", "backward"}
    assert predicted.stage_s == pytest.approx({stage: floors[stage].seconds / expected[stage] for stage in floors})


def test_links_by_hand(plan, floor):
    student, teacher = toy(floor), toy(floor, tied=False)
    setting, rates = floor.StepSetting(4, 5, 3), some_rates(floor)
    alone = plan.predict(student, teacher, setting, rates)
    part, teacher_bytes = 3 / 4 / 1e3, 2 * (TOY_PARAMETERS + 88)  # 4 GPUs, 1000 bytes a second

    parallel = plan.predict(student, teacher, setting, rates, None, plan.Layout(4, False, 1e3))
    assert parallel.communication_s == {"backward": pytest.approx(2 * part * 2 * TOY_PARAMETERS)}
    assert parallel.stage_s == alone.stage_s and parallel.tokens == 4 * alone.tokens
    hidden = sum(alone.stage_s.values()) - alone.stage_s["backward"] + parallel.communication_s["backward"]
    assert parallel.step_s == pytest.approx(hidden)
    assert parallel.exposed_step_s == pytest.approx(hidden + alone.stage_s["backward"])

    sharded = plan.predict(student, teacher, setting, rates, None, plan.Layout(4, True, 1e3))
    gather = part * 2 * TOY_PARAMETERS
    assert sharded.communication_s == pytest.approx(
        {"rollout": gather, "student_forward": gather, "teacher_forward": part * teacher_bytes, "backward": 2 * gather}
    )
    assert sharded.stage_s["optimizer"] == alone.stage_s["optimizer"] / 4
    with pytest.raises(ValueError, match="link_bytes_per_s must be > 0 for 2 GPUs, got None"):
        plan.Layout(2)
    with pytest.raises(ValueError, match="gpus must be >= 1, got 0"):
        plan.Layout(0)


def launch_bound_results(plan, floor, horizons, batch_sizes):
    """Steps of a machine with 60 % of the floor's rate and 50 us for every layer's pass: a law that the planner is not told."""
    rows, rates = [], some_rates(floor)
    for horizon in horizons:
        for batch_size in batch_sizes:
            setting = floor.StepSetting(batch_size, 20, horizon)
            floors = floor.step_floor(toy(floor), toy(floor), setting, rates)
            passes = dict.fromkeys(floors, 2) | {"rollout": 2 * horizon, "divergence": 1}
            stage_s = {stage: floors[stage].seconds / 0.6 + 50e-6 * passes[stage] for stage in floors}
            rows.append(step_row(floor, setting, stage_s))
    return results_of(rows)


def test_cases_that_were_left_out_are_predicted(plan, floor):
    results = launch_bound_results(plan, floor, (25, 50, 100, 200), (4, 64, 1024))
    others = [{"implementation": "theirs"}, {"status": "failed"}, {"dtype": "float32"}]
    results["rows"] += [results["rows"][0] | other for other in others]
    cases = plan.leave_one_out(results)
    assert len(cases) == 12  # the one in float32 has no other of its dtype
    assert statistics.median(case["error"] for case in cases) < 0.1
    assert max(case["error"] for case in cases) < 0.5
    first = results["rows"][0]
    assert cases[0]["measured_s"] == first["step_s"] and cases[0]["horizon"] == 25
    assert cases[0]["error"] == pytest.approx(abs(cases[0]["predicted_s"] / first["step_s"] - 1))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/esr_speedup.json")), ids=lambda path: path.parent.name)
def test_measured_steps_are_predicted(plan, path):
    """Each committed case by the shares of the others; no file, no case."""
    cases = plan.leave_one_out(json.loads(path.read_text()))
    told = "\n".join(
        f"{case['pair']} {case['dtype']} B {case['batch_size']} P {case['prompt']} K {case['horizon']}: measured "
        f"{case['measured_s']:.4g} s, predicted {case['predicted_s']:.4g} s, off by {case['error']:.0%}"
        for case in cases
    )
    print(told)
    assert cases, f"{path}: at least two timed rows of ours are needed"
    assert statistics.median(case["error"] for case in cases) <= MEDIAN_ERROR, told


PAIR = ["--student", "tiny", "--teacher", "tiny", "--batch-size", "3", "--prompt", "6", "--horizon", "5"]


@pytest.fixture
def no_results(plan, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    return tmp_path


def words(capsys):
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def test_the_command_without_shares(plan, no_results, capsys):
    assert plan.main([*PAIR, "--gpu", "h200", "--gpus", "8"]) == 0
    told = words(capsys)
    assert "Shares of the floor are not measured for this GPU: every time below is a floor" in told
    assert "predicted" not in told.lower() and "step, link hidden" in told
    assert "NVIDIA H200: 4,800 GB/s, 989 TFLOP/s (published: H200 SXM data sheet); link 450 GB/s" in told
    assert (
        "Horizon 5 against 2000: a step" in told
        and "(a ratio of floors, no bound)" in told
        and "DOES NOT FIT" not in told
    )


def test_the_command_with_this_gpus_shares(plan, floor, no_results, capsys):
    results = launch_bound_results(plan, floor, (25, 50), (4,))
    folder = no_results / "nvidia-h200"
    folder.mkdir()
    (folder / "esr_speedup.json").write_text(json.dumps(results))
    assert plan.main([*PAIR, "--gpu", "h200"]) == 0
    told = words(capsys)
    assert "NVIDIA H200: 1 GB/s, 1 TFLOP/s (measured at commit abc)" in told
    assert "Predicted: floor over the shares measured on NVIDIA H200, 2 steps" in told and "another machine" not in told
    assert "* Outside of what was measured: the share of the nearest case." in told
    assert plan.main([*PAIR, "--gpu", "h200", "--dtype", "float32"]) == 0
    assert "No share was measured in float32 on NVIDIA H200: every time below is a floor" in words(capsys)


def test_the_command_with_the_shares_of_another(plan, floor, no_results, capsys):
    results = launch_bound_results(plan, floor, (25, 50), (4,)) | {"is_finished": False}
    (no_results / "esr_speedup.json").write_text(json.dumps(results))
    assert plan.main([*PAIR, "--gpu", "l4", "--results", str(no_results)]) == 0
    told = words(capsys)
    assert "measured on NVIDIA H200, 2 steps" in told and "NVIDIA L4: 300 GB/s" in told
    assert "That is another machine: nothing was measured on NVIDIA L4. The run was not finished." in told


def test_what_does_not_fit_is_said(plan, no_results, capsys):
    big = ["--student", "qwen3-1.7b", "--teacher", "qwen3-8b", "--batch-size", "16"]
    assert plan.main([*big, "--gpu", "l4"]) == 0
    assert "DOES NOT FIT" in words(capsys)
    assert plan.main([*big, "--gpu", "b200"]) == 0
    assert "DOES NOT FIT" not in words(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h3"], "--gpu must be among b200, h200, .* got 'h3'"),
        (["--gpu", "h200", "--student", "./nothing"], "--student must be among .* got './nothing'"),
        (["--gpu", "h200", "--results", "nowhere"], "--results must be a folder with esr_speedup.json, got nowhere"),
        (["--gpu", "h200", "--gpus", "0"], "gpus must be >= 1, got 0"),
        (["--gpu", "h200", "--full-horizon", "0"], "horizon must be >= 1, got 0"),
        (["--gpu", "h200", "--gpus", "2", "--link-gb-per-s", "0"], "link_bytes_per_s must be > 0 for 2 GPUs, got 0"),
        ([], "--gpu must be among .* where there is no CUDA device, got none"),
    ],
)
def test_wrong_options(plan, no_results, capsys, monkeypatch, arguments, message):
    import re

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        plan.main([*PAIR, *arguments])
    assert re.search(message, words(capsys))


def test_a_smoke_run_gives_no_shares(plan, floor, no_results, capsys):
    results = launch_bound_results(plan, floor, (25, 50), (4,)) | {"is_smoke": True}
    (no_results / "esr_speedup.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        plan.main([*PAIR, "--gpu", "h200", "--results", str(no_results)])
    assert "--results must be of a full run, got the smoke run" in words(capsys)
