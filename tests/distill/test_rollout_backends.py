"""Do all ways of drawing rollouts give the same tokens, and does the in-process one hold in segments, graphs and odd models?

pytest tests/distill/test_rollout_backends.py
"""

import re
from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny_models import BOS, EOS, PAD, VOCAB_SIZE, make_model, make_prompt_batch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from esr_distill.config import RolloutConfig
from esr_distill.input_error import InputError
from esr_distill.rollout import GREEDY, InProcessBackend, SamplerSettings, generate_rollouts
from esr_distill.rollout.choose_backend import make_backend
from esr_distill.rollout.decode_attention import decode_sdpa
from esr_distill.rollout.hf_generate import HFGenerateBackend
from esr_distill.rollout.vllm_server import VllmServerBackend

RAGGED = [[BOS, 5, 13, 7, 14, 9, 15], [BOS, 4], [BOS], [BOS, 8, 8, 13, 3, 15], [BOS, 12, 14, 11, 15]]
RAGGED += [[BOS, 3, 3, 3, 3], [BOS, 17, 16], [BOS, 6, 7, 8, 9, 10, 11, 12]]
EOS_IDS = (EOS, 5)
ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "mistral with a window": (MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2 with windows": (Gemma2Config, {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3 with windows": (
        Gemma3TextConfig,
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
SAMPLED = SamplerSettings(sampling_temperature=0.8, top_k=9, top_p=0.95)


def replayed(step, pool):
    """In place of a captured graph: a call that does what the step does, and no more than its graph could."""
    return step


BACKENDS = {
    "in process": lambda: InProcessBackend(),
    "as with graphs": lambda: InProcessBackend(capture=replayed),
    "short segments": lambda: InProcessBackend(steps_per_segment=3),
    "short segments with graphs": lambda: InProcessBackend(steps_per_segment=3, capture=replayed),
    "compiled": lambda: InProcessBackend(compile_backend="eager"),
}


def roll_out(model, prompts=RAGGED, backend=None, samples_per_prompt=1, **changed):
    options = {"horizon": 12, "sampler": GREEDY, "eos_ids": EOS_IDS, "pad_id": PAD, "seed": 7} | changed
    rows = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    batch = make_prompt_batch(rows, samples_per_prompt=samples_per_prompt)
    return generate_rollouts(model, batch, backend=backend, **options)


def assert_same_rollouts(one, other, *, atol=1e-5):
    for name in ("token_ids_B_T", "attention_mask_B_T", "response_lengths_B", "stopped_by_eos_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("logprobs_B_K", "sampling_logprobs_B_K"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("batch_size", "horizon"), [(1, 100), (3, 2), (8, 1), (8, 100)])
def test_greedy_equals_generate_token_for_token(name, batch_size, horizon):
    """The expectation is transformers' own loop with a growing cache; log-probs are of its logits."""
    config_class, options = ARCHITECTURES[name]
    model = make_model(3, config_class, **options)
    asked = {"prompts": RAGGED[:batch_size], "horizon": horizon}
    expected = roll_out(model, backend=HFGenerateBackend(), **asked)
    for backend in ("in process", "as with graphs"):
        assert_same_rollouts(roll_out(model, backend=BACKENDS[backend](), **asked), expected)
    if (batch_size, horizon) == (8, 100):
        assert expected.response_lengths_B.min() < 100
        assert len(expected.response_ids_B_K.unique()) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ways_to_run_the_same_rollouts_give_the_same_tokens(backend):
    """Sampled; rows that end early leave the batch between segments, and the batch ends where all have ended."""
    model = make_model(2)
    expected = roll_out(model, sampler=SAMPLED, horizon=60, backend=InProcessBackend(steps_per_segment=1000))
    lengths = expected.response_lengths_B
    assert lengths.min() < 10 < lengths.max() < 60  # so that there is something to leave
    assert_same_rollouts(roll_out(model, sampler=SAMPLED, horizon=60, backend=BACKENDS[backend]()), expected)


def test_rows_that_have_finished_leave_the_batch():
    model, batch_sizes = make_model(2), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: batch_sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    lengths = roll_out(
        model, sampler=SAMPLED, horizon=60, backend=InProcessBackend(steps_per_segment=3)
    ).response_lengths_B
    for step, batch_size in enumerate(batch_sizes):
        token = 3 * ((step - 1) // 3) + 1  # drawn before the segment of this step began
        running = int((lengths > token).sum()) if step else 8
        assert running <= batch_size
        assert step == 0 or batch_size == running or running > 0.75 * batch_size
    assert len(batch_sizes) == lengths.max()  # the step that finds out that all have ended is not made


def test_with_graphs_batch_sizes_are_halves():
    model, console = make_model(2), Console(file=StringIO(), width=200)
    backend = InProcessBackend(steps_per_segment=3, capture=replayed, console=console)
    roll_out(model, sampler=SAMPLED, horizon=60, backend=backend)
    captured = re.findall(r"captured for (\d+) rows and (\d+) columns", console.file.getvalue())
    assert {rows for rows, _ in captured} <= {"8", "4", "2", "1"} and len({rows for rows, _ in captured}) > 1
    assert captured[0] == ("8", "72")  # prompts end at column 64, a segment has 3 tokens, masks are padded to 8


@pytest.mark.parametrize("samples", [2, 4])
def test_samples_of_a_prompt_share_its_prefill_and_differ(samples):
    model, prefilled = make_model(2), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: prefilled.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = roll_out(model, RAGGED[:3], samples_per_prompt=samples, sampler=SAMPLED)
    assert prefilled[0] == (3, 7)
    rows = [prompt for prompt in RAGGED[:3] for _ in range(samples)]
    assert_same_rollouts(shared, roll_out(model, rows, sampler=SAMPLED))
    assert len({tuple(ids) for ids in shared.response_ids_B_K.tolist()}) > 3


def test_a_backend_is_used_again_with_other_prompts_weights_and_batch_sizes():
    """D2: what was left of the calls before does not show, and steps are captured again only when they must be."""
    console = Console(file=StringIO(), width=200)
    model, backend = make_model(2), InProcessBackend(capture=replayed, console=console)
    long = [[BOS, *[3 + i % 15 for i in range(70)]], [BOS, 4]]
    calls = [
        ({}, 1),
        ({"prompts": RAGGED[::-1], "seed": 8}, 0),  # the same shapes: nothing is captured
        ({"prompts": RAGGED[:3]}, 1),  # fewer rows
        ({"horizon": 7}, 1),
        ({"prompts": long}, 1),  # a larger cache
        ({}, 1),
        ({"eos_ids": (EOS,)}, 1),
    ]
    for changed, new in calls:
        console.file.truncate(0)
        rollouts = roll_out(model, sampler=SAMPLED, backend=backend, **changed)
        assert_same_rollouts(rollouts, roll_out(model, sampler=SAMPLED, **changed))
        assert console.file.getvalue().count("step captured") == new, changed

    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # as an optimizer does
    console.file.truncate(0)
    changed = roll_out(model, sampler=SAMPLED, backend=backend, eos_ids=(EOS,))
    assert "captured" not in console.file.getvalue()
    assert_same_rollouts(changed, roll_out(model, sampler=SAMPLED, eos_ids=(EOS,)))
    assert not torch.equal(changed.token_ids_B_T, rollouts.token_ids_B_T)
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())  # elsewhere
    again = roll_out(model, sampler=SAMPLED, backend=backend, eos_ids=(EOS,))
    assert "1 captured steps are dropped: shapes or weights' places changed" in console.file.getvalue()
    assert_same_rollouts(again, rollouts)


def test_released_memory_is_taken_again():
    model, backend = make_model(2), InProcessBackend(capture=replayed)
    first = roll_out(model, backend=backend)
    assert backend.cache.num_bytes == 2 * 2 * 8 * 2 * 80 * 8 * 4  # layers, k and v, rows, heads, columns, size, bytes
    backend.release()
    assert backend.cache is None and not backend.steps and not backend.rows
    assert_same_rollouts(roll_out(model, backend=backend), first)


def test_nan_of_one_rollout_does_not_reach_the_next():
    model, backend = make_model(2), InProcessBackend(capture=replayed)
    expected = roll_out(model, backend=backend)
    with torch.no_grad():
        before = model.model.layers[0].self_attn.v_proj.weight.clone()
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        roll_out(model, backend=backend, horizon=30, eos_ids=())
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.copy_(before)
    assert_same_rollouts(roll_out(model, backend=backend), expected)


def test_adapters_are_live():
    """LoRA weights are used as they are, switched off and on again, and dropout of the adapter is off."""
    from peft import LoraConfig, get_peft_model  # a machine that runs the GPU tests alone may lack it

    model = make_model(2)
    plain = roll_out(model, sampler=SAMPLED)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    torch.manual_seed(0)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    console = Console(file=StringIO(), width=200)
    backend = InProcessBackend(capture=replayed, console=console)
    with_adapter = roll_out(tuned, sampler=SAMPLED, backend=backend)
    assert tuned.training
    with tuned.disable_adapter():
        assert_same_rollouts(roll_out(tuned, sampler=SAMPLED, backend=backend), plain)
    assert_same_rollouts(roll_out(tuned, sampler=SAMPLED, backend=backend), with_adapter)
    assert console.file.getvalue().count("step captured") == 3  # a graph has the adapter's kernels in it or not
    merged = tuned.merge_and_unload()
    assert_same_rollouts(roll_out(merged, sampler=SAMPLED), with_adapter, atol=1e-4)
    assert not torch.equal(with_adapter.token_ids_B_T, plain.token_ids_B_T)


def test_gradient_checkpointing_on_the_model_changes_nothing():
    model = make_model(2)
    expected = roll_out(model, sampler=SAMPLED)
    model.train()
    newer = hasattr(model, "activation_checkpointing_enable")  # the name that transformers gives it from 5.2x on
    (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)()
    assert_same_rollouts(roll_out(model, sampler=SAMPLED), expected)
    assert model.training and model.model.gradient_checkpointing


@pytest.mark.parametrize("backend", ["in process", "as with graphs"])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_in_bfloat16_logprobs_are_those_of_a_training_forward(backend, is_autocast):
    """The cache is in bfloat16 too; what is off is one rounding of the largest logits, about 8."""
    model = make_model(5) if is_autocast else make_model(5).bfloat16()
    backend = BACKENDS[backend]()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        rollouts = roll_out(model, sampler=SamplerSettings(), backend=backend)
        for row, length in enumerate(rollouts.response_lengths_B.tolist()):
            ids = torch.cat([torch.tensor(RAGGED[row]), rollouts.response_ids_B_K[row, :length]])[None]
            with torch.no_grad():
                logits_T_V = model(ids).logits[0].float()[len(RAGGED[row]) - 1 : -1]
            expected = logits_T_V.log_softmax(-1).gather(1, ids[0, len(RAGGED[row]) :, None])[:, 0]
            torch.testing.assert_close(rollouts.logprobs_B_K[row, :length], expected, rtol=0, atol=0.1)
    assert {layer.keys.dtype for layer in backend.cache.layers} == {torch.bfloat16}


def test_eager_attention():
    model = make_model(3, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert_same_rollouts(roll_out(model), roll_out(model, backend=HFGenerateBackend()))


def test_a_model_with_learnt_positions_and_no_heads_shared():
    model = make_model(3, GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert_same_rollouts(roll_out(model), roll_out(model, backend=HFGenerateBackend()))


def test_decode_has_a_mask_where_the_model_has_flash_attention(monkeypatch):
    """The name alone: flash-attn needs a GPU. Prefill keeps it, decode does not, and it comes back."""
    model, seen = make_model(2), []
    expected = roll_out(model)

    def as_flash(module, query, *args, **kwargs):
        seen.append(query.shape[2])
        return AttentionInterface()["sdpa"](module, query, *args, **kwargs)

    AttentionInterface.register("flash_stand_in", as_flash)
    AttentionMaskInterface.register("flash_stand_in", AttentionMaskInterface()["sdpa"])
    # transformers would look for the package
    set_name = lambda name: setattr(model.config, "_attn_implementation", name)  # noqa: E731
    monkeypatch.setattr(model, "set_attn_implementation", set_name)
    set_name("flash_stand_in")
    assert_same_rollouts(roll_out(model), expected)
    assert model.config._attn_implementation == "flash_stand_in"
    assert set(seen) == {8}  # the prompts alone
    assert "prefill flash_stand_in, decode esr_decode_sdpa, no graphs" in InProcessBackend().describe(model)


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(6, 6), (6, 2), (4, 1)])
def test_attention_of_one_token_by_hand(num_heads, num_key_heads):
    """Every query head on the key head that it shares, written as a sum in float64; keys and values are views of a cache."""
    generator = torch.Generator().manual_seed(num_heads)
    query = torch.randn(3, num_heads, 1, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 3, num_key_heads, 11, 8, generator=generator, dtype=torch.float64)[..., :7, :]
    seen = torch.rand(3, 1, 1, 7, generator=generator) < 0.7
    seen[..., -1] = True
    mask = torch.zeros(3, 1, 1, 7, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    output, _ = decode_sdpa(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert output.shape == (3, 1, num_heads, 8)
    for row in range(3):
        for head in range(num_heads):
            shared = head // (num_heads // num_key_heads)
            weights = (0.3 * key[row, shared] @ query[row, head, 0]).exp() * seen[row, 0, 0]
            expected = weights @ value[row, shared] / weights.sum()
            torch.testing.assert_close(output[row, 0, head], expected)


@pytest.mark.parametrize("backend", [InProcessBackend, HFGenerateBackend])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"horizon": 0}, "rollout: horizon must be >= 1, got 0"),
        ({"prompts": [[BOS], []]}, "rollout: a prompt must be at least one token, got 0"),
        ({"horizon": 121}, r"prompt and horizon must be at most the model's 128 positions together, got '8 \+ 121'"),
        ({"eos_ids": (EOS, VOCAB_SIZE)}, r"rollout: eos_ids must be in \[0, 19\), the vocabulary, got 19"),
        ({"eos_ids": (EOS, 15), "vocab_size": 12}, r"rollout: eos_ids must be in \[0, 12\), the vocabulary, got 15"),
        ({"eos_ids": (-1,)}, r"rollout: eos_ids must be in \[0, 19\), the vocabulary, got -1"),
        ({"pad_id": None}, "rollout: pad_id must be an id of the vocabulary, got None"),
        ({"pad_id": VOCAB_SIZE}, r"rollout: pad_id must be in \[0, 19\), got 19"),
        ({"vocab_size": 20}, r"rollout: vocab_size must be in \[1, 19\], got 20"),
    ],
)
def test_requests_that_cannot_be_met(backend, changed, message):
    prompts = changed.get("prompts", RAGGED)
    batch = make_prompt_batch(prompts)
    options = {"horizon": 4, "sampler": GREEDY, "eos_ids": EOS_IDS, "pad_id": PAD, "seed": 0} | changed
    options.pop("prompts", None)
    with pytest.raises(InputError, match=message):
        generate_rollouts(make_model(), batch, backend=backend(), **options)


@pytest.mark.parametrize("backend", [InProcessBackend, HFGenerateBackend])
def test_ids_that_a_model_never_writes_may_be_minus_infinity(backend):
    model = make_model(2)
    model.lm_head.register_forward_hook(
        lambda _, inputs, logits: logits.index_fill(-1, torch.arange(9, 19), -torch.inf)
    )
    rollouts = roll_out(model, sampler=SamplerSettings(), backend=backend())
    assert rollouts.response_ids_B_K.max() < 9 and rollouts.logprobs_B_K.isfinite().all()


def test_samples_that_do_not_fill_the_batch():
    batch = make_prompt_batch(RAGGED[:3], samples_per_prompt=2)
    with pytest.raises(InputError, match="the batch must be a multiple of samples_per_prompt 2, got 3"):
        generate_rollouts(make_model(), batch, horizon=2, sampler=GREEDY, eos_ids=EOS_IDS, pad_id=PAD, seed=0)


def test_a_recurrent_model_is_refused_by_name():
    model = make_model(0, MambaConfig, state_size=4, conv_kernel=2, expand=2, time_step_rank=2)
    with pytest.raises(InputError, match="rollout.backend inprocess needs a model .*hf_generate|with a KV cache"):
        roll_out(model)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, (InProcessBackend, {"use_graphs": True, "compile_backend": None})),
        (
            {"cuda_graphs": False, "compile_step": True},
            (InProcessBackend, {"use_graphs": False, "compile_backend": "inductor"}),
        ),
        ({"backend": "hf_generate"}, (HFGenerateBackend, {})),
        (
            {"backend": "vllm", "vllm_url": "http://host:1", "vllm_weights_folder": "/here"}
            | {"vllm_weights_folder_on_server": "/there"},
            (VllmServerBackend, {}),
        ),
    ],
)
def test_the_backend_that_options_name(changed, expected):
    backend = make_backend(RolloutConfig(**changed))
    assert type(backend) is expected[0]
    assert {name: getattr(backend, name) for name in expected[1]} == expected[1]
    if isinstance(backend, VllmServerBackend):
        weights = backend.weights
        assert (backend.server.url, str(weights.folder), str(weights.folder_on_server)) == (
            "http://host:1",
            "/here",
            "/there",
        )
