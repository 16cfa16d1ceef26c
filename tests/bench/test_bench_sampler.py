"""Does the benchmark of the sampler refuse what draws something else, and time only calls that draw?

python -m pytest tests/bench/test_bench_sampler.py
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ROWS, VOCAB = 6, 301


@pytest.fixture
def inputs_of(bench):
    def make(*settings, kind="LM-like", dtype=torch.bfloat16):
        module = bench("cases.sampler_inputs")
        settings = tuple(module.SamplerSetting(**setting) for setting in settings) or (module.SamplerSetting(),)
        (inputs,) = module.make_inputs(settings, kind, (ROWS, VOCAB), dtype, "cpu", copies=1)
        return inputs

    return make


@pytest.fixture
def refusal_of(bench):
    """The gate's reason, or None, for a function from inputs to results."""

    def refusal(draw, inputs):
        gate = bench("cases.sampler_gate")
        torch.manual_seed(5)
        try:
            gate.SamplerGate(inputs).check(gate.drawn(draw, inputs), norm_limit=0.5)
        except AssertionError as error:
            return str(error)

    return refusal


def softmax_draw(logits_B_V, temperature=1.0):
    return torch.multinomial((logits_B_V.float() / temperature).softmax(-1), 1).squeeze(1)


SETTINGS = {
    "none": {},
    "usual": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.1},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_exact_distribution_is_that_of_the_warpers(bench, inputs_of, setting):
    """Without ties, in float64, from the warpers themselves."""
    inputs = inputs_of(setting, dtype=torch.float32)
    logits_B_V = inputs.logits_B_V.double()
    actual = bench("cases.sampler_gate").ExactDistribution.of(logits_B_V, inputs.parameters)
    drawn = []
    baselines = bench("baselines.sampler_baselines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "drawn_ids", lambda probs_B_V: drawn.append(probs_B_V))
        draw = baselines.hugging_face.__wrapped__(inputs.settings[0])
        draw(inputs._replace(logits_B_V=SimpleNamespace(float=lambda: logits_B_V)))
    torch.testing.assert_close(actual.probs_R_V, drawn[0], rtol=1e-6, atol=0)
    is_kept_B_V = drawn[0] > 0
    assert actual.is_allowed_R_V[is_kept_B_V].all()
    # an id at the boundary, which rounding of a float32 sum might keep
    assert (actual.is_allowed_R_V ^ is_kept_B_V).sum(-1).amax() <= 1


def test_ties_at_the_boundary_are_all_allowed(bench, inputs_of):
    inputs = inputs_of({"top_k": 20, "top_p": 0.95}, kind="flat")
    actual = bench("cases.sampler_gate").ExactDistribution.of(inputs.logits_B_V, inputs.parameters)
    assert actual.is_allowed_R_V.all()
    torch.testing.assert_close(actual.probs_R_V, torch.full((ROWS, VOCAB), 1 / VOCAB, dtype=torch.float64))


@pytest.mark.parametrize("name", ["usual", "top-p", "min-p", "all"])
def test_a_sampler_without_filters_is_refused(refusal_of, inputs_of, name):
    inputs = inputs_of(SETTINGS[name])
    temperature = inputs.settings[0].temperature
    assert "have probability 0 under the filters" in refusal_of(
        lambda inputs: {"token_ids": softmax_draw(inputs.logits_B_V, temperature)}, inputs
    )


@pytest.mark.parametrize(
    "draw, reason",
    [
        (lambda logits: logits.argmax(-1), "draws are too likely"),
        (lambda logits: softmax_draw(logits, 0.6), "draws are too likely"),
        (lambda logits: torch.randint(VOCAB, (ROWS,)), "draws are too unlikely"),
        (lambda logits: softmax_draw(logits, 2.0), "draws are too unlikely"),
        (lambda logits: torch.full((ROWS,), VOCAB), "outside the vocabulary"),
        (lambda logits: torch.full((ROWS,), -1), "outside the vocabulary"),
        (softmax_draw, None),
    ],
)
def test_a_biased_sampler_is_refused(refusal_of, inputs_of, draw, reason):
    refusal = refusal_of(lambda inputs: {"token_ids": draw(inputs.logits_B_V)}, inputs_of())
    assert refusal is None if reason is None else reason in refusal


def test_any_id_but_the_hot_one_is_refused(refusal_of, inputs_of):
    inputs = inputs_of(kind="one-hot", dtype=torch.float32)
    hot_B = inputs.logits_B_V.argmax(-1)
    assert refusal_of(lambda inputs: {"token_ids": hot_B}, inputs) is None
    wrong_B = hot_B.clone()
    wrong_B[3] = (hot_B[3] + 1) % VOCAB
    assert "too unlikely" in refusal_of(lambda inputs: {"token_ids": wrong_B}, inputs)


def test_log_probs_of_something_else_are_refused(bench, refusal_of, inputs_of):
    inputs, baselines = inputs_of(), bench("baselines.sampler_baselines")
    draw = baselines.with_logprobs(baselines.multinomial)
    assert refusal_of(draw, inputs) is None

    def with_base_2(inputs):
        results = draw(inputs)
        return results | {"logprobs": results["logprobs"] / torch.tensor(2.0).log()}

    assert "logprobs: off by" in refusal_of(with_base_2, inputs)


@pytest.mark.parametrize("setting", [{}, SETTINGS["all"]])
@pytest.mark.parametrize("name", ["token_ids", "logprobs", "sampling_logprobs"])
def test_one_changed_bit_of_ours_is_refused(bench, inputs_of, name, setting):
    inputs = inputs_of(setting)
    results = bench("cases.sampler_cases").our_sampler(inputs).results(None, None)
    gate = bench("cases.sampler_gate").SamplerGate(inputs)
    gate.check(results)
    changed = results[name].clone()
    bits = changed.view(torch.int32) if name != "token_ids" else changed
    bits[2, 4] ^= 1
    with pytest.raises(AssertionError, match=f"{name}: 1 of .* differ from the reference"):
        gate.check(results | {name: changed})


def test_ours_without_its_filters_is_refused(bench, inputs_of):
    """The gate's reference has parameters of its own."""
    inputs = inputs_of(SETTINGS["usual"])
    inputs.state.top_k_B.zero_()
    inputs.state.top_p_B.fill_(1)
    results = bench("cases.sampler_cases").our_sampler(inputs).results(None, None)
    with pytest.raises(AssertionError, match="differ from the reference"):
        bench("cases.sampler_gate").SamplerGate(inputs).check(results)


def small_group(bench, change=lambda candidate: candidate, **setting):
    settings = bench("cases.settings").smoke_settings()
    group = bench("cases.sampler_cases").c1_groups(settings)[1]()
    return replace(group, candidates=[change(group.candidates[0])], **setting)


def measure(bench, group):
    timing = bench("timing")
    (row,) = bench("cases.comparison").measured_rows(
        group, timing.Stopwatch(torch.device("cpu")), timing.Budget(1.0, 1, fewest=4, most=4)
    )
    return row


def test_timed_calls_advance_the_state(bench):
    group = small_group(bench, calls_per_sample=7)
    row = measure(bench, group)
    assert (row["status"], row["repetitions"]) == ("timed", 4)
    assert (row["calls_per_sample"], row["captured"]) == (7, False)
    state = group.inputs[0].state
    assert state.lengths_B.tolist() == [7] * 3 and int(state.active) == 3
    assert (state.token_ids_B_K[:, :7] != state.token_ids_B_K[:, 7:14]).any()


def test_timed_calls_on_finished_rows_are_refused(bench):
    def finished(candidate):
        class Finished(type(candidate.state)):
            def rewind(self):
                super().rewind()
                self.state.lengths_B[1] = self.state.horizon
                self.state.finished_B[1] = True

        return replace(candidate, state=Finished(candidate.state.state))

    row = measure(bench, small_group(bench, finished))
    assert (row["status"], row["message"]) == ("refused", "timed calls: 1 calls drew [1, 128] tokens in a row")
    assert "median_ms" not in row
    assert bench("ops_run").our_failures([row]) == [row]


def test_a_state_that_runs_out_of_slots_is_refused(bench):
    slots = bench("cases.sampler_inputs").SLOTS
    row = measure(bench, small_group(bench, calls_per_sample=slots))
    assert row["status"] == "refused" and "0 rows are still running" in row["message"]


def test_a_sample_of_several_calls_is_divided(bench):
    comparison, timing = bench("cases.comparison"), bench("timing")
    timed = object.__new__(comparison.Timed)
    timed.stalled, timed.host_ms = None, 0.25
    timed.burst = SimpleNamespace(num_calls=20, is_captured=True)
    summary = timed.summary([timing.Sample(device_ms, 3.0) for device_ms in (20.0, 40.0, 60.0)])
    assert (summary["median_ms"], summary["host_ms"], summary["repetitions"]) == (2.0, 0.25, 3)
    assert (summary["calls_per_sample"], summary["captured"]) == (20, True)


@pytest.mark.parametrize("fails", [False, True])
def test_a_burst_is_replayed_or_where_it_cannot_be_captured_enqueued(bench, monkeypatch, fails):
    timing, calls, replays, streams = bench("timing"), [], [], []

    @contextmanager
    def graph(_):
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    fake = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        current_stream=lambda: "its own",
        set_stream=streams.append,
        graph=graph,
    )
    monkeypatch.setattr(timing.torch, "cuda", fake)
    burst = timing.Burst(calls.append, ["a", "b"], 3, may_be_captured=True)
    assert burst.is_captured is not fails and calls == ["a", "b", "a"]
    burst()
    assert (len(calls), len(replays), streams) == ((6, 0, ["its own"]) if fails else (3, 1, []))
    assert not timing.Burst(calls.append, ["a"], 3, may_be_captured=False).is_captured


def test_ratios_to_others_and_to_lm_like_logits(bench):
    def row(name, median_ms, *, logits="LM-like", **facts):
        kind = {"is_ours": name == "ours", "is_peer": name == "vLLM", "has_logprobs": name == "ours"} | facts
        place = {"case": "C1", "B": 32, "V": 9, "dtype": "bfloat16", "sampler": "T 1", "logits": logits, "inputs": 1}
        return {**place, **kind, "implementation": name, "status": "timed", "median_ms": median_ms}

    report = bench("reports.sampler_report")
    rows = [row("ours", 0.01), row("eager", 0.05), row("race", 0.04), row("race, log-probs", 0.08, has_logprobs=True)]
    rows += [row("vLLM", 0.02), row("vLLM", 0.001) | {"status": "refused"}, row("eager", 0.001, logits="flat")]
    assert report.against_others(rows) == [
        "- T 1, LM-like, B 32, bfloat16, 1 input: the fastest others take 8.00 x by race, log-probs (PyTorch with log-probs); "
        "4.00 x by race (PyTorch without log-probs); peers with log-probs: not measured; "
        "2.00 x by vLLM (peers without log-probs)."
    ]
    extremes = [row("ours", 0.01), row("ours", 0.015, logits="flat"), row("ours", 0.01, logits="flat", B=64)]
    assert report.against_lm_like(extremes) == [
        "- T 1, flat, B 32, bfloat16, 1 input: ours takes 1.50 x its LM-like time."
    ]


def test_the_cpu_benchmark_measures_what_it_says(bench, tmp_path, capsys):
    module = bench("bench_sampler_cpu")
    threads = torch.get_num_threads()
    try:
        assert module.main(["--smoke", "--threads", "1", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "sampler_cpu.json").read_text())
    assert results["is_finished"] and results["is_smoke"] and results["machine"]["torch_threads"] == 1
    rows = results["rows"]
    assert all(row["status"] == "timed" and row["B"] == 64 for row in rows)
    per_dtype = [
        ("T 1", "ours"),
        ("T 1", "torch.multinomial"),
        ("T 1", "torch.multinomial, log-probs"),
        ("T 1", "PyTorch reference, once"),
        ("T 0.6, k 20, p 0.95", "ours"),
        ("T 0.6, k 20, p 0.95", "Hugging Face warpers, log-probs"),
        ("T 0.6, k 20, p 0.95", "PyTorch reference, once"),
        ("T 1, p 0.9", "ours"),
        ("T 1, p 0.9", "Hugging Face warpers, log-probs"),
        ("T 1, p 0.9", "PyTorch reference, once"),
    ]
    measured = [(row["dtype"], row["sampler"], row["implementation"]) for row in rows]
    assert measured == [(dtype, *pair) for dtype in ("float32", "bfloat16") for pair in per_dtype]
    counts = {row["implementation"] == "PyTorch reference, once": row["repetitions"] for row in rows}
    assert counts[True] == 1 and counts[False] >= 6
    assert "PyTorch reference, once" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--threads", "0"], "--threads: must be a whole number > 0, got 0"),
        (["--smoke", "--out", str(ROOT / "bench" / "results" / "x")], "must not be under bench/results with --smoke"),
    ],
)
def test_wrong_arguments_of_the_cpu_benchmark_are_errors(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench("bench_sampler_cpu").main(arguments)
    assert message in capsys.readouterr().err
