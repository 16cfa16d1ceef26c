"""Do several processes, accumulated parts and shards train the student that one process trains?"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from process_scenarios import BODIES, LOSSES, run_scenarios
from rich.console import Console
from safetensors.torch import load_file
from small_runs import make_folder, small_config
from transformers import AutoModelForCausalLM

from esr_distill.config import LossConfig, OptimizerConfig
from esr_distill.metrics import read_metrics
from esr_distill.train import train

HERE = Path(__file__).parent
EXACT = 1e-12  # of float64 gradients, whose sums are taken in another order
ROUNDED = 1e-6  # where they are scaled elsewhere: the norms of transformers' layers compute in float32


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def process_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the scenarios left, in one process and in two."""
    folder = tmp_path_factory.mktemp("devices")
    make_folder(folder)
    names = ["losses", "empty", "whole_run", "sharded", "sharded_bodies", "sharded_loading", "divided", "served"]
    try:
        import peft  # noqa: F401

        names.append("adapter")
    except ImportError:
        pass
    arguments = ["--standalone", "--nproc_per_node", "2"]
    several = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments, HERE / "process_scenarios.py", folder, *names],
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        run_scenarios(folder, names)
        output, _ = several.communicate(timeout=240)
    finally:
        several.terminate()
    assert several.returncode == 0, output[-6000:]
    return folder


def found(folder: Path, scenario: str, rank: int, world_size: int) -> dict:
    return torch.load(folder / f"{scenario}-{rank}-of-{world_size}.pt", weights_only=False)


def losses_of(run_folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_folder / "metrics.jsonl", "step")]


def without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if "second" not in name}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_depend_on_neither_processes_nor_parts(folder, name):
    """Uneven rollouts; rules on scores keep other numbers of tokens in each part."""
    one, two = found(folder, "losses", 0, 1), found(folder, "losses", 0, 2)
    expected = one[name, 1]
    assert expected["record"]["mean_length"] < expected["record"]["longest_rollout"]
    others = [one[key] for key in one if key[0] == name and key[1] > 1] + [two[key] for key in two if key[0] == name]
    assert len(others) >= 3
    for other in others:
        for gradient, wanted in zip(other["gradients"], expected["gradients"], strict=True):
            assert (gradient - wanted).norm() <= EXACT * wanted.norm()
        assert other["record"]["loss"] == pytest.approx(expected["record"]["loss"], rel=EXACT)


def test_each_normaliser_divides_by_what_the_whole_step_has(folder):
    """8 rollouts; `fixed` divides by 7.5, so 7.5 times its loss is the sum of all divergences."""
    for step in (found(folder, "losses", 0, 1), found(folder, "losses", 1, 2)):
        for parts in (1, 2):
            total = 7.5 * step["fixed", parts]["record"]["loss"]
            tokens = step["token_mean", parts]["record"]["trained_tokens"]
            assert step["token_mean", parts]["record"]["loss"] == pytest.approx(total / tokens, rel=1e-9)
            assert step["sum", parts]["record"]["loss"] == pytest.approx(total / 8, rel=1e-9)
            few = step["token_mean of the highest", parts]["record"]
            assert few["trained_tokens"] == 8 * 3 < few["scored_tokens"]


def test_gradients_are_divided_by_what_is_kept(folder):
    """Every rollout keeps three tokens, so the mean over tokens is that over rollouts; and `fixed` divides by 7.5."""
    for step in (found(folder, "losses", 0, 1), found(folder, "losses", 0, 2)):
        for parts in (1, 2):
            of_tokens, of_rollouts = (
                step[f"{name} of the highest", parts]["gradients"] for name in ("token_mean", "sequence_mean")
            )
            for gradient, wanted in zip(of_tokens, of_rollouts, strict=True):
                assert (gradient - wanted).norm() <= ROUNDED * wanted.norm()
            kept = step["token_mean of the sure", parts]["record"]["trained_tokens"]
            assert 0 < kept < step["token_mean of the sure", parts]["record"]["scored_tokens"]
            of_tokens, fixed = (step[f"{name} of the sure", parts]["gradients"] for name in ("token_mean", "fixed"))
            for gradient, wanted in zip(of_tokens, fixed, strict=True):
                assert (gradient * kept - wanted * 7.5).norm() <= ROUNDED * (wanted * 7.5).norm()


def test_every_process_has_the_same_gradients_and_the_metrics_of_all(folder):
    one, two = found(folder, "losses", 0, 1), [found(folder, "losses", rank, 2) for rank in (0, 1)]
    for key in two[0]:
        assert all(map(torch.equal, two[0][key]["gradients"], two[1][key]["gradients"]))
        assert two[0][key]["record"] == two[1][key]["record"]
        expected, record = (without_times(step[key]["record"]) for step in (one, two[0]))
        assert record.keys() == expected.keys()
        for name, value in expected.items():
            assert record[name] == (
                value if isinstance(value, (str, int, type(None))) else pytest.approx(value, rel=1e-9)
            ), name


def test_a_process_without_a_token_to_train_adds_nothing(folder):
    one, two = found(folder, "empty", 0, 1), [found(folder, "empty", rank, 2) for rank in (0, 1)]
    assert 0 < one["record"]["trained_tokens"] < one["record"]["response_tokens"]
    for other in two:
        assert other["record"]["trained_tokens"] == one["record"]["trained_tokens"]
        for gradient, wanted in zip(other["gradients"], one["gradients"], strict=True):
            assert (gradient - wanted).norm() <= EXACT * wanted.norm()


def test_two_processes_train_the_student_of_one(folder):
    losses = losses_of(folder / "whole-1")
    assert len(losses) == 4
    assert losses_of(folder / "whole-2") == pytest.approx(losses, rel=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_run_goes_on_exactly(folder):
    for rank in (0, 1):
        result = found(folder, "whole_run", rank, 2)
        assert not result["first"].finished and result["first"].step == 2
        assert result["stopped_with"] == ["checkpoint-000002"]
        assert result["second"].finished and result["second"].step == 4
    assert losses_of(folder / "halted") == losses_of(folder / "whole-2")
    whole, halted = (load_file(folder / name / "checkpoint-000004/model.safetensors") for name in ("whole-2", "halted"))
    assert whole.keys() == halted.keys() and all(torch.equal(whole[name], halted[name]) for name in whole)


def test_dropout_differs_by_process_and_goes_on_exactly(folder):
    pytest.importorskip("peft")
    states = [found(folder, "adapter", rank, 2) for rank in (0, 1)]
    assert not torch.equal(states[0]["state"], states[1]["state"])
    for state in states:
        assert torch.equal(state["state"], state["resumed_state"])
    losses = losses_of(folder / "adapter-whole-2")
    assert len(losses) == 4 and losses[-1] > 0
    assert losses_of(folder / "adapter-halted-2") == losses


@pytest.mark.parametrize("shard", ["student", "both", "kept"])
def test_shards_train_the_student_of_one_process(folder, shard):
    """`both` has a tied head, layers that are computed again, and a teacher that reads prompts early; `student` has two
    parts. The sharded run was stopped after step 2 and went on."""
    one, two = folder / f"sharded-{shard}-1", folder / f"sharded-{shard}-2"
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    for kind in ("evaluation", "probe"):
        expected, records = read_metrics(one / "metrics.jsonl", kind), read_metrics(two / "metrics.jsonl", kind)
        assert [r["step"] for r in records] == [r["step"] for r in expected] and len(records) > 1
        assert [r["mean_length"] for r in records] == [r["mean_length"] for r in expected]
        name = "accuracy" if kind == "evaluation" else "divergence"
        assert [r[name] for r in records] == pytest.approx([r[name] for r in expected], rel=1e-5)
    samples = [(run / "samples.jsonl").read_text().splitlines() for run in (one, two)]
    texts = [[(json.loads(line)["prompt"], json.loads(line)["rollout"]) for line in lines] for lines in samples]
    assert texts[0] == texts[1] and len(texts[0]) == 3 * 8


@pytest.mark.parametrize("shard", ["none", "both"])
def test_replies_of_an_evaluation_are_divided_and_those_of_one_process(folder, shard):
    """Five problems, three samples each: the second process has two, and begins again at the first one."""
    one = found(folder, "divided", 0, 1)["none"]
    assert len({reply.text for reply in one["replies"]}) == 15 == len(one["requests"])
    assert 0 < one["accuracy"]["accuracy"] < one["accuracy"]["estimates"]["pass@3"]["value"] < 1
    for rank, problems in enumerate([(0, 1, 2), (3, 4, 0)]):
        two = found(folder, "divided", rank, 2)[shard]
        assert sorted(two["requests"]) == sorted(
            problem + sample * 2**32 for problem in problems for sample in range(3)
        )
        assert two["replies"] == one["replies"] and two["accuracy"] == one["accuracy"]


@pytest.mark.parametrize("shard", ["none", "both"])
@pytest.mark.parametrize(("count", "shares"), [(5, [[0, 1, 2], [3, 4, 0]]), (3, [[0, 1], [2, 0]]), (1, [[0], [0]])])
def test_a_probe_is_divided_and_its_record_that_of_one_process(folder, shard, count, shares):
    """All processes ask the teacher equally often: where it is in shards, each of its forwards is a meeting."""
    expected, requests, calls = found(folder, "divided", 0, 1)["none"]["probes"][count]
    assert requests == [2**62 + place for place in range(count)] and calls == count == expected["prompts"]
    for rank in (0, 1):
        record, requests, calls = found(folder, "divided", rank, 2)[shard]["probes"][count]
        assert requests == [2**62 + place for place in shares[rank]] and calls == len(shares[0])
        record, wanted = without_times(record), without_times(expected)
        assert record.keys() == wanted.keys() and wanted["tokens_behind"] > 0
        for name, value in wanted.items():
            is_sum = "divergence" in name or "entropy" in name
            assert record[name] == (pytest.approx(value, rel=1e-6) if is_sum else value), name


@pytest.mark.parametrize("body", BODIES)
def test_bodies_of_many_kinds_in_shards(folder, body):
    for rank in (0, 1):
        result = found(folder, "sharded_bodies", rank, 2)[body]
        assert result["is_copy"] and result["is_empty"]
        scale = max(gradient.norm() for gradient in result["plain"].values())
        for name, wanted in result["plain"].items():
            # a bias of keys has no gradient but rounding
            assert (result["shards"][name] - wanted).norm() <= 2e-6 * max(wanted.norm(), 1e-3 * scale), name


@pytest.mark.parametrize("shard", ["student", "both", "kept"])
def test_a_checkpoint_of_shards_is_one_of_a_single_process(folder, shard):
    one, two = (folder / f"sharded-{shard}-{count}" / "checkpoint-000003" for count in (1, 2))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, two)]
    for name, value in models[0].items():
        assert (models[1][name] - value).norm() <= 1e-4 * value.norm()
    states = [torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["state"] for path in (one, two)]
    assert states[0].keys() == states[1].keys()
    for index, entry in states[0].items():
        assert states[1][index]["step"] == entry["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert (states[1][index][name] - entry[name]).norm() <= 1e-4 * entry[name].norm()


def test_a_vllm_server_draws_for_all_processes_what_it_draws_for_one(folder):
    one, *two = found(folder, "served", 0, 1), found(folder, "served", 0, 2), found(folder, "served", 1, 2)
    assert one["loaded"] == two[0]["loaded"] > 2
    distinct = [{(tuple(prompt), tuple(ids)) for prompt, ids in side["drawn"]} for side in (one, two[0])]
    assert distinct[0] == distinct[1] and len(distinct[0]) > 20
    assert losses_of(folder / "served-2") == pytest.approx(losses_of(folder / "served-1"), rel=1e-5)
    for side in (one, *two):
        assert "must accept POST /v1/completions, got status 503 (busy)" in side["error"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_teacher_that_one_process_reads_is_in_shards_in_all(folder, rank):
    models = dict(found(folder, "sharded_loading", rank, 2))
    assert models.pop("error") == "model.teacher must be there, got none"
    assert set(models) == set(BODIES)
    for model in models.values():
        assert model["same"] and model["names"] and model["frozen"] and model["is_in_shards"]
        assert torch.equal(*model["hidden"])
        (mine, its) = model["head"]
        assert torch.equal(mine.weight, its.weight) and mine.softcap == its.softcap


def test_one_process_goes_on_where_shards_stopped(folder, tmp_path):
    """A fourth step after the third of one process, and after that of two with shards."""
    losses = []
    for count in (1, 2):
        shutil.copytree(folder / f"sharded-student-{count}", tmp_path / str(count))
        config = small_config(
            folder,
            "unused",
            optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.1),
            loss=LossConfig(normalizer="token_mean"),
        )
        run = replace(config.run, steps=4, output_dir=str(tmp_path / str(count)))
        train(replace(config, run=run), Console(quiet=True), resume=True)
        losses.append(losses_of(tmp_path / str(count)))
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("scenario", "status", "error"), [("dies", 9, ""), ("fails", 1, "FloatingPointError: only here")]
)
def test_when_a_process_dies_or_fails_the_others_end_with_an_error(folder, scenario, status, error):
    """In a step, or in its share of the probe. No launcher here, which would end them itself."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "process_scenarios.py", folder, scenario],
            env=process_environment(**address, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[1].returncode == status and error in errors[1]
    assert processes[0].returncode not in (0, 9)
    assert "Error" in errors[0]
    assert len(losses_of(folder / scenario)) == 1 and not list((folder / scenario).glob("checkpoint-*"))
