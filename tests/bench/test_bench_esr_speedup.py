"""Does the benchmark of whole steps time the real step on forced lengths, refuse a wrong one, and compute what its tables say?

python -m pytest tests/bench/test_bench_esr_speedup.py
"""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

import esr_distill.step_parts
import esr_distill.train_step
from esr_distill.input_error import InputError
from esr_distill.metrics import StageClock
from esr_distill.prompts import next_prompt_batch

STAGES = ["rollout", "student_forward", "teacher_forward", "divergence", "backward", "optimizer"]
EAGER, TRL = "generate + eager full logits", "TRL DistillationTrainer"


@pytest.fixture(scope="module")
def smoke(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("esr-speedup")
    assert bench("bench_esr_speedup").main(["--smoke", "--out", str(folder)]) == 0
    return json.loads((folder / "esr_speedup.json").read_text())


@pytest.fixture(scope="module")
def pair(bench):
    return bench("steps.runs").make_pair("tiny<-tiny-teacher", "cpu", "float32")


@pytest.fixture(scope="module")
def demo_pair(bench):
    """Trained models, which do end their rollouts where they may."""
    return bench("steps.runs").make_pair(bench("bench_esr_speedup").ON_CPU.pairs[0], "cpu", "float32")


@pytest.fixture(scope="module")
def setting_of(bench):
    return bench("floor").StepSetting


@pytest.fixture
def rows_of(bench, pair, setting_of):
    """Rows of the tiny pair at one horizon, each implementation's turn taken."""

    def take(names, horizon=4, repetitions=1):
        measurement = bench("steps.measurement")
        stopwatch = bench("timing").Stopwatch(torch.device("cpu"))
        rows = measurement.SettingRows(pair, setting_of(2, 5, horizon), names, {}, stopwatch)
        list(measurement.take_turns([rows], names, repetitions, 60.0))
        return rows.rows

    return take


def test_every_row_of_a_smoke_run(smoke):
    assert smoke["is_smoke"] and smoke["is_finished"]
    assert smoke["rates"]["copy_gb_per_s"] > 0 and smoke["rates"]["flop_per_s"] > 0
    rows = {(row["implementation"], row["horizon"]): row for row in smoke["rows"]}
    assert set(rows) == {(name, horizon) for name in ("ours", EAGER, TRL) for horizon in (2, 5)}
    for (name, horizon), row in rows.items():
        assert (row["pair"], row["student"], row["teacher"]) == ("tiny<-tiny-teacher", "tiny", "tiny-teacher")
        assert (row["batch_size"], row["prompt"], row["threads"], row["dtype"]) == (3, 6, 1, "float32")
        assert (row["student_shape"]["hidden"], row["teacher_shape"]["hidden"]) == (32, 48)
        if name == TRL and row["status"] == "not installed":
            assert row["message"].startswith("TRL: ") and row["step_s"] is None
            continue
        assert row["status"] == "timed", row
        assert row["least_s"] <= row["step_s"] <= row["most_s"] and row["first_step_s"] > 0
        assert row["tokens_per_s"] == pytest.approx(3 * horizon / row["step_s"])
        assert sorted(row["stage_s"]) == sorted(STAGES) and min(row["stage_s"].values()) > 0
        assert row["repetitions"] == 2 and row["stage_peak_bytes"] is None
        assert row["optimizer_state_dtype"] == "float32" and 0 < row["loss"] < 1
        assert (row["gate_rows"] == 3) == (name == "ours")
    ours = rows["ours", 5]
    assert ours["gate_loss_difference"] <= 1e-4 and ours["gate_gradient_cosine"] > 0.999
    assert ours["rows_equal_to_generate"] == 1


def test_report_of_a_smoke_run(bench, smoke, tmp_path):
    report = bench("reports.speedup_report")
    rows, ratios, reached = report.tables(smoke).values()
    assert "no figure here means anything" in rows and "weights and AdamW's moments in float32" in rows
    timed = [row for row in smoke["rows"] if row["status"] == "timed"]
    assert rows.count("| tiny<-tiny-teacher |") == 6 and ratios.count("| tiny<-tiny-teacher |") == len(timed)
    for path in report.write_figures(smoke, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["esr_speedup-horizon.png", "esr_speedup-stages.png"]
    lines = [line for line in reached.splitlines() if line.startswith("| tiny")]
    assert len(lines) == 2 and lines[0].count("%") == 7  # six stages and the step


def row(name, horizon, step_s, status="timed"):
    return {
        "pair": "a<-b",
        "batch_size": 2,
        "horizon": horizon,
        "implementation": name,
        "status": status,
        "step_s": step_s,
    }


def test_speedups_by_hand(bench):
    report = bench("reports.speedup_report")
    rows = [
        *(row("ours", 10, 0.5), row("ours", 100, 4.0), row(EAGER, 10, 2.0), row(EAGER, 100, 30.0)),
        *(row(TRL, 10, 3.0), row(TRL, 100, None, "out of memory")),
    ]
    assert list(report.speedups(rows[0], rows).values()) == [8.0, 60.0, 4.0, 6.0]
    assert list(report.speedups(rows[1], rows).values()) == [1.0, 7.5, 7.5, None]
    assert list(report.speedups(rows[4], rows).values()) == [None, 10.0, 2 / 3, 1.0]
    lines = report.speedup_table(rows).splitlines()
    assert "own full rollout | x generate + eager full logits, full rollout |" in lines[0]
    assert lines[2].endswith("| 0.5 | 8.00 | 60.00 | 4.00 | 6.00 |")
    assert lines[3].endswith("| 4 | 1.00 | 7.50 | 7.50 | not measured |")
    assert len(lines) == 2 + 5  # a row that was not timed has no speed-up
    # the full rollout is the largest horizon asked for, not the largest that was timed
    without_full = [row("ours", 10, 0.5), row("ours", 100, None, "out of memory")]
    assert report.speedups(without_full[0], without_full)[None, True] is None


def test_a_row_that_was_not_timed_says_why(bench):
    report = bench("reports.speedup_report")
    told = report.row_cells(row("ours", 10, None, "out of memory") | {"message": "CUDA out of | memory\nmore"})
    assert len(told) == len(report.ROW_HEADINGS) and told[4] == "out of memory: CUDA out of / memory"


def test_every_rollout_has_exactly_the_horizon(bench, demo_pair, setting_of):
    runs, eager = bench("steps.runs"), bench("steps.eager")
    run = runs.make_run(demo_pair, setting_of(8, 7, 37))
    assert demo_pair.student.generation_config.eos_token_id == 2  # an end that must not be taken
    prompts = next_prompt_batch(run.prompts, 8, 0, 0)
    ours = run.rollouts.generate(run.student, prompts, run.rollout_request)
    for rollouts in (ours, eager.generated(run, prompts)):
        assert rollouts.token_ids_B_T.shape == (8, 7 + 37)
        assert rollouts.response_lengths_B.tolist() == [37] * 8 and not rollouts.stopped_by_eos_B.any()
    assert (ours.response_ids_B_K == 2).any()  # ids that would have ended it are drawn


def test_short_rollouts_are_refused(bench, rows_of, monkeypatch):
    implementations, record = bench("steps.implementations"), bench("steps.record")
    short = SimpleNamespace(step=lambda: record.StepRecord(0.1, {}, None, 7, 4), release=lambda: None)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, EAGER, lambda pair, setting: short)
    refused = rows_of([EAGER])[EAGER]
    assert refused["status"] == "refused" and refused["step_s"] is None
    assert refused["message"] == "rollouts must all have 4 tokens, 8 together, got 7 and a longest one of 4"


def test_eager_loss_against_float64_in_loops(bench, pair, setting_of):
    eager, gate, runs = bench("steps.eager"), bench("steps.gate"), bench("steps.runs")
    run = runs.make_run(pair, setting_of(2, 5, 3))
    rollouts = gate.random_rollouts(run)
    logits = []
    for model in (pair.student, pair.teacher):
        exact = type(model)(model.config).double()
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits.append(exact.eval()(rollouts.token_ids_B_T).logits.tolist())
    total = 0.0
    for student_rows, teacher_rows in zip(*logits, strict=True):
        for t in range(3):
            student, teacher = (rows[5 + t - 1] for rows in (student_rows, teacher_rows))
            log_sums = [math.log(math.fsum(math.exp(z) for z in row)) for row in (student, teacher)]
            for s, q in zip(student, teacher, strict=True):
                total += math.exp(s - log_sums[0]) * ((s - log_sums[0]) - (q - log_sums[1]))
    loss = eager.full_logits_loss(run, rollouts, StageClock(run.device)).item()
    assert loss == pytest.approx(total / 6, rel=1e-4) and loss > 1e-3


def test_the_gate_leaves_the_student_alone(bench, pair, setting_of):
    before = {name: weight.clone() for name, weight in pair.student.named_parameters()}
    columns = bench("steps.gate").step_gate(bench("steps.runs").make_run(pair, setting_of(2, 5, 3)))
    assert columns["gate_gradients"] == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert all(torch.equal(weight, before[name]) for name, weight in pair.student.named_parameters())
    assert all(weight.grad is None for weight in pair.student.parameters())


@pytest.mark.parametrize(
    ("perturb", "message"),
    [
        (lambda loss, _: 1.001 * loss, "relative difference 0.001, at most 0.0001 in float32"),
        (
            lambda loss, divergence_N: loss + divergence_N[0] - divergence_N[0].detach(),
            "more than 0.999 wanted in float32",
        ),
        (lambda loss, _: loss * float("nan"), "loss nan"),
    ],
)
def test_a_perturbed_step_is_refused_and_not_timed(rows_of, monkeypatch, perturb, message):
    normalize = esr_distill.step_parts.normalize_divergence

    def perturbed(divergence_N, *arguments, **options):
        return perturb(normalize(divergence_N, *arguments, **options), divergence_N)

    monkeypatch.setattr(esr_distill.step_parts, "normalize_divergence", perturbed)
    monkeypatch.setattr(esr_distill.train_step, "check_finite", lambda *_: None)
    rows = rows_of(["ours", EAGER])
    refused = rows["ours"]
    assert refused["status"] == "refused" and message in refused["message"], refused["message"]
    assert refused["step_s"] is None and refused["repetitions"] == 0 and refused["first_step_s"] is None
    assert rows[EAGER]["status"] == "timed"  # the next row goes on


def test_gate_rows_by_memory(bench, pair, setting_of):
    gate, runs = bench("steps.gate"), bench("steps.runs")
    run = runs.make_run(pair, setting_of(7, 5, 3))
    assert gate.gate_rows(run) == 7
    gate_bytes = 4 * 300 * (5 + 3)  # of float32 logits of one rollout
    for budget, wanted in ((3 * gate_bytes + 5, 3), (gate_bytes - 1, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gate, "LOGIT_BYTES", budget)
            assert gate.gate_rows(run) == wanted


def test_bfloat16_weights_have_bfloat16_moments(bench, setting_of):
    runs, implementations = bench("steps.runs"), bench("steps.implementations")
    small = runs.make_pair("tiny<-tiny-teacher", "cpu", "bfloat16")
    columns = bench("steps.gate").step_gate(runs.make_run(small, setting_of(3, 5, 4)))
    bench("steps.gate").check_gate(columns, "bfloat16")
    assert small.optimizer_state_dtype is None
    implementations.OurSteps(small, setting_of(2, 5, 3)).step()
    assert small.optimizer_state_dtype == "bfloat16"


def test_memory_clock_stands_for_the_clock_of_the_step_and_goes(bench, pair, setting_of):
    clock, runs = bench("steps.clock"), bench("steps.runs")
    run = runs.make_run(pair, setting_of(2, 5, 3))
    with clock.clocks_of_train_step() as clocks:
        metrics = esr_distill.train_step.train_step(run, 0)
    assert [type(made) for made in clocks] == [clock.MemoryClock] and clocks[0].seconds == metrics["stage_seconds"]
    assert esr_distill.train_step.StageClock is StageClock


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", "DefaultCPUAllocator"),
        (MemoryError(), "out of memory", "MemoryError"),
        (AssertionError("loss"), "refused", "loss"),
        (ValueError("x must be 1"), "failed", "ValueError: x must be 1"),
    ],
)
def test_what_an_implementation_raises_is_a_row(bench, rows_of, monkeypatch, error, status, message):
    def fail(pair, setting):
        raise error

    monkeypatch.setitem(bench("steps.implementations").IMPLEMENTATIONS, EAGER, fail)
    failed = rows_of([EAGER])[EAGER]
    assert failed["status"] == status and failed["message"].startswith(message)


def test_a_horizon_beyond_the_positions_is_a_row(bench, demo_pair, setting_of, tmp_path):
    message = "prompt and horizon must be at most the models' 512 positions together, got 6 [+] 600"
    with pytest.raises(InputError, match=message):
        bench("steps.runs").make_run(demo_pair, setting_of(2, 6, 600))
    module = bench("bench_esr_speedup")
    options = ["--smoke", "--pairs", module.ON_CPU.pairs[0], "--horizons", "600", "2", "--only", EAGER]
    assert module.main([*options, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "esr_speedup.json").read_text())["rows"]
    assert [(row["horizon"], row["status"]) for row in rows] == [(2, "timed"), (600, "failed")]
    assert "512 positions" in rows[1]["message"] and rows[0]["pair"] == "rewrite-student<-rewrite-teacher"


def test_a_stopped_run_keeps_its_rows(bench, tmp_path, monkeypatch):
    def stop(pair, setting):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench("steps.implementations").IMPLEMENTATIONS, EAGER, stop)
    with pytest.raises(KeyboardInterrupt):
        bench("bench_esr_speedup").main(["--smoke", "--horizons", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "esr_speedup.json").read_text())
    assert not results["is_finished"]
    assert [(row["implementation"], row["status"]) for row in results["rows"]] == [("ours", "timed")]


def test_row_seconds_stop_a_row_that_has_a_time(bench, pair, setting_of):
    measurement = bench("steps.measurement")
    rows = measurement.SettingRows(
        pair, setting_of(2, 5, 3), [EAGER], {}, bench("timing").Stopwatch(torch.device("cpu"))
    )
    list(measurement.take_turns([rows], [EAGER], 6, 0.0))
    assert rows.rows[EAGER]["status"] == "timed" and rows.rows[EAGER]["repetitions"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "tiny"], "--pairs must be student<-teacher, each among qwen3-0.6b, .* or a folder, got 'tiny'"),
        (["--pairs", "tiny<-nothing"], "--pairs must be student<-teacher, .* got 'tiny<-nothing'"),
        (["--only", "ours", "theirs"], "--only must name some of ours; .*; TRL DistillationTrainer, got theirs"),
        (["--horizons", "10", "0"], "--horizons: must be a whole number > 0, got '0'"),
        (["--batch-sizes", "many"], "--batch-sizes: must be a whole number > 0, got 'many'"),
        (["--row-seconds", "-1"], "--row-seconds: must be a number of seconds >= 0, got '-1'"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--smoke", "--out", "bench/results/x"], "--out must not be under bench/results with --smoke"),
    ],
)
def test_wrong_options(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench("bench_esr_speedup").main(arguments)
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed


def test_unlike_vocabularies_are_a_row(bench, demo_pair, tmp_path):
    module = bench("bench_esr_speedup")
    student = module.ON_CPU.pairs[0].split("<-")[0]
    options = ["--smoke", "--pairs", f"{student}<-tiny", "--horizons", "2", "--only", "ours", "--out", str(tmp_path)]
    assert module.main(options) == 1
    (failed,) = json.loads((tmp_path / "esr_speedup.json").read_text())["rows"]
    assert failed["status"] == "failed" and failed["student_shape"] is None
    assert "model.teacher must have the student's vocabulary size 19, got 300" in failed["message"]


def test_qwen3_8b_by_hand(bench):
    with torch.device("meta"):
        model = bench("rollout_models").make_model("qwen3-8b", "meta", torch.bfloat16)
    # two matrices of 151,936 x 4096; a layer: q and o, k and v, three of the MLP, norms of 4096 twice and of a head twice
    layer = 2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    assert sum(weight.numel() for weight in model.parameters()) == 2 * 151_936 * 4096 + 36 * layer + 4096


def test_checkpoints_change_neither_loss_nor_gradient_and_rollouts_keep_their_cache(bench):
    """The gate compares ours and the eager step; both pass with the student's layers computed again in backward."""
    runs = bench("steps.runs")
    pair = runs.make_pair("tiny<-tiny-teacher", "cpu", "float32", has_checkpoints=True)
    assert pair.student.training and not pair.teacher.training
    run = runs.make_run(pair, bench("floor").StepSetting(3, 6, 5))
    plain = runs.make_run(runs.make_pair("tiny<-tiny-teacher", "cpu", "float32"), bench("floor").StepSetting(3, 6, 5))
    gates = [bench("steps.gate").step_gate(each) for each in (run, plain)]
    assert gates[0]["gate_loss"] == pytest.approx(gates[1]["gate_loss"], rel=1e-6)
    bench("steps.gate").check_gate(gates[0], "float32")
    prompts = bench("steps.gate").next_prompt_batch(run.prompts, 3, 0, 0)
    drawn = [bench("steps.eager").generated(each, prompts) for each in (run, plain)]
    assert drawn[0].token_ids_B_T.shape == drawn[1].token_ids_B_T.shape and pair.student.training
