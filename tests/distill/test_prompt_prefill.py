"""Does a teacher that reads prompts early score responses as it does otherwise?  pytest tests/distill/test_prompt_prefill.py"""

import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_train import losses, tiny_config
from tiny_models import BOS, EOS, make_model, make_prompt_batch, make_rollouts
from transformers import Gemma2Config, LlamaConfig, MambaConfig, Qwen3Config

from esr_distill.config import RunConfig
from esr_distill.hidden_states import last_hidden_states
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.train import train

PROMPTS = [[BOS, 5, 13, 7, 14, 9, 15], [BOS, 4], [BOS]]
RESPONSES = [[6, 7, 8, EOS], [5, 5, 9, 12], [EOS]]


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, Gemma2Config])
@pytest.mark.parametrize("samples", [1, 2])
def test_hidden_states_are_those_of_the_whole_rollout(config_class, samples):
    options = {"sliding_window": 4, "query_pre_attn_scalar": 8} if config_class is Gemma2Config else {}
    model, counts = make_model(3, config_class, **options), []
    prompts = [prompt for prompt in PROMPTS for _ in range(samples)]
    responses = [RESPONSES[i % 3] for i in range(len(prompts))]
    rollouts = make_rollouts(prompts, responses)
    expected = last_hidden_states(model, rollouts).detach()

    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prefill = PromptPrefill.start(model, make_prompt_batch(prompts, samples_per_prompt=samples), None)
    hidden = last_hidden_states(model, rollouts, prefill)
    assert counts == [(3, 7), (3 * samples, 4)]
    real = rollouts.attention_mask_B_T.bool()
    torch.testing.assert_close(hidden[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not hidden.requires_grad


def test_training_gives_the_same_losses(tmp_path):
    config, found = tiny_config(tmp_path), []
    for is_early in (False, True):
        rollout = replace(config.rollout, overlap_teacher=is_early)
        run = replace(config, rollout=rollout, run=RunConfig(output_dir=str(tmp_path / str(is_early)), steps=3))
        train(run, Console(quiet=True))
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-4) and len(found[0]) == 3


def test_the_time_of_the_prefill_is_part_of_the_step(tmp_path, monkeypatch):
    """On a CPU nothing overlaps: a slow teacher must show in the rollout's seconds."""
    start = PromptPrefill.start.__func__

    def slow(cls, *arguments):
        time.sleep(0.3)
        return start(cls, *arguments)

    monkeypatch.setattr(PromptPrefill, "start", classmethod(slow))
    config = tiny_config(tmp_path)
    rollout = replace(config.rollout, overlap_teacher=True)
    run = replace(config, rollout=rollout, run=RunConfig(output_dir=str(tmp_path / "run"), steps=1))
    train(run, Console(quiet=True))
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "step")
    assert record["seconds"] > 0.3


def test_a_teacher_without_a_cache_is_refused_by_name():
    model = make_model(0, MambaConfig, state_size=4, conv_kernel=2, expand=2, time_step_rank=2)
    with pytest.raises(
        InputError, match="rollout.overlap_teacher must be false for a teacher without a KV cache, got Mamba"
    ):
        PromptPrefill.start(model, make_prompt_batch(PROMPTS), None)
