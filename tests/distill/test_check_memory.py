"""Is the estimate of `check` the sum of what shapes say?  pytest tests/distill/test_check_memory.py"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import make_model, write_prompts
from varlen_double import VarlenDouble

from esr_distill.checks.memory import (
    GIB,
    compare_memory,
    estimate_memory,
    forward_bytes,
    memory_finding,
    tokens_read,
)
from esr_distill.checks.planned_launch import PlannedLaunch
from esr_distill.checks.weight_memory import GatheredWeights, shard_bytes
from esr_distill.config import DevicesConfig, LossConfig, MonitoringConfig, OptimizerConfig, RolloutConfig, TrainConfig
from esr_distill.packed_attention import Packing, set_packing
from esr_distill.prompts import PromptStream, next_prompt_batch
from esr_distill.training_run import TrainingRun, prepare_run


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def tiny_run(**changed) -> SimpleNamespace:
    return SimpleNamespace(
        student=make_model(0), device=torch.device("cpu"), autocast=changed.get("autocast", nullcontext)
    )


def test_what_a_forward_keeps_by_hand():
    """Llama of 2 layers: D 32, MLP 64, 4 heads and 2 key heads of 8, float32. A norm keeps its input twice and a float32; each
    product its input, once for all that read it; attention queries, keys, values, output and a float32 a head; the MLP the gate
    before and after its activation, the other branch and their product; rotations are two tensors of a head's size."""
    norm = 2 * 32 * 4 + 4
    layer = 2 * norm + 2 * 32 * 4 + (4 + 2 + 2 + 4) * 8 * 4 + 4 * 4 + 4 * 64 * 4
    assert forward_bytes(tiny_run()) == (2 * layer + norm + 2 * 8 * 4 + 8, 0)


def test_copies_of_weights_under_autocast_do_not_grow_with_tokens():
    run = tiny_run(autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    per_token, once = forward_bytes(run)
    assert once == 2 * 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # the matrices of two layers in 16 bits
    assert 0 < per_token < forward_bytes(tiny_run())[0]


def test_the_stages_by_hand(tmp_path, console):
    config = tiny_config(
        tmp_path, rollout=RolloutConfig(horizon=5, batch_size=4, top_p=1.0), loss=LossConfig(prefix_tokens=3)
    )
    run = prepare_run(
        replace(config, monitoring=MonitoringConfig(probe_every=2, probe_prompts=3, probe_tokens=9)), console
    )
    stages = estimate_memory(run).stages
    count, longest = sum(p.numel() for p in make_model(0).parameters()), run.prompts.longest
    per_token = forward_bytes(tiny_run())[0]
    always = {"student weights": 4 * count, "teacher weights": 4 * count, "moments": 8 * count}
    cache = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head size, bytes
    tokens = 4 * (longest + 5)
    hidden = 32 * 4
    assert stages["rollout"] == always | {"KV cache": tokens * cache, "logits that are drawn from": 8 * 4 * 19}
    assert stages["update"] == always | {
        "KV cache": tokens * cache,
        "gradients": 4 * count,
        "kept for backward": tokens * per_token,
        "teacher's forward": tokens * (2 * hidden + 3 * 64 * 4),
        "hidden states": 2 * hidden * (tokens + 12),
        "divergence": 14 * 12 * 19 * 4,
    }
    assert stages["optimizer"] == always | {"KV cache": tokens * cache, "gradients": 4 * count, "temporary": 4 * count}
    assert stages["probe"]["KV cache of the probe"] == 3 * (longest + 9) * cache
    assert estimate_memory(run).peak == max(sum(parts.values()) for parts in stages.values())


def test_a_step_in_parts_keeps_less_at_a_time(tmp_path, console):
    optimizer = OptimizerConfig(accumulation_steps=2)
    whole = estimate_memory(prepare_run(tiny_config(tmp_path), console)).stages
    parts = estimate_memory(prepare_run(tiny_config(tmp_path, optimizer=optimizer), console)).stages
    for name in ("kept for backward", "teacher's forward", "hidden states", "divergence"):
        assert 2 * parts["update"][name] == whole["update"][name]
    assert parts["rollout"] == whole["rollout"] and parts["optimizer"] == whole["optimizer"]


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(tmp_path, console):
    config = tiny_config(tmp_path)
    plain = estimate_memory(prepare_run(config, console)).stages["update"]["kept for backward"]
    again = prepare_run(replace(config, model=replace(config.model, gradient_checkpointing=True)), console)
    tokens = 4 * (again.prompts.longest + 5)
    per_token = forward_bytes(tiny_run())[0]
    assert (
        estimate_memory(again).stages["update"]["kept for backward"] == tokens * (per_token // 2 + 2 * 32 * 4) < plain
    )


def test_an_adapter_has_small_moments(tmp_path, console):
    pytest.importorskip("peft", reason="peft is optional")
    config = tiny_config(tmp_path)
    lora = replace(config.model.lora, use_peft=True, lora_r=2)
    model = replace(config.model, lora=lora, teacher="self")
    run = prepare_run(replace(config, model=model), console)
    parts = estimate_memory(run).stages["optimizer"]
    trained = sum(p.numel() for p in run.student.parameters() if p.requires_grad)
    assert parts["moments"] == 2 * 4 * trained < parts["student weights"]
    assert parts["teacher weights"] == 0


# Several processes

# Numbers of weights, counted by hand. The student: 19 ids, D 32, MLP 64, 4 heads and 2 key heads of 8; two layers of queries,
# keys, values, output, MLP and two norms; embeddings and a norm are the rest of its body; a head of its own.
REST, HEAD = 19 * 32 + 32, 19 * 32
LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32 + 2 * 32
STUDENT = REST + 2 * LAYER + HEAD
# Of three processes the first has 7 of 19 rows, 11 of 32, 6 of 16, 22 of 64.
LAYER_OF_THREE = 11 * 32 + 2 * 6 * 32 + 11 * 32 + 2 * 22 * 32 + 11 * 64 + 2 * 11
STUDENT_OF_THREE = 7 * 32 + 11 + 2 * LAYER_OF_THREE + 7 * 32
# The teacher: three layers with an MLP of 48, whose first process has 16 rows of the 48.
TEACHER_LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32
TEACHER = REST + 3 * TEACHER_LAYER + HEAD
TEACHER_LAYER_OF_THREE = 11 * 32 + 2 * 6 * 32 + 11 * 32 + 2 * 16 * 32 + 11 * 48 + 2 * 11
TEACHER_OF_THREE = 7 * 32 + 11 + 3 * TEACHER_LAYER_OF_THREE + 7 * 32


def config_of_three(folder, **groups) -> TrainConfig:
    """Two of six rollouts for each of three processes, one of them at a time."""
    config = tiny_config(
        folder,
        rollout=RolloutConfig(horizon=5, batch_size=6, top_p=1.0),
        optimizer=OptimizerConfig(accumulation_steps=2),
        **groups,
    )
    make_model(1, num_hidden_layers=3, intermediate_size=48).save_pretrained(folder / "teacher")
    return config


def of_three(**options) -> PlannedLaunch:
    return PlannedLaunch(3, DevicesConfig(**options))


def test_a_process_has_its_part_of_the_rollouts(tmp_path, console):
    run = prepare_run(config_of_three(tmp_path), console)
    one, stages = estimate_memory(run).stages, estimate_memory(run, of_three()).stages
    weights = {"student weights": 4 * STUDENT, "teacher weights": 4 * TEACHER, "moments": 8 * STUDENT}
    cache = (
        2 * (run.prompts.longest + 5) * 2 * 2 * 2 * 8 * 4
    )  # rows, tokens, layers, keys and values, heads, size, bytes
    assert stages["rollout"] == weights | {"KV cache": cache, "logits that are drawn from": 8 * 2 * 19}
    assert stages["optimizer"] == weights | {"KV cache": cache, "gradients": 4 * STUDENT, "temporary": 4 * STUDENT}
    for name in ("KV cache", "kept for backward", "teacher's forward", "hidden states", "divergence"):
        assert 3 * stages["update"][name] == one["update"][name] > 0
    assert stages["update"]["divergence"] == 14 * 1 * 5 * 19 * 4
    assert stages.keys() == {"rollout", "update", "optimizer"} and stages["update"].keys() == one["update"].keys()


@pytest.mark.parametrize("shard", ["student", "both"])
@pytest.mark.parametrize("reshard", [True, False])
def test_shards_by_hand(tmp_path, console, shard, reshard):
    run = prepare_run(config_of_three(tmp_path, monitoring=MonitoringConfig(probe_every=2, probe_tokens=9)), console)
    stages = estimate_memory(run, of_three(shard=shard, reshard_after_forward=reshard)).stages
    is_both = shard == "both"
    always = {
        "student weights": 4 * STUDENT_OF_THREE,
        "teacher weights": 4 * (TEACHER_OF_THREE if is_both else TEACHER),
        "moments": 8 * STUDENT_OF_THREE,
        "KV cache": 2 * (run.prompts.longest + 5) * 2 * 2 * 2 * 8 * 4,
    }
    teacher = {
        "teacher's gathered layers": 4 * (REST + 2 * TEACHER_LAYER),
        "teacher's whole output head": 4 * HEAD,
    }
    logits = {"logits that are drawn from": 8 * 2 * 19}
    assert stages["rollout"] == always | {"whole student": 4 * STUDENT} | logits
    assert stages["saving"] == always | {"whole student": 4 * STUDENT, "whole moments": 8 * STUDENT}
    shards = 4 * STUDENT_OF_THREE
    assert stages["optimizer"] == always | {"gradients": shards, "temporary": shards}
    tokens = run.prompts.longest + 5
    assert stages["update"] == always | (teacher if is_both else {}) | {
        # a student of two layers has both of them whole at a time in any case
        "student's gathered layers": 4 * (REST + 2 * LAYER),
        "student's whole output head": 4 * HEAD,
        "gradients not yet in shards": 4 * (2 * LAYER + HEAD),
        "gradients": shards,
        "kept for backward": tokens * forward_bytes(tiny_run())[0],
        "teacher's forward": tokens * (2 * 128 + 3 * 48 * 4),
        "hidden states": 2 * 128 * (tokens + 5),
        "divergence": 14 * 5 * 19 * 4,
    }
    probe = stages["probe"]
    assert probe["whole student"] == 4 * STUDENT and (teacher.items() <= probe.items()) is is_both
    # of 16 answers a process has 6, of which it draws the 2 that it draws in a step
    assert probe["KV cache of the probe"] == 2 * (run.prompts.longest + 9) * 2 * 2 * 2 * 8 * 4


def test_gathered_weights_of_a_deeper_body():
    """Four layers of which two are whole at a time, or all of them where they stay. Tied, embeddings and head are one weight."""
    model = make_model(0, num_hidden_layers=4)
    assert GatheredWeights.of(model) == GatheredWeights(
        all=4 * (REST + 4 * LAYER + HEAD), layers=4 * (REST + 2 * LAYER), gradients_in_sum=4 * 2 * LAYER, head=4 * HEAD
    )
    assert GatheredWeights.of(model, stays=True).layers == 4 * (REST + 4 * LAYER)
    tied = make_model(0, num_hidden_layers=4, tie_word_embeddings=True, vocab_size=1001).bfloat16()
    rest = 1001 * 32 + 32
    assert GatheredWeights.of(tied) == GatheredWeights(
        all=2 * (rest + 4 * LAYER),
        layers=2 * (rest + 2 * LAYER),
        gradients_in_sum=2 * 2 * rest,
        head=2 * 1001 * 32,
    )


@pytest.mark.parametrize(
    ("shape", "processes", "rows"), [((7, 5), 2, 4), ((7, 5), 8, 1), ((6, 5), 3, 2), ((5, 5), 1, 5)]
)
def test_the_first_process_has_most_rows(shape, processes, rows):
    assert shard_bytes([torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)], processes) == rows * 5 * (4 + 2)


# Packed rows


def packed_run(folder, monkeypatch, *, count: int, batch_size: int, samples: int) -> TrainingRun:
    """A run on prompts of 3, 5, 7, ... tokens with their <bos>, whose student's rows are packed and whose teacher's are not."""
    VarlenDouble().install(monkeypatch)
    rollout = RolloutConfig(horizon=5, batch_size=batch_size, samples_per_prompt=samples, top_p=1.0)
    config = tiny_config(folder, rollout=rollout)
    write_prompts(folder / "prompts.jsonl", texts=["1+" * terms + "2=" for terms in range(count)])
    run = prepare_run(config, Console(quiet=True))
    set_packing(run.student, Packing.VARLEN, "model.student")
    return run


def test_packed_rows_have_no_padding(tmp_path, monkeypatch):
    run = packed_run(tmp_path, monkeypatch, count=8, batch_size=8, samples=2)
    read, padded = tokens_read(run, run.student, 8), tokens_read(run, run.teacher, 8)
    assert read == 2 * (11 + 13 + 15 + 17) + 8 * 5 and padded == 8 * (17 + 5)
    for step in range(6):  # each prompt three times
        mask_B_P = next_prompt_batch(run.prompts, 8, step, seed=3, samples_per_prompt=2).prompt_mask_B_P
        assert mask_B_P.sum() + 8 * 5 <= read
    update = estimate_memory(run).stages["update"]
    assert update["hidden states"] == 128 * (read + 40 + padded + 40)
    assert update["teacher's forward"] == padded * (2 * 128 + 3 * 64 * 4)
    assert update["kept for backward"] == read * forward_bytes(run)[0]


def test_a_batch_of_more_prompts_than_there_are(tmp_path, monkeypatch):
    run = packed_run(tmp_path, monkeypatch, count=3, batch_size=4, samples=1)
    assert tokens_read(run, run.student, 4) == (7 + 5 + 3 + 7) + 4 * 5


def test_prompts_of_a_stream_are_taken_for_padded(tmp_path, monkeypatch):
    run = packed_run(tmp_path, monkeypatch, count=4, batch_size=4, samples=1)
    stream = replace(run, prompts=object.__new__(PromptStream))
    stream.prompts._longest = 11
    assert tokens_read(stream, run.student, 4) == 4 * (11 + 5)
    estimate = estimate_memory(run)
    words = "what packing saves (how long the prompts of a stream will be cannot be known)"
    assert words in memory_finding(stream, estimate).message and words not in memory_finding(run, estimate).message


# The finding


def test_the_finding_says_whose_estimate_it_is_and_what_is_left_out(tmp_path, console):
    run = prepare_run(config_of_three(tmp_path), console)
    launch = of_three(shard="both")
    finding = memory_finding(run, estimate_memory(run, launch), launch)
    assert finding.message.startswith("an estimate for each of 3 processes (devices.shard both): rollout 0.00 GiB, ")
    assert "; not counted: loading, evaluation; no CUDA device to compare with" in finding.message
    assert (finding.values["processes"], finding.values["shard"]) == (3, "both")
    alone = memory_finding(run, estimate_memory(run))
    assert alone.message.startswith("an estimate for a run of one process: ") and alone.values["processes"] == 1


def test_other_devices_cannot_be_known(tmp_path, console, monkeypatch):
    run = prepare_run(config_of_three(tmp_path), console)
    estimate = estimate_memory(run, of_three())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    on_gpu = replace(run, device=torch.device("cuda"))
    words = "whether the other processes' devices are like this one cannot be known here; of 7.00 GiB that are free"
    assert words in memory_finding(on_gpu, estimate, of_three()).message
    assert "cannot be known" not in memory_finding(on_gpu, estimate).message


@pytest.mark.parametrize(("peak", "level"), [(8 * GIB, "ok"), (9.5 * GIB, "warning"), (10.5 * GIB, "error")])
def test_the_estimate_against_what_is_free(peak, level):
    finding = compare_memory("an estimate", "update", int(peak), 10 * GIB, {})
    assert finding.level == level and "of 10.00 GiB that are free" in finding.message
    assert level == "ok" or "in the stage update" in finding.fix
