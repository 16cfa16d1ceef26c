"""Is the benchmark page made of the result files, all of them, and of nothing else?

python -m pytest tests/bench/test_report.py
"""

import json

import pytest

PAGE = """# Benchmarks
<!-- state -->
<!-- end state -->
by hand
<!-- targets -->
<!-- end targets -->
<!-- cases -->
<!-- end cases -->
## Measured
<!-- machines -->
<!-- end machines -->
the end
"""
VERSIONS = {"torch": "2.11.0", "triton": None}


def machine(gpu: str | None, commit: str = "abc123", **fields) -> dict:
    start = {"processor": "Some CPU", "cores": 3, "torch_threads": 2, "gpu": gpu, "python": "3.12.1"}
    return start | {"versions": VERSIONS, "commit": commit} | fields


def ops_row(case: str, implementation: str, ms: float | None, **fields) -> dict:
    is_ours = implementation.startswith("ours")
    row = {"case": case, "op": "linear_divergence", "divergence": "reverse_kl", "dtype": "bfloat16"}
    row |= {"pass": "forward and backward", "implementation": implementation, "is_ours": is_ours}
    row |= {"N": 10, "V": 100, "D": 4, "E": 8, "d_weight": True, "gap": 0.5, "mean_divergence": 0.1}
    row |= {"floor_ms": 2.0, "counted_bytes": 0, "counted_flop": 6e9}
    if ms is None:
        return row | {"status": "not installed", "message": "TRL: no module"} | fields
    row |= {"status": "timed", "median_ms": ms, "p10_ms": ms - 0.5, "p90_ms": ms + 0.5, "repetitions": 50}
    row |= {"errors": {"divergence": 1e-5, "grad_student_hidden": 1.5e-3}, "peak_bytes": 3 * 10**9, "host_syncs": 0}
    return row | {"host_ms": 0.1, "first_call_s": 1.0, "ratio_to_products": ms / 2, "tflop_per_s": 6 / ms} | fields


def ops_results(*rows: dict, gpu: str = "Some GPU", **fields) -> dict:
    ceilings = {"copy_gb_per_s": 4000.0, "square_bfloat16_tflop_per_s": 10.0, "bare_products_ms": {"logits": 1.0}}
    start = {"is_smoke": False, "is_finished": True, "machine": machine(gpu, driver="570.1"), "ceilings": ceilings}
    return start | {"rows": list(rows), "failed_groups": []} | fields


def rollout_results(tokens_per_s: float) -> dict:
    def row(name, rate):
        setting = {"model": "m", "dtype": "float32", "threads": 2, "batch_size": 4, "prompt": 9, "horizon": 10}
        times = {"median_s": 40 / rate, "least_s": 40 / rate, "most_s": 40 / rate, "ms_per_step": 4000 / rate}
        found = {
            "is_ragged": True,
            "implementation": name,
            "status": "timed",
            "host_syncs": None,
            "share_of_floor": 0.5,
        }
        return setting | times | found | {"tokens_per_s": rate}

    rows = [row("ours", tokens_per_s), row("generate", 1000.0)]
    return {"is_smoke": False, "machine": machine(None, commit="def456"), "copy_gb_per_s": 40.0, "rows": rows}


L1 = [
    ops_row("L1", "ours, float32", 2.5, workspace_bytes=None),
    ops_row("L1", "compile, bfloat16 logits", 3.0),
    ops_row("L1", "TRL chunked divergence", None),
]


@pytest.fixture
def report(bench, tmp_path, monkeypatch):
    """The command on a page and result files of a temporary folder."""
    module = bench("report")
    monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "page.md")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    module.PAGE.write_text(PAGE)
    write(tmp_path, "some-cpu/rollouts-m.json", rollout_results(2500.0))
    write(tmp_path, "some-gpu/ops.json", ops_results(*L1))
    return module


def write(folder, name: str, content: dict) -> None:
    path = folder / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_page_is_made_of_every_file(report, tmp_path):
    assert report.main([]) == 0
    page = report.PAGE.read_text()
    assert "Measured on Some GPU, driver 570.1: the ops; on Some CPU, 3 cores: rollouts." in page
    assert "Not yet on a GPU: K1, K2, K3, L2," in page
    assert "Some GPU, driver 570.1. Python 3.12.1, torch 2.11.0: `ops.json` (commit abc123)." in page
    assert "Some CPU, 3 cores. Python 3.12.1, torch 2.11.0: `rollouts-m.json` (commit def456)." in page
    assert "| m | 4 | 2 | ours | 2,500 | 1.60 | 50% | 2.50 |  |" in page
    ours = "| reverse_kl, bfloat16, forward and backward | ours, float32 | 2.5 | 2 to 3 | 1.250 | 1.5e-03 | 3.00 | "
    others = "compile, bfloat16 logits 3 (1.20 x, 1.5e-03); not installed: TRL chunked divergence |"
    assert ours + others in page
    assert "| L1 | ours: 1 timed; others: 1 timed; not installed: TRL |" in page
    assert "| L2 | not measured yet |" in page
    assert "by hand\n" in page and page.endswith("the end\n")
    assert page.index("machine-some-gpu") < page.index("machine-some-cpu")
    assert {path.name for path in (tmp_path / "results/some-gpu").iterdir()} == {
        "ops.json",
        "ops.md",
        "ops-roofline.png",
    }
    assert "(../results/some-gpu/ops-roofline.png)" in page
    assert report.main(["--check"]) == 0


def test_a_changed_number_is_found_and_nothing_is_written(report, tmp_path, capsys):
    report.main([])
    before = report.PAGE.read_text()
    write(tmp_path, "some-cpu/rollouts-m.json", rollout_results(1500.0))
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "page.md: block targets is not what the result files give",
        "page.md: block machine-some-cpu is not what the result files give",
    ]
    assert report.PAGE.read_text() == before
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    assert report.PAGE.read_text() != before


def test_a_page_that_was_edited_is_found(report, capsys):
    report.main([])
    report.PAGE.write_text(report.PAGE.read_text().replace("1.60", "1.50").replace("| K2 | not measured yet |", ""))
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["cases", "machine-some-cpu"]


def test_machines_come_and_go_with_their_folders(report, tmp_path, capsys):
    report.main([])
    (tmp_path / "results/some-cpu/rollouts-m.json").unlink()
    write(tmp_path, "other-gpu/rollouts.json", rollout_results(5.0) | {"machine": machine("Other GPU")})
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert "machine-other-gpu" in told and "machine-some-cpu" in told and "machine-some-gpu" not in told
    report.main([])
    page = report.PAGE.read_text()
    assert "<!-- machine-other-gpu -->" in page and "some-cpu" not in page


def test_missing_figures_and_tables_of_a_file_are_found(report, tmp_path, capsys):
    report.main([])
    (tmp_path / "results/some-gpu/ops-roofline.png").unlink()
    (tmp_path / "results/some-gpu/ops.md").write_text("other")
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" is missing")[0].rsplit("/", 1)[1] for line in told] == ["ops-roofline.png", "ops.md"]


def test_a_smoke_file_is_no_source(report, tmp_path, capsys):
    write(tmp_path, "some-gpu/ops-K1.json", ops_results(*L1, is_smoke=True))
    assert report.main([]) == 1
    assert "ops-K1.json: is_smoke must be false in a source of numbers, got True" in capsys.readouterr().err
    assert report.PAGE.read_text() == PAGE
    write(tmp_path, "some-gpu/ops-K1.json", {"machine": machine("Some GPU"), "rows": []})
    assert report.main(["--check"]) == 1
    assert "got None" in capsys.readouterr().err


def test_a_file_in_the_folder_of_another_machine_is_no_source(report, tmp_path, capsys):
    write(tmp_path, "some-gpu/ops-L1.json", ops_results(*L1, gpu="Another GPU"))
    assert report.main([]) == 1
    assert "must lie in the folder of its machine, another-gpu, got some-gpu" in capsys.readouterr().err


def test_files_of_other_kinds_are_left_alone(report, tmp_path):
    write(tmp_path, "some-gpu/ops-pytest-benchmark.json", {"benchmarks": []})
    write(tmp_path, "demo-gpu/demo-rewrite.json", {"no": "benchmark"})
    assert report.main([]) == 0 and "demo" not in report.PAGE.read_text()


def scaling_results() -> dict:
    def row(size, median_s):
        start = {"axis": "tokens", "size": size, "N": size, "V": 70, "D": 4, "E": 8, "dtype": "float32"}
        start |= {"implementation": "reference", "status": "timed", "floor_s": 0.001, "floor_bound": "bytes"}
        return start | {"median_s": median_s, "low_s": 0.9 * median_s, "high_s": 1.1 * median_s, "repetitions": 6}

    start = {"is_smoke": False, "is_finished": True, "machine": machine(None)}
    start |= {"rates": {"copy_bytes_per_s": 4e10, "flop_per_s": 5e11, "name": "n", "source": "s"}, "axes": ["tokens"]}
    slopes = {"tokens": {"points": 2, "measured": 1.0, "floor": 0.0}}
    return start | {"slopes": slopes, "rows": [row(32, 0.01), row(64, 0.02)]}


def test_how_cost_grows_is_part_of_the_page(report, tmp_path):
    write(tmp_path, "some-cpu/scaling.json", scaling_results())
    assert report.main([]) == 0
    page = report.PAGE.read_text()
    assert "#### `scaling.json`" in page and "![scaling.png](../results/some-cpu/scaling.png)" in page
    assert "`scaling.json` (commit abc123, 2 threads)" in page
    assert (tmp_path / "results/some-cpu/scaling.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(["--check"]) == 0


def step_results() -> dict:
    def row(horizon, step_s):
        stages = ("rollout", "student_forward", "teacher_forward", "divergence", "backward", "optimizer")
        start = {"pair": "a<-b", "dtype": "float32", "threads": 2, "batch_size": 4, "prompt": 9, "horizon": horizon}
        start |= {"implementation": "ours", "status": "timed", "message": None, "step_s": step_s, "least_s": step_s}
        start |= {"most_s": step_s, "first_step_s": 2 * step_s, "repetitions": 4, "tokens_per_s": 4 * horizon / step_s}
        start |= {"stage_s": dict.fromkeys(stages, step_s / 8), "between_stages_s": step_s / 4, "loss": 0.5}
        return start | {"stage_peak_bytes": None, "gate_loss_difference": 1e-7, "gate_gradient_cosine": 1.0}

    rates = {"copy_gb_per_s": 40.0, "flop_per_s": 5e11}
    start = {"is_smoke": False, "is_finished": True, "machine": machine(None), "rates": rates}
    return start | {"rows": [row(10, 0.2), row(100, 1.6)]}


def test_whole_steps_are_part_of_the_page(report, bench, tmp_path):
    write(tmp_path, "some-cpu/esr_speedup.json", step_results())
    assert report.main([]) == 0
    page, folder = report.PAGE.read_text(), tmp_path / "results/some-cpu"
    assert "#### `esr_speedup.json`" in page and "| a<-b | 4 | 10 | ours | 0.2 | 8.00 |" in page
    names = {path.name for path in folder.glob("*.png")}
    assert names == set(bench("reports.machine_block").figure_names("esr_speedup.json", step_results()))
    assert len(names) == 2 and all(f"(../results/some-cpu/{name})" in page for name in names)
    assert "rollouts, whole training steps." in page or "whole training steps, rollouts." in page
    assert report.main(["--check"]) == 0


def test_one_folder_alone(report, tmp_path, capsys):
    write(tmp_path, "other-gpu/ops.json", ops_results(*L1, gpu="Other GPU"))
    assert report.main(["--folder", str(tmp_path / "results/other-gpu")]) == 0
    assert (tmp_path / "results/other-gpu/ops-roofline.png").exists()
    assert not (tmp_path / "results/some-gpu/ops.md").exists()
    assert "machine-some-gpu" in report.PAGE.read_text()
    (tmp_path / "results/empty").mkdir()
    assert report.main(["--folder", str(tmp_path / "results/empty")]) == 1
    assert "--folder must hold result files" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--folder", str(tmp_path)])
    assert "--folder must be a folder of" in capsys.readouterr().err


def test_a_run_that_was_cut_off_is_said_to_be(report, tmp_path):
    failed = [{"case": "K1", "message": "ValueError: no memory"}]
    write(tmp_path, "some-gpu/ops.json", ops_results(*L1, is_finished=False, failed_groups=failed))
    report.main([])
    page = report.PAGE.read_text()
    assert "The run was not finished" in page and "**K1: a group failed**: ValueError: no memory" in page


def test_a_page_without_a_marker_is_an_error(report):
    report.PAGE.write_text(PAGE.replace("<!-- end cases -->", ""))
    with pytest.raises(ValueError, match="must hold <!-- cases -->"):
        report.main([])


def test_points_of_the_roofline_by_hand(bench):
    sampler = {"case": "C1", "op": "sample_tokens", "dtype": "bfloat16", "B": 8, "V": 50, "pass": "forward"}
    sampler |= {"implementation": "ours", "is_ours": True, "status": "timed", "floor_ms": None, "share_of_copy": 0.4}
    sampler |= {"counted_bytes": 800}
    refused = ops_row("L1", "ours, float32", None)
    sweep = ops_row("slices", "ours, float32", 1.0)
    frozen = ops_row("L3", "ours, float32", 1.5, d_weight=False)
    results = ops_results(L1[0], refused, sweep, frozen, sampler)
    (left,), (trained, head_frozen) = bench("reports.roofline").points(results)
    assert left[:2] == (3 * 8 * 50 / 800, 0.4)
    # read: 10 and 100 rows of 4 and 8 values; written: 10 and 100 rows of 4; 2 bytes each
    assert trained[:2] == (pytest.approx(6e9 / (2 * (110 * 12 + 110 * 4))), pytest.approx(2.4 / 10))
    assert head_frozen[:2] == (pytest.approx(6e9 / (2 * (110 * 12 + 10 * 4))), pytest.approx(4.0 / 10))


def test_figures_of_ops_are_drawn_with_one_panel_empty(bench, tmp_path):
    bench("reports.roofline").write_figure(ops_results(*L1), tmp_path / "a.png")
    frontier = [ops_row("L7", name, 2.0, gap=gap) for name in ("ours, float32", "eager") for gap in (1.0, 0.1)]
    report = bench("reports.ops_report")
    (tmp_path / "ops.json").write_text(json.dumps(ops_results(*frontier)))
    assert report.main([str(tmp_path / "ops.json")]) == 0
    for name in ("a.png", "ops-accuracy.png", "ops-roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
