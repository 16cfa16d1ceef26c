"""Are targets met, missed or not measured by the rows, and never met by what is missing?

python -m pytest tests/bench/test_targets.py
"""

import pytest

GPU = {"gpu": "Some GPU", "processor": "p"}
CPU = {"gpu": None, "processor": "Some CPU"}


def row(case: str, implementation: str, median_ms: float | None = None, *, status: str = "timed", **fields) -> dict:
    """A row of the ops; a time says that it was timed."""
    times = {"median_ms": median_ms, "p10_ms": median_ms, "p90_ms": median_ms} if median_ms is not None else {}
    status = status if median_ms is not None or status != "timed" else "refused"
    is_ours = implementation.startswith("ours")
    return (
        {"case": case, "op": "o", "implementation": implementation, "is_ours": is_ours, "status": status}
        | times
        | fields
    )


@pytest.fixture
def states(bench):
    """(state, ratio) by words in the text of a target, for rows of one case in one file of a GPU."""

    def of(case: str, rows: list[dict], machine: dict = GPU, file: str = "ops.json", **results) -> dict:
        targets = bench("targets")
        found = targets.target_rows({f"some-gpu/{file}": {"machine": machine, "rows": rows, **results}})
        return {r.target.text: (r.state, r.measured.ratio, r.measured.missing) for r in found if r.target.case == case}

    return of


def one(found: dict, words: str) -> tuple:
    ((_, state),) = [(text, state) for text, state in found.items() if words in text]
    return state


def linear_rows(divergence: str = "reverse_kl") -> list[dict]:
    ours = {"workspace_bytes": None, "divergence": divergence}
    return [
        row("L1", "ours, float32", 14.0, ratio_to_products=14 / 13, **ours),
        row("L1", "ours, auto", 13.65, ratio_to_products=13.65 / 13, **ours),
        row("L1", "ours, float32, workspace 2 GB", 10.0, ratio_to_products=0.5, **ours | {"workspace_bytes": 2}),
        row("L1", "compile, bfloat16 logits", 16.38, divergence=divergence),
        row("L1", "compile, float32 logits", 15.0, divergence=divergence),
        row("L1", "TRL chunked divergence", status="not installed", divergence=divergence),
        row("L1", "Liger fused_linear_jsd", 41.0, divergence=divergence),
    ]


def test_met_missed_and_not_installed(states):
    found = states("L1", linear_rows())
    assert one(found, "bare products") == ("met", pytest.approx(1.05), "")
    assert one(found, "bfloat16 logits") == ("met", pytest.approx(1.2), "")
    assert one(found, "float32 logits") == ("missed", pytest.approx(15 / 13.65), "")
    assert one(found, "TRL") == ("not measured", None, "TRL chunked divergence: not installed")
    assert one(found, "Liger") == ("missed", pytest.approx(41 / 13.65), "")


def test_the_worst_setting_counts(states):
    slower = [r | {"ratio_to_products": 1.2} if r["is_ours"] else r for r in linear_rows("forward_kl")]
    found = states("L1", linear_rows() + slower)
    assert one(found, "bare products")[:2] == ("missed", 1.2)


def test_a_part_that_is_missing_is_never_met_and_may_be_missed(states):
    others = [r for r in linear_rows("forward_kl") if r["is_ours"]]
    absent = row("L1", "compile, bfloat16 logits", status="out of memory", divergence="forward_kl")
    state, ratio, missing = one(states("L1", [*linear_rows(), *others, absent]), "bfloat16 logits")
    assert (state, missing) == ("not measured", "compile, bfloat16 logits: out of memory") and ratio == pytest.approx(
        1.2
    )
    absent = row("L1", "Liger fused_linear_jsd", status="failed", divergence="forward_kl")
    assert one(states("L1", [*linear_rows(), *others, absent]), "Liger")[0] == "missed"


def test_a_refused_row_of_ours_is_said(states):
    rows = [r if not r["is_ours"] else row("L1", r["implementation"], divergence="reverse_kl") for r in linear_rows()]
    state, ratio, missing = one(states("L1", rows), "bfloat16 logits")
    assert (state, ratio) == ("not measured", None) and "ours, auto: refused" in missing


def test_a_run_that_was_cut_off_meets_nothing_in_its_last_case(states):
    rows = [*linear_rows(), row("L3", "ours, float32", 11.0, ratio_to_products=1.1)]
    assert one(states("L1", rows, is_finished=False), "bare products")[0] == "met"
    state = one(states("L3", rows, is_finished=False), "bare products")
    assert state == ("not measured", 1.1, "the run was not finished")
    failed = [{"case": "L3", "message": "x"}]
    assert one(states("L3", rows, failed_groups=failed), "bare products")[2] == "a group failed"


def frontier_row(name: str, median_ms: float | None, error: float, **fields) -> dict:
    return row("L7", name, median_ms, gap=0.1, mean_divergence=5e-3, errors={"grad_student_hidden": error}, **fields)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        # less exact than the budget, however fast
        ([("fast", 1.0, 3e-3), ("exact", 20.0, 1.6e-3)], ("met", 2.0, "")),
        # as fast as ours over 1.25
        ([("exact", 8.0, 1.6e-3)], ("missed", 0.8, "")),
        # slower, but more exact than any of ours: on the front too
        ([("exact", 20.0, 1.0e-3)], ("missed", 0.0, "")),
        # slower and more exact than the faster of ours, but not than the other
        ([("exact", 24.0, 1.45e-3)], ("met", 2.0, "")),
        ([("fast", 1.0, 3e-3)], ("met", float("inf"), "")),
        ([("absent", None, 0.0)], ("not measured", None, "absent: not installed")),
        ([("absent", None, 0.0), ("exact", 8.0, 1.6e-3)], ("missed", 0.8, "absent: not installed")),
    ],
)
def test_the_pareto_front(states, others, expected):
    rows = [frontier_row("ours, tile_relative_fp16", 10.0, 1.5e-3), frontier_row("ours, float32", 12.0, 1.4e-3)]
    rows += [frontier_row(name, ms, error, **({} if ms else {"status": "not installed"})) for name, ms, error in others]
    state, ratio, missing = one(states("L7", rows), "Pareto")
    assert (state, missing) == (expected[0], expected[2])
    assert ratio == (expected[1] if expected[1] is None else pytest.approx(expected[1]))


def test_ours_outside_of_the_budget_is_not_on_the_front(states):
    rows = [frontier_row("ours, float32", 10.0, 2.1e-3), frontier_row("exact", 20.0, 1.6e-3)]
    assert one(states("L7", rows), "Pareto")[:2] == ("missed", 0.0)


def test_memory_and_flatness(states):
    # two sides of 10 x 1000 bfloat16; the gradient is 20,000 bytes
    many = row("K2", "ours", 1.0, N=10, V=1000, dtype="bfloat16", peak_bytes=21_000, share_of_copy=0.9)
    found = states("K2", [many])
    assert one(found, "memory") == ("met", pytest.approx(1.05), "") and one(found, "copy rate")[0] == "met"
    assert one(states("K2", [many | {"peak_bytes": 41_000}]), "memory")[:2] == ("missed", pytest.approx(2.05))
    rates = [row("K3", "ours", 1.0, V=V, gb_per_s=rate) for V, rate in ((100, 2000.0), (200, 2500.0), (300, 2400.0))]
    assert one(states("K3", rates), "GB/s") == ("missed", pytest.approx(0.8), "")
    assert one(states("K3", rates[1:]), "GB/s") == ("met", pytest.approx(0.96), "")
    large = row("L4", "ours, auto", 1.0, workspace_bytes=None, peak_bytes=6_500_000_000)
    assert one(states("L4", [large]), "GB beyond") == ("met", pytest.approx(6.5), "")


def test_rows_below_a_thousand_do_not_count(states):
    rows = [row("L5", "ours, auto", 1.0, N=N, ratio_to_products=ratio) for N, ratio in ((320, 3.0), (1056, 1.19))]
    assert one(states("L5", rows), "1000 rows") == ("met", 1.19, "")


def test_the_saving_of_a_prefix_is_the_smaller_one(states):
    def ours(horizon, ms, name="ours, auto"):
        return row("B4", f"{name}, horizon {horizon}", ms, horizon=horizon, N=horizon * 32)

    rows = [ours(100, 10.0), ours(2000, 250.0), ours(2000, 190.0, "ours, auto, workspace 26 GB")]
    assert one(states("B4", rows), "2000") == ("missed", pytest.approx(19.0), "")
    rows[2] = row("B4", "ours, auto, workspace 26 GB, horizon 2000", status="out of memory", horizon=2000, N=64000)
    state, ratio, missing = one(states("B4", rows), "2000")
    assert state == "not measured" and "out of memory" in missing


def sampler_row(case: str, name: str, ms: float | None, *, size: int = 512, logits: str = "LM-like", **fields) -> dict:
    return row(case, name, ms, B=size, V=7, dtype="bfloat16", sampler="T 1", logits=logits, inputs=2, **fields)


def test_targets_of_the_sampler(states):
    rows = [sampler_row("C1", "ours", 0.080, share_of_copy=0.45), sampler_row("C1", "vLLM", 0.5)]
    rows += [sampler_row("C1", "ours", 0.009, size=32, share_of_copy=0.2)]
    found = states("C1", rows)
    assert one(found, "reading the logits once") == ("missed", pytest.approx(1 / 0.45), "")
    assert one(found, "microseconds") == ("met", pytest.approx(9.0), "")
    assert one(found, "vLLM") == ("met", pytest.approx(6.25), "")
    rows = [sampler_row("C2", "ours", 1.0, size=128), sampler_row("C2", "one sort, eager", 5.0, size=128)]
    assert one(states("C2", rows), "128 rows")[:2] == ("met", 5.0)
    missing = sampler_row("C2", "vLLM", None, size=128, status="not installed")
    assert one(states("C2", [*rows, missing]), "128 rows") == ("not measured", 5.0, "vLLM: not installed")
    assert one(states("C2", [*rows, sampler_row("C2", "FlashInfer", 2.0, size=128)]), "128 rows")[:2] == ("missed", 2.0)
    rows = [
        sampler_row("C3", "ours", ms, logits=logits)
        for logits, ms in (("LM-like", 2.0), ("flat", 5.0), ("one-hot", 1.0))
    ]
    assert one(states("C3", rows), "one-hot")[:2] == ("missed", 2.5)


def rollout_row(name: str, median_s: float, **fields) -> dict:
    times = {"median_s": median_s, "least_s": median_s, "most_s": median_s}
    setting = {"model": "qwen3-1.7b", "batch_size": 32, "threads": 1, "dtype": "bfloat16"}
    return setting | times | {"implementation": name, "status": "timed", "host_syncs": None} | fields


def test_targets_of_rollouts_on_a_gpu(states):
    rows = [
        rollout_row("ours, CUDA graphs", 0.2, share_of_floor=0.5, host_syncs=0),
        rollout_row("ours, compiled step", 0.14, share_of_floor=0.72, host_syncs=3),
        rollout_row("generate", 2.0),
        rollout_row("generate, static cache", 0.2),
        rollout_row("ours, CUDA graphs", 0.5, share_of_floor=0.6, host_syncs=0, batch_size=512),
        rollout_row("ours, CUDA graphs", 9.0, share_of_floor=0.1, host_syncs=0, model="qwen3-0.6b"),
    ]
    found = states("D1", rows, file="rollouts.json")
    assert one(found, "floor's rate, Qwen3-1.7B, 32 rows") == ("met", 0.72, "")
    assert one(found, "floor's rate, Qwen3-1.7B, 512 rows") == ("missed", 0.6, "")
    assert one(found, "than generate") == ("met", pytest.approx(2.0 / 0.14), "")
    assert one(found, "best generate") == ("missed", pytest.approx(0.2 / 0.14), "")
    assert one(states("D2", rows, file="rollouts.json"), "waits")[:2] == ("missed", 3)


def test_targets_of_a_processor(states):
    rows = [rollout_row("ours", 1.0), rollout_row("ours, compiled step", 0.4), rollout_row("generate", 1.3)]
    found = states("rollouts", rows, machine=CPU, file="rollouts-x.json")
    assert one(found, "by default") == ("missed", pytest.approx(1.3), "")
    assert one(found, "compile_step") == ("met", pytest.approx(3.25), "")
    rows = [sampler_row("CPU", "ours", 2.0), sampler_row("CPU", "torch.multinomial, log-probs", 1.9)]
    rows += [sampler_row("CPU", "torch.multinomial", 1.0)]
    found = states("sampler", rows, machine=CPU, file="sampler_cpu.json")
    assert one(found, "torch.multinomial") == ("missed", pytest.approx(0.95), "")


def test_the_breakdown_of_a_step(states):
    stages = {name: 0.1 for name in ("rollout", "student", "teacher", "divergence", "backward", "optimizer")}
    times = {"step_s": 1.0, "least_s": 0.9, "most_s": 1.1, "stage_s": stages, "pair": "a<-b"}
    step = {"implementation": "ours", "status": "timed"} | times
    assert one(states("E1", [step], file="esr_speedup.json"), "stages") == ("met", 6, "")
    refused = step | {"status": "refused", "stage_s": None}
    assert one(states("E1", [refused], file="esr_speedup.json"), "stages") == ("not measured", None, "ours: refused")


def test_without_a_machine_every_target_is_not_measured(bench):
    targets = bench("targets")
    rows = targets.target_rows({})
    assert [row.target for row in rows] == list(targets.TARGETS)
    assert {row.state for row in rows} == {"not measured"} and {row.machine for row in rows} == {None}


def test_each_machine_has_its_row_and_of_two_files_the_worse_counts(bench):
    def file(ratio):
        return {"machine": GPU, "rows": [row("L3", "ours, float32", 1.0, ratio_to_products=ratio)]}

    files = {"a/ops.json": file(1.05), "a/ops-L3.json": file(1.12), "b/ops.json": file(1.3), "c/ops-K1.json": file(1.0)}
    files["c/ops-K1.json"]["rows"] = [row("K1", "ours", 1.0, share_of_copy=0.5)]
    rows = [row for row in bench("targets").target_rows(files) if row.target.case == "L3"]
    assert [(r.machine, r.file, r.state, r.measured.ratio) for r in rows] == [
        ("a", "ops-L3.json", "met", 1.12),
        ("b", "ops.json", "missed", 1.3),
        ("c", None, "not measured", None),
    ]
    cells = bench("targets").cells(rows[1])
    assert cells[0] == "L3" and cells[2:] == ("at most 1.13", "1.3 (ours, float32)", "**missed**", "b, `ops.json`")


def test_every_case_has_a_target(bench):
    targets = bench("targets").TARGETS
    assert {target.case for target in targets} == {*bench("reports.case_states").CASES, "sampler", "rollouts"}
    assert len({(target.case, target.text) for target in targets}) == len(targets)


def test_every_case_of_the_benchmark_has_a_state(bench):
    assert set(bench("ops_run").DEFAULT_CASES) <= set(bench("reports.case_states").OPS_CASES)
