"""Does the benchmark of the ops measure what it says, and refuse what is wrong?

python -m pytest tests/bench/test_bench_ops.py
"""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from esr_kernels import Impl
from esr_kernels.testing.cases import DIVERGENCES
from esr_kernels.testing.inputs import make_logit_pair, make_upstream
from esr_kernels.testing.oracle import evaluate_token_divergence

ROOT = Path(__file__).resolve().parents[2]
ALL_CASES = (
    *("K1", "L1", "B2", "C1", "C2", "L6", "B1", "L7", "L3", "C4", "B3", "L2", "L5", "C3", "K2", "K3", "B4", "L4"),
    *("tiles", "slices"),
)
PEERS = (
    *("TRL", "Liger", "FLA", "verl", "cut-cross-entropy", "QuACK", "FlashInfer", "vLLM", "FlashSampling"),
    "auto-chunker",  # of inductor, which a smoke run does not use
)


def run_pytest(*arguments: str, program: tuple[str, ...] = ("-m", "pytest")) -> subprocess.CompletedProcess:
    """The benchmark in a process of its own: the interpreter must be chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment.pop("PYTEST_XDIST_WORKER", None)  # which would switch pytest-benchmark off
    command = [sys.executable, "-W", "ignore", *program, str(ROOT / "bench" / "bench_ops.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory):
    """Every case once."""
    folder = tmp_path_factory.mktemp("smoke")
    arguments = ["--out", str(folder), "--cases", ",".join(ALL_CASES), "--benchmark-json", str(folder / "saved.json")]
    done = run_pytest("--smoke", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def smoke(smoke_folder):
    (path,) = smoke_folder.glob("ops*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def saved(smoke_folder):
    """What pytest-benchmark wrote."""
    return json.loads((smoke_folder / "saved.json").read_text())


def rows_of(results: dict, case: str, **setting) -> list[dict]:
    rows = [row for row in results["rows"] if row["case"] == case]
    return [row for row in rows if all(row.get(key) == value for key, value in setting.items())]


def test_every_case_runs_and_every_gate_holds(smoke):
    assert smoke["is_finished"] and smoke["is_smoke"] and smoke["failed_groups"] == []
    assert tuple(dict.fromkeys(row["case"] for row in smoke["rows"])) == ALL_CASES
    for row in smoke["rows"]:
        assert ("samples_ms" in row) == (row["status"] == "timed")
        is_peer = row["implementation"].startswith(PEERS)
        assert row["status"] == "timed" or (is_peer and row["status"] == "not installed"), row
        if row["status"] == "timed":
            assert row["repetitions"] >= 2 and 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]


def test_pytest_benchmark_has_the_times_of_the_device(smoke, saved):
    timed = [row for row in smoke["rows"] if row["status"] == "timed"]
    names = [entry["fullname"] for entry in saved["benchmarks"]]
    assert len(names) == len(timed) == len(set(names))
    for row, entry in zip(timed, saved["benchmarks"], strict=True):
        assert entry["name"].startswith(row["case"]) and entry["name"].endswith(f"[{row['implementation']}]")
        assert entry["options"]["timer"] == "device time" and entry["extra_info"]["median_ms"] == row["median_ms"]
        assert [1e3 * seconds for seconds in entry["stats"]["data"]] == pytest.approx(row["samples_ms"], rel=1e-4)
        assert 1e3 * entry["stats"]["median"] == pytest.approx(row["median_ms"], rel=1e-4)
    assert saved["machine_info"] == smoke["machine"] and saved["commit_info"]["id"] == smoke["machine"]["commit"]


def test_two_runs_can_be_compared(saved, tmp_path):
    """By pytest-benchmark's own command: here a run and one that took twice as long."""
    slower = json.loads(json.dumps(saved))
    for entry in slower["benchmarks"]:
        for name in ("min", "max", "mean", "median", "iqr"):
            entry["stats"][name] *= 2
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, results in zip(paths, (saved, slower), strict=True):
        path.write_text(json.dumps(results))
    command = [
        sys.executable,
        "-m",
        "pytest_benchmark",
        "compare",
        *map(str, paths),
        "--group-by=fullname",
        "--columns=median",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(2.00)") == len(saved["benchmarks"])


WRONG_KERNEL = """
import sys, pytest
from bench.cases import logit_cases
right = logit_cases.fused_run
def wrong(name):
    run = right(name)
    return lambda inputs, upstream: {key: 1.01 * value for key, value in run(inputs, upstream).items()}
logit_cases.fused_run = wrong
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_a_kernel_that_is_wrong_by_one_percent_is_not_timed_and_fails_the_run(tmp_path):
    saved = tmp_path / "saved.json"
    arguments = ["--smoke", "--cases", "K3", "--out", str(tmp_path), "--benchmark-json", str(saved)]
    done = run_pytest(*arguments, program=("-c", WRONG_KERNEL))
    assert done.returncode == 1 and "refused: " in done.stdout, done.stdout + done.stderr
    rows = json.loads((tmp_path / "ops-K3.json").read_text())["rows"]
    ours = [row for row in rows if row["is_ours"]]
    assert len(ours) == 2 and all(row["status"] == "refused" and "median_ms" not in row for row in ours)
    assert {row["implementation"] for row in rows if row["status"] == "timed"} >= {"eager", "compile"}
    assert "[ours]" not in saved.read_text()
    (state,) = [line for line in done.stdout.splitlines() if line.lstrip().startswith("K3: ")]
    timed = sum(row["status"] == "timed" for row in rows)
    assert f"K3: ours: 2 refused; others: {timed} timed" in state
    missing = [name for name, module in (("TRL", "trl"), ("Liger", "liger_kernel")) if find_spec(module) is None]
    assert not missing or f"not installed: {', '.join(missing)}" in state


def test_every_storage_and_schedule_is_measured(smoke):
    ours = [row for row in smoke["rows"] if "schedule" in row]
    assert {row["schedule"] for row in ours} == {"value", "keep", "hidden", "recompute"}
    assert {row["storage"] for row in ours} == {"float32", "tile_relative_fp16"}
    assert {row["chunk_rows"] for row in rows_of(smoke, "L1", schedule="recompute")} == {1}
    assert {row["d_weight"] for row in rows_of(smoke, "L3")} == {False}
    schedules = {"B1": {"value"}, "B2": {"keep", "hidden"}, "L6": {"keep"}}
    for case, expected in schedules.items():
        rows = [row for row in rows_of(smoke, case) if row["is_ours"]]
        assert {row["schedule"] for row in rows} == expected
        assert {row["storage"] for row in rows} == {"float32", "tile_relative_fp16"}


def test_work_is_counted_as_by_hand(smoke):
    sizes = {"divergence": "jsd_0.5", "implementation": "ours", "N": 1, "V": 200}
    (forward,) = rows_of(smoke, "K1", dtype="float16", **{"pass": "forward"}, **sizes)
    (both,) = rows_of(smoke, "K1", dtype="float32", **{"pass": "forward and backward"}, **sizes)
    # Jensen-Shannon reads both sides twice in forward and once in backward, where it writes the gradient.
    assert (forward["counted_bytes"], forward["schedule_bytes"]) == (2 * 2 * 200, 4 * 2 * 200)
    assert (both["counted_bytes"], both["schedule_bytes"]) == (3 * 4 * 200, 7 * 4 * 200)
    # 2 N V (D + E) for the logits, 2 N V D for each gradient
    assert {row["counted_flop"] for row in rows_of(smoke, "L1")} == {2 * 400 * (16 + 24 + 16 + 16)}
    assert {row["counted_flop"] for row in rows_of(smoke, "L3")} == {2 * 400 * (16 + 24 + 16)}
    assert {row["counted_flop"] for row in rows_of(smoke, "L6")} == {2 * 400 * 3 * 16}


def test_every_setting_of_the_sampler_is_measured(smoke):
    # logits of 200 ids, 2 or 4 bytes each; more than 500 bytes of them take turns
    assert {(row["B"], row["dtype"], row["counted_bytes"], row["inputs"]) for row in rows_of(smoke, "C1")} == {
        (1, "float16", 400, 1),
        (3, "float16", 1200, 2),
        (3, "float32", 2400, 2),
    }
    usual = {"T 0.6, k 20, p 0.95", "T 1, p 0.9", "T 1, min_p 0.05", "T 1, k 50, p 0.9", "mixed rows"}
    assert {row["sampler"] for row in rows_of(smoke, "C2", B=3, logits="LM-like")} == usual
    extremes = [
        (sampler, logits) for sampler in ("T 1", "T 1, k 20, p 0.95") for logits in ("LM-like", "flat", "one-hot")
    ]
    assert [(row["sampler"], row["logits"]) for row in rows_of(smoke, "C3", B=2, implementation="ours")] == extremes
    for row in (row for case in ("C1", "C2", "C3") for row in rows_of(smoke, case)):
        assert row["V"] == 200 and (row["is_ours"] <= row["has_logprobs"])
        if row["status"] == "timed":
            assert (row["calls_per_sample"], row["captured"]) == (1, False)
            assert abs(row["errors"]["surprise"]) <= 6


def test_work_of_a_prefix_is_that_of_its_rows(smoke):
    # Two rollouts of two response tokens, whatever comes before; B4: two or four tokens of four.
    flop = 2 * 2 * 2 * 200
    assert {(row["D"], row["counted_flop"]) for row in rows_of(smoke, "B1")} == {(16, flop * 16), (24, flop * 24)}
    assert {(row["d_weight"], row["counted_flop"]) for row in rows_of(smoke, "B2")} == {
        (True, flop * 3 * 16),
        (False, flop * 2 * 16),
    }
    of_hidden = rows_of(smoke, "B4", op="linear_prefix_logprobs")
    work = {(row["horizon"], row["N"], row["counted_flop"]) for row in of_hidden}
    assert work == {(2, 4, flop * 3 * 16), (4, 8, 2 * flop * 3 * 16)}
    short, full = ([row for row in of_hidden if row["horizon"] == horizon] for horizon in (2, 4))
    assert len(short) == 1 and len(full) == 3 and short[0]["floor_ms"] != full[0]["floor_ms"]
    of_logits = rows_of(smoke, "B4", op="prefix_logprobs")
    assert {(row["horizon"], row["N"], row["counted_bytes"]) for row in of_logits} == {(2, 4, 1600), (4, 8, 3200)}


def test_errors_are_those_of_the_precision(smoke):
    for row in rows_of(smoke, "K1", dtype="float32", **{"pass": "forward and backward"}):
        if row["status"] == "timed":
            assert row["errors"]["grad_student_logits"] < 1e-5, row
    near = {row["implementation"]: row for row in rows_of(smoke, "L7", gap=0.1) if row["status"] == "timed"}
    assert near["compile, bfloat16 logits"]["errors"]["grad_student_hidden"] > 0.02
    for name in ("ours, float32", "ours, tile_relative_fp16"):
        assert set(near[name]["errors"]) == {"divergence", "grad_student_hidden", "grad_student_weight"}
        assert max(near[name]["errors"].values()) < 5e-3
    for case, value in {"B2": "logprobs", "B4": "logprobs", "L6": "divergence"}.items():
        for row in rows_of(smoke, case, is_ours=True, **{"pass": "forward and backward"}):
            gradients = {"grad_hidden"} if row["d_weight"] is False else {"grad_hidden", "grad_weight"}
            assert set(row["errors"]) == {value, *gradients}
            assert max(row["errors"].values()) < 5e-3, row


def test_the_report_says_that_a_smoke_run_means_nothing(smoke, smoke_folder):
    (report,) = smoke_folder.glob("*.md")
    text = report.read_text()
    assert "no figure here means anything" in text
    table_rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") > 10]
    assert len(table_rows) == len(smoke["rows"]) + 2 * len(ALL_CASES)  # a heading and a rule for each case
    assert "float32, keep, chunk 2" in text
    assert "- prefix_logprobs: ours, horizon 2 takes" in text and "on 0.5000 of its rows" in text
    (figure,) = smoke_folder.glob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def group_of(bench):
    """A group of given candidates for reverse KL on a few float32 rows, against the reference."""
    comparison, logit_cases = bench("cases.comparison"), bench("cases.logit_cases")
    inputs, upstream_N = make_logit_pair(5, 67), make_upstream(5, seed=1)

    def make(*candidates):
        return comparison.Group(
            case="K1",
            setting={"divergence": "reverse_kl", "dtype": "float32", "pass": "forward and backward", "N": 5, "V": 67},
            inputs=[inputs],
            upstream=upstream_N,
            gate=logit_cases.token_gate(inputs, "reverse_kl", upstream_N),
            gate_upstream=upstream_N,
            candidates=list(candidates),
            counted_bytes=3 * 4 * 5 * 67,
            counted_flop=0,
        )

    return make


def right(inputs, upstream_N):
    return evaluate_token_divergence(inputs, DIVERGENCES["reverse_kl"], upstream_N, impl=Impl.REFERENCE)


def slightly_wrong(inputs, upstream_N):
    results = right(inputs, upstream_N)
    results["grad_student_logits"][3, 40] += 1e-4
    return results


def something_else(inputs, upstream_N):
    return evaluate_token_divergence(inputs, DIVERGENCES["forward_kl"], 2 * upstream_N, impl=Impl.REFERENCE)


def broken(inputs, upstream_N):
    raise RuntimeError("no kernel image")


def test_a_red_gate_is_not_timed_and_costs_the_others_nothing(bench, group_of):
    comparison, timing, peers = bench("cases.comparison"), bench("timing"), bench("baselines.peers")

    def absent(inputs, upstream_N):
        raise peers.NotInstalled("peer: not here")

    group = group_of(
        comparison.Candidate("ours", slightly_wrong),
        comparison.Candidate("inexact", slightly_wrong, is_ours=False, norm_limit=0.5),
        comparison.Candidate("other quantity", something_else, is_ours=False, norm_limit=0.5),
        comparison.Candidate("broken", broken),
        comparison.Candidate("absent", absent, is_ours=False),
        comparison.Candidate("right", right),
    )
    stopwatch = timing.Stopwatch(torch.device("cpu"))
    rows = {row["implementation"]: row for row in comparison.measured_rows(group, stopwatch, timing.Budget(0.1, 1))}
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "refused",
        "inexact": "timed",
        "other quantity": "refused",
        "broken": "failed",
        "absent": "not installed",
        "right": "timed",
    }
    assert "grad_student_logits: largest error" in rows["ours"]["message"]
    assert rows["ours"]["errors"]["grad_student_logits"] > 1e-6
    assert rows["broken"]["message"] == "RuntimeError: no kernel image"
    assert "median_ms" not in rows["ours"] and "median_ms" in rows["right"]
    assert [row["implementation"] for row in bench("ops_run").our_failures(list(rows.values()))] == [
        "ours",
        "broken",
    ]


@pytest.fixture
def ops_run(bench, monkeypatch, tmp_path):
    """A smoke run of K1."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = bench("ops_run")
    return module.OpsRun(module.OpsOptions(is_smoke=True, cases=("K1",), out=tmp_path))


def test_a_killed_run_keeps_what_it_has(bench, group_of, ops_run):
    def killed():
        raise KeyboardInterrupt

    def failing():
        raise ValueError("no memory for inputs")

    ops_run.begin(len(ops_run.groups))
    ops_run.measure("K1", partial(group_of, bench("cases.comparison").Candidate("ours", right)))
    with pytest.raises(ValueError, match="no memory for inputs"):
        ops_run.measure("K1", failing)
    with pytest.raises(KeyboardInterrupt):
        ops_run.measure("K1", killed)
    results = json.loads((ops_run.folder / "ops-K1.json").read_text())
    assert [row["implementation"] for row in results["rows"]] == ["ours"]
    assert results["failed_groups"] == [{"case": "K1", "message": "ValueError: no memory for inputs"}]
    assert not results["is_finished"]
    assert "was not finished" in bench("reports.ops_report").markdown(results)


def test_a_selection_of_groups_replaces_no_full_run(bench, group_of, ops_run):
    ops_run.begin(1)
    ops_run.measure("K1", partial(group_of, bench("cases.comparison").Candidate("ours", right)))
    ops_run.finish()
    assert [path.name for path in ops_run.folder.iterdir()] == ["ops-selected.json"]
    assert json.loads(ops_run.path.read_text())["is_finished"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cases": ("K1", "K9")}, r"--cases must be among K1,.*, got K9"),
        ({"cases": ("K1", "K1")}, "--cases must name each case once, got K1,K1"),
        ({"budget_seconds": 0.0}, "--budget-seconds must be > 0, got 0"),
        (
            {"is_smoke": True, "out": ROOT / "bench" / "results" / "x"},
            "--out must not be under bench/results with --smoke",
        ),
        pytest.param({}, "needs a CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")),
    ],
)
def test_wrong_options_are_errors(bench, monkeypatch, options, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = bench("ops_run")
    with pytest.raises(module.WrongOption, match=message):
        module.OpsOptions(**options)


def test_a_smoke_run_needs_the_interpreter(bench, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    module = bench("ops_run")
    with pytest.raises(module.WrongOption, match="--smoke must run the kernels in Triton's interpreter"):
        module.OpsOptions(is_smoke=True)


def test_a_wrong_option_is_a_usage_error_of_the_command():
    done = run_pytest("--smoke", "--cases", "K9")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "got K9" in done.stderr


def test_a_smoke_run_and_a_selection_have_places_of_their_own(bench, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = bench("ops_run")

    def path(**options):
        run = module.OpsRun(module.OpsOptions(is_smoke=True, **options))
        run.begin(len(run.groups))
        return run.path

    assert path() == ROOT / "runs" / "bench-smoke" / "ops.json"
    assert path(out=Path("x"), cases=("tiles", "K1")) == Path("x/ops-tiles-K1.json")
    assert set(module.DEFAULT_CASES) == set(ALL_CASES) - {"tiles", "slices"}
