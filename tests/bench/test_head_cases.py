"""C4: does the head's product feed the sampler, and is what draws something else refused?

python -m pytest tests/bench/test_head_cases.py
"""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

ROWS, VOCAB, SIZE = 3, 200, 24


def fi_sampling_from_logits(
    logits, indices=None, deterministic=True, generator=None, check_nan=False, seed=None, offset=None
):
    assert logits.shape == (ROWS, VOCAB) and seed.dtype == offset.dtype == torch.int64
    return torch.multinomial(logits.float().softmax(-1), 1).squeeze(1).int()


class FusedSampler:
    """FlashSampling's function with the parameters of its source; a call with the same seed draws the same."""

    def __init__(self):
        self.seeds = []

    def __call__(
        self,
        weights,
        hidden_states,
        num_samples,
        temperature,
        seed,
        greedy_sampling=False,
        tp=None,
        return_logits=False,
        p2p_no_overlap=False,
    ):
        assert weights.shape[1] == hidden_states.shape[1] and num_samples == 1
        assert temperature.shape == () and float(temperature) == 1 and isinstance(seed, int)
        self.seeds.append(seed)
        generator = torch.Generator().manual_seed(seed)
        logits = hidden_states.float() @ weights.float().T
        return torch.multinomial(logits.softmax(-1), num_samples, generator=generator)


@pytest.fixture
def fused(monkeypatch):
    function = FusedSampler()
    modules = {
        "flashinfer.sampling": {"sampling_from_logits": fi_sampling_from_logits},
        "fused_mm_sampling.core": {"fused_mm_sample_triton": function},
    }
    for name, contents in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    return function


@pytest.fixture
def stopwatch(bench):
    return bench("timing").Stopwatch(torch.device("cpu"))


@pytest.fixture
def make_group(bench, stopwatch):
    """The last group of the smoke run: the larger hidden size, 3 rows."""

    def make():
        ceilings = bench("ceilings").Ceilings(stopwatch, is_smoke=True)
        return bench("cases.head_cases").c4_groups(bench("cases.settings").smoke_settings(), ceilings)[-1]()

    return make


def measure(bench, group, stopwatch):
    rows = bench("cases.comparison").measured_rows(group, stopwatch, bench("timing").Budget(0.1, 1, fewest=2, most=2))
    return {row["implementation"]: row for row in rows}


def test_every_way_from_hidden_states_to_tokens_is_measured(bench, stopwatch, make_group, fused):
    torch.manual_seed(1)
    group = make_group()
    # the head and the hidden states, 2 bytes each, and 2 B V D
    assert group.counted_bytes == 2 * (VOCAB * SIZE + ROWS * SIZE) and group.counted_flop == 2 * ROWS * VOCAB * SIZE
    assert (group.setting["B"], group.setting["V"], group.setting["D"]) == (ROWS, VOCAB, SIZE)
    assert group.floor_ms > 0 and group.calls_per_sample == 1
    rows = measure(bench, group, stopwatch)
    others = ("torch.multinomial after the head", "FlashInfer after the head", "FlashSampling")
    assert tuple(rows) == ("ours", *others)
    for name, row in rows.items():
        assert row["status"] == "timed", row
        assert abs(row["errors"]["surprise"]) < 6
        assert (row["is_ours"], row["has_logprobs"]) == (name == "ours",) * 2
    assert rows["ours"]["errors"]["logprobs"] < 1e-5
    assert [rows[name]["is_peer"] for name in others] == [False, True, True]


def test_sizes_are_those_of_student_and_teacher_at_every_batch(bench, stopwatch):
    head_cases, settings = bench("cases.head_cases"), bench("cases.settings")
    ceilings = bench("ceilings").Ceilings(stopwatch, is_smoke=True)
    groups = head_cases.c4_groups(settings.smoke_settings(), ceilings)
    sizes = [(group.setting["D"], group.setting["B"]) for group in (make() for make in groups)]
    assert sizes == [(16, 1), (16, 3), (24, 1), (24, 3)]
    assert set(ceilings.record()["bare_products_ms"]) == {f"bfloat16 logits N={b} V=200 D={d}" for d, b in sizes}
    full = [make.args[2:] for make in head_cases.c4_groups(settings.full_settings(), ceilings)]
    assert full == [(size, rows) for size in (2048, 4096) for rows in (1, 8, 32, 64, 128, 256, 512)]


def test_logits_are_the_products_and_look_like_a_language_models(bench):
    inputs = bench("cases.head_cases").make_head_inputs(8, 5003, 32, "cpu")
    assert inputs.hidden_B_D.dtype == inputs.weight_V_D.dtype == inputs.logits().dtype == torch.bfloat16
    assert torch.equal(inputs.logits(), inputs.sampler.logits_B_V)
    exact = inputs.hidden_B_D.double() @ inputs.weight_V_D.double().T
    torch.testing.assert_close(inputs.logits().double(), exact, rtol=2**-7, atol=2**-7)
    assert torch.equal(inputs.with_logits().logits_B_V, inputs.logits())
    entropy_B = torch.distributions.Categorical(logits=exact).entropy()
    assert 3 < entropy_B.mean() < 6.5  # flat: 8.5
    assert (inputs.logits()[0] != inputs.logits()[1]).any()


def test_each_call_of_the_fused_peer_has_a_seed_of_its_own(bench, make_group, fused):
    group = make_group()
    (candidate,) = [one for one in group.candidates if one.name == "FlashSampling"]
    for _ in range(3):
        ids = candidate.run(group.inputs[0], None)["token_ids"]
        assert ids.shape == (ROWS,)
    assert len(set(fused.seeds)) == 3 and all(seed > 1 and seed % 2 for seed in fused.seeds)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weight: 1.01 * weight, "differ from the reference, bit for bit"),
        (lambda weight: weight.roll(1, 0), "differ from the reference, bit for bit"),
    ],
)
def test_ours_from_another_product_is_refused(bench, stopwatch, make_group, change, message):
    """Logits that are one percent off, or of other ids: the tokens may be equal by chance, the log-probs are not."""
    head_cases, group = bench("cases.head_cases"), make_group()
    inputs = group.inputs[0]
    wrong = inputs._replace(weight_V_D=change(inputs.weight_V_D.float()).bfloat16())
    candidate = head_cases.our_head_sampler(wrong)
    row = measure(bench, dataclasses.replace(group, candidates=[candidate]), stopwatch)["ours"]
    assert row["status"] == "refused" and message in row["message"] and "median_ms" not in row


@pytest.mark.parametrize("name", ["logprobs", "sampling_logprobs"])
def test_one_percent_in_a_log_prob_of_ours_is_refused(bench, stopwatch, make_group, name):
    group = make_group()
    ours = group.candidates[0]

    def perturbed(raw, upstream):
        results = ours.results(raw, upstream)
        return results | {name: 1.01 * results[name]}

    candidates = [ours, dataclasses.replace(ours, name="perturbed", results=perturbed)]
    rows = measure(bench, dataclasses.replace(group, candidates=candidates), stopwatch)
    assert rows["ours"]["status"] == "timed"
    assert rows["perturbed"]["status"] == "refused" and rows["perturbed"]["message"].startswith(f"{name}: ")


def test_another_that_takes_the_likeliest_id_is_refused(bench, stopwatch, make_group):
    head_cases, group = bench("cases.head_cases"), make_group()
    greedy = head_cases.other_head_sampler("greedy", lambda inputs: inputs.logits().argmax(-1), group.inputs[0])
    row = measure(bench, dataclasses.replace(group, candidates=[greedy]), stopwatch)["greedy"]
    assert row["status"] == "refused" and "draws are too likely" in row["message"]


def test_peers_that_are_not_installed_say_so(bench, stopwatch, make_group, monkeypatch):
    for module in ("flashinfer.sampling", "fused_mm_sampling.core"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = measure(bench, make_group(), stopwatch)
    for name, project in (("FlashInfer after the head", "FlashInfer"), ("FlashSampling", "FlashSampling")):
        assert rows[name]["status"] == "not installed" and rows[name]["message"].startswith(f"{project}: ")
