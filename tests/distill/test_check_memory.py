"""Is the estimate of `check` the sum of what shapes say?  pytest tests/distill/test_check_memory.py"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import make_model

from esr_distill.checks.memory import GIB, compare_memory, estimate_memory, forward_bytes
from esr_distill.config import LossConfig, MonitoringConfig, OptimizerConfig, RolloutConfig
from esr_distill.training_run import prepare_run


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


@pytest.mark.parametrize(("peak", "level"), [(8 * GIB, "ok"), (9.5 * GIB, "warning"), (10.5 * GIB, "error")])
def test_the_estimate_against_what_is_free(peak, level):
    finding = compare_memory("an estimate", "update", int(peak), 10 * GIB, {})
    assert finding.level == level and "of 10.00 GiB that are free" in finding.message
    assert level == "ok" or "in the stage update" in finding.fix
