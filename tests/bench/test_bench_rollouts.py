"""Does the rollout benchmark count what a step reads, refuse wrong tokens, and time what it says?

python -m pytest tests/bench/test_bench_rollouts.py
"""

import json

import pytest
import torch

from esr_distill.rollout import InProcessBackend


@pytest.fixture(scope="module")
def smoke(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    assert bench("bench_rollouts").main(["--smoke", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    assert path.name == "rollouts-tiny.json"
    return json.loads(path.read_text())


def test_every_way_is_timed_behind_its_gate(smoke):
    assert smoke["is_smoke"]
    rows = {row["implementation"]: row for row in smoke["rows"]}
    assert set(rows) == {"ours", "ours, compiled step", "generate"}
    for name, row in rows.items():
        assert row["status"] == "timed", row
        assert row["tokens_per_s"] == pytest.approx(3 * 5 / row["median_s"])
        assert row["ms_per_step"] == pytest.approx(1e3 * row["median_s"] / 5)
        assert ("rows_equal_to_generate" in row) == name.startswith("ours")
    assert rows["ours"]["rows_that_ended"] >= 1
    assert rows["ours"]["rows_equal_to_generate"] == 1 and rows["ours"]["largest_logprob_error"] < 1e-4


def test_bytes_of_a_step_by_hand(bench):
    models = bench("rollout_models")
    model = models.make_model("tiny", "cpu", torch.float32)
    # 300 x 32 tied; a layer: q 16 heads of 8, k and v 8 heads of 8, o, three of 32 x 64, norms 2 x 32 and 2 x 8; the last norm
    layer = 32 * 128 + 2 * 32 * 64 + 128 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 8
    assert models.weight_bytes(model) == 4 * (300 * 32 + 2 * layer + 32)
    assert models.cache_bytes_per_token(model) == 2 * 2 * 8 * 8 * 4
    prompts = models.make_prompts(model, 3, 6, is_ragged=True)
    lengths = prompts.prompt_mask_B_P.sum(-1)
    assert lengths.min() >= 3 and lengths.max() <= 6
    assert (prompts.prompt_mask_B_P.long().diff(dim=1) >= 0).all()  # padding first
    expected = models.weight_bytes(model) + 1024 * (int(lengths.sum()) + 3 * 10 / 2)
    assert models.step_bytes(model, prompts, 10) == expected
    with pytest.raises(ValueError, match="model must be among .* or a folder, got 'nothing'"):
        models.make_model("nothing", "cpu", torch.float32)


def test_an_untied_embedding_is_not_read(bench):
    models = bench("rollout_models")
    tied = models.make_model("tiny", "cpu", torch.float32)
    before = models.weight_bytes(tied)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert models.weight_bytes(tied) == before


class WrongTokens(InProcessBackend):
    def generate(self, model, prompts, request):
        rollouts = super().generate(model, prompts, request)
        rollouts.token_ids_B_T[1, -1] = (rollouts.token_ids_B_T[1, -1] + 1) % 300
        return rollouts


class WrongLogprobs(InProcessBackend):
    def generate(self, model, prompts, request):
        rollouts = super().generate(model, prompts, request)
        rollouts.logprobs_B_K[0, 2] += 0.01
        return rollouts


@pytest.mark.parametrize("engine", [WrongTokens, WrongLogprobs])
def test_a_wrong_engine_is_refused(bench, engine):
    models, rollouts = bench("rollout_models"), bench("bench_rollouts")
    model = models.make_model("tiny", "cpu", torch.float32)
    prompts = models.make_prompts(model, 3, 6, is_ragged=True)
    assert rollouts.gate(model, prompts, 5, InProcessBackend(), "float32")["rows_equal_to_generate"] == 1
    with pytest.raises(AssertionError, match="log-probs off by"):
        rollouts.gate(model, prompts, 5, engine(), "float32")


def test_generate_that_stops_early_is_no_result(bench, monkeypatch):
    models, rollouts = bench("rollout_models"), bench("bench_rollouts")
    model = models.make_model("tiny", "cpu", torch.float32)
    prompts = models.make_prompts(model, 2, 4, is_ragged=False)
    run = rollouts.generate_run(model, prompts, 5, None)
    assert run().shape == (2, 9)
    monkeypatch.setattr(model, "generate", lambda ids, **_: torch.zeros(2, 7))
    with pytest.raises(RuntimeError, match="generate gave 7 columns"):
        run()


def test_a_selection_of_implementations(bench, tmp_path):
    rollouts, options = bench("bench_rollouts"), ["--smoke", "--out", str(tmp_path), "--only"]
    assert rollouts.main([*options, "generate"]) == 0
    rows = json.loads((tmp_path / "rollouts-tiny.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["generate"]
    with pytest.raises(ValueError, match="--only must name some of ours, .*, got theirs"):
        rollouts.main([*options, "theirs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--smoke", "--out", "bench/results/x"], "--out must not be under bench/results with --smoke")],
)
def test_wrong_options(bench, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench("bench_rollouts").main(arguments)
    assert message in capsys.readouterr().err
