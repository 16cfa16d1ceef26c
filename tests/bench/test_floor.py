"""Is the floor of a step what is counted by hand, by a mask, by torch's own counter, and in the document of the floors?

python -m pytest tests/bench/test_floor.py
"""

import math

import pytest
import torch

KERNELS_RATES = (4.3e12, 790e12)  # of the document's floors


@pytest.fixture(scope="module")
def floor(bench):
    return bench("floor")


@pytest.fixture(scope="module")
def rates(floor):
    return floor.Rates(*KERNELS_RATES, "H200", "the document")


def toy(floor, **changes):
    """2 layers of 4 heads and 2 key heads of 3 columns: 8 x 12 x 2 + 8 x 6 x 2 weights of attention, 3 x 8 x 10 of the MLP."""
    sizes = {"layers": 2, "hidden": 8, "intermediate": 10, "heads": 4, "kv_heads": 2, "head_dim": 3, "vocab_size": 11}
    return floor.ModelShape(
        **(sizes | {"tied": True, "dtype_bytes": 2, "layer_vectors": 16, "final_vectors": 8} | changes)
    )


TOY_MATRICES = 8 * 12 * 2 + 8 * 6 * 2 + 3 * 8 * 10  # of one layer: 528
TOY_BODY = 2 * (TOY_MATRICES + 16) + 8


# The document's table of decode steps, in ms: weights at 4.3 TB/s, then steps by batch at contexts of 250 tokens.
DECODE_TABLE = {
    "qwen3-1.7b": (1.720e9, 114_688, {32: 1.01, 64: 1.23, 128: 1.65, 256: 2.51, 512: 4.21}),
    "qwen3-8b": (7.568e9, 147_456, {32: 3.79, 64: 4.07, 128: 4.62, 256: 5.72, 512: 9.9}),
    "qwen3-0.6b": (0.596e9, 114_688, {32: 0.49, 64: 0.70, 128: 1.13, 256: 1.98, 512: 3.69}),
}


@pytest.mark.parametrize("name", DECODE_TABLE)
def test_decode_steps_are_those_of_the_document(floor, rates, name):
    weights, cache_bytes, steps_ms = DECODE_TABLE[name]
    shape = floor.load_shape(name, "--student", "bfloat16")
    assert shape.body_weights + shape.head_weights == pytest.approx(weights, abs=0.6e6)
    assert shape.cache_bytes_per_token == cache_bytes
    for rows, milliseconds in steps_ms.items():
        step = floor.decode_step_floor(shape, rates, rows=rows, context=250)
        assert 1e3 * step.seconds == pytest.approx(milliseconds, abs=0.006), (name, rows)
        assert step.bound == ("flop" if (name, rows) == ("qwen3-8b", 512) else "bytes")


def test_linear_divergence_is_that_of_the_document(floor, rates):
    """TFLOP and ms at 3200 rows, hidden sizes 2048 and 4096, with a trained and with a frozen head; forward is 5.974."""
    student, teacher = (floor.load_shape(name, "--x", "bfloat16") for name in ("qwen3-1.7b", "qwen3-8b"))
    for is_trained, tflop, milliseconds, in_forward in ((True, 9.957, 12.60, 5.974), (False, 7.966, 10.08, 7.966)):
        forward, backward = floor.divergence_work(student, teacher, 3200, is_head_trained=is_trained)
        assert 1e-12 * (forward.flop + backward.flop) == pytest.approx(tflop, abs=6e-4)
        assert 1e-12 * forward.flop == pytest.approx(in_forward, abs=6e-4)
        seconds = sum(floor.StageFloor.of(work, rates).seconds for work in (forward, backward))
        assert 1e3 * seconds == pytest.approx(milliseconds, abs=0.01)


def test_a_whole_step_is_that_of_the_document(floor, rates):
    """32 prompts of 200, horizon 100, 1.7B and 8B: teacher 169 ms, student forward and backward 103, rollout 124, loss 13.

    The document leaves out attention of the forwards, 1 % here, and counts 100 decode steps, where the last token is never fed.
    """
    student, teacher = (floor.load_shape(name, "--x", "bfloat16") for name in ("qwen3-1.7b", "qwen3-8b"))
    floors = floor.step_floor(student, teacher, floor.StepSetting(32, 200, 100), rates)
    ms = {stage: 1e3 * of_stage.seconds for stage, of_stage in floors.items()}
    assert list(ms) == list(floor.STAGES)
    assert ms["teacher_forward"] == pytest.approx(169, rel=0.01)
    assert ms["rollout"] == pytest.approx(124, rel=0.01)
    head_products_ms = 1e3 * 2 * 2 * 3200 * 151_936 * 2048 / 790e12
    assert ms["student_forward"] + ms["backward"] - head_products_ms == pytest.approx(103, rel=0.015)
    assert ms["divergence"] + head_products_ms == pytest.approx(12.6, abs=0.05)
    # 1.7206 G parameters: 7 values of 2 bytes each
    assert ms["optimizer"] == pytest.approx(1e3 * 14 * 1.7206e9 / 4.3e12, rel=1e-3)


def test_every_stage_by_hand(floor):
    student, teacher = toy(floor), toy(floor, hidden=12, tied=False, dtype_bytes=4, vocab_size=13, layer_vectors=0)
    setting = floor.StepSetting(batch_size=4, prompt=5, horizon=3, samples_per_prompt=2, trained_tokens=2)
    slow = floor.Rates(1000.0, 1e12, "slow memory", "test")
    floors = floor.step_floor(student, teacher, setting, slow)
    attention = 4 * 12 * 2  # a pair of tokens in both layers: two products of 4 x 3 columns

    # Rollout: two prompts of 5 (15 pairs each), the head on each one's last token; then two steps of 4 rows.
    head, cache = 8 * 11, 2 * 2 * 3 * 2 * 2
    prefill_flop = 2 * (5 * 2 * 2 * TOY_MATRICES + 15 * attention + 2 * head)
    step_flop = [4 * (2 * 2 * TOY_MATRICES + 2 * head + context * attention) for context in (6, 7)]
    weights = 2 * (TOY_BODY + head)
    rollout_bytes = weights + 10 * cache + sum(weights + cache * (2 * 5 + 4 * own) for own in (1, 2))
    assert floors["rollout"].flop == prefill_flop + sum(step_flop)
    assert floors["rollout"].bytes == rollout_bytes
    assert floors["rollout"].seconds == pytest.approx(rollout_bytes / 1000)
    assert floors["rollout"].bound == "bytes"

    # Forwards: 4 rollouts of 8 tokens, 36 pairs each.
    student_flop = 4 * (8 * 2 * 2 * TOY_MATRICES + 36 * attention)
    teacher_matrices = 12 * 12 * 2 + 12 * 6 * 2 + 3 * 12 * 10
    assert floors["student_forward"].flop == student_flop
    assert floors["student_forward"].bytes == 2 * TOY_BODY
    assert floors["teacher_forward"].flop == 4 * (8 * 2 * 2 * teacher_matrices + 36 * attention)
    assert floors["teacher_forward"].bytes == 4 * (2 * teacher_matrices + 8)

    # Divergence: 8 rows and the 11 ids that both have.
    assert floors["divergence"].flop == 2 * 8 * 11 * (8 + 12)
    assert floors["divergence"].bytes == 2 * 8 * (11 + 8) + 4 * 12 * (11 + 8)
    parameters = TOY_BODY + head
    assert floors["backward"].flop == 2 * student_flop + 2 * 2 * 8 * 11 * 8
    assert floors["backward"].bytes == 2 * TOY_BODY + 2 * parameters + 2 * 8 * (11 + 8) + 2 * 8 * 8
    assert floors["optimizer"].flop == 0 and floors["optimizer"].bytes == 7 * 2 * parameters
    assert floors["optimizer"].bound == "bytes"

    fast = floor.step_floor(student, teacher, setting, floor.Rates(1e12, 1000.0, "slow products", "test"))
    assert (
        fast["backward"].seconds == pytest.approx(floors["backward"].flop / 1000) and fast["backward"].bound == "flop"
    )


def test_a_frozen_head_moves_its_products_and_is_not_updated(floor):
    setting = floor.StepSetting(4, 5, 3, is_head_trained=False)
    student = toy(floor, tied=False)
    floors = floor.step_floor(student, student, setting, floor.Rates(1.0, 1.0, "x", "test"))
    forward = 4 * (8 * 2 * 2 * TOY_MATRICES + 36 * 4 * 12 * 2)
    assert floors["divergence"].flop == 2 * 12 * 11 * (8 + 8 + 8)
    assert floors["backward"].flop == 2 * forward
    assert floors["optimizer"].bytes == 7 * 2 * (TOY_BODY + 8 * 11)  # the embedding still trains
    tied = floor.step_floor(toy(floor), student, setting, floor.Rates(1.0, 1.0, "x", "test"))
    assert tied["optimizer"].bytes == 7 * 2 * TOY_BODY


@pytest.mark.parametrize("is_head_trained", [True, False])
def test_the_fused_op_multiplies_where_the_floor_says(floor, monkeypatch, is_head_trained):
    """Products of the op itself, counted in forward and in backward as its kernels run in the interpreter."""
    pytest.importorskip("triton")
    from esr_kernels import Impl, linear_divergence
    from esr_kernels.output_projection import gradients, projection
    from esr_kernels.output_projection.matrix_product import matmul_float32

    flop = []

    def counted(a, b, **options):
        flop.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return matmul_float32(a, b, **options)

    for module in (gradients, projection):
        monkeypatch.setattr(module, "matmul_float32", counted)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student_5_8, teacher_5_12 = (torch.randn(5, width, device=device) for width in (8, 12))
    heads = [torch.randn(67, width, device=device) for width in (8, 12)]
    student_5_8.requires_grad_()
    heads[0].requires_grad_(is_head_trained)
    loss = linear_divergence(student_5_8, heads[0], teacher_5_12, heads[1], impl=Impl.FUSED).divergence_N.sum()
    in_forward = sum(flop)
    loss.backward()
    shapes = [toy(floor, hidden=width, vocab_size=67) for width in (8, 12)]
    forward, backward = floor.divergence_work(*shapes, 5, is_head_trained=is_head_trained)
    assert (in_forward, sum(flop) - in_forward) == (forward.flop, backward.flop)


def tiny_config(kind: str):
    import transformers

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 51,
        "head_dim": 8,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "qwen3": lambda: transformers.Qwen3Config(**sizes),
        "llama": lambda: transformers.LlamaConfig(**sizes, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**(sizes | {"head_dim": 4})),
        "gemma3": lambda: transformers.Gemma3TextConfig(**sizes, sliding_window=7),
        "phi3": lambda: transformers.Phi3Config(**(sizes | ends | {"head_dim": 4})),
        "gpt2": lambda: transformers.GPT2Config(n_embd=24, n_layer=3, n_head=6, vocab_size=51, n_positions=64),
    }
    return configs[kind]()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2", "gemma3", "phi3", "gpt2"])
def test_parameters_and_products_are_those_of_a_real_model(floor, kind):
    """Parameters against the model's own; products against torch's counter, which counts attention without its mask."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    shape = floor.ModelShape.of(config, torch.float32)
    assert shape.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert shape.dtype_bytes == 4

    assert floor.ModelShape.of(model.config) == shape

    ids_2_9 = torch.arange(18).reshape(2, 9)
    with FlopCounterMode(display=False) as forward:
        hidden = model.base_model(input_ids=ids_2_9, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    pairs = 4 * shape.heads * shape.head_dim * shape.layers
    seen = floor.body_flop(shape, 9) - 2 * 9 * shape.layers * shape.layer_matrices
    rotary = (
        2 * 9 * shape.head_dim // 2 * 2 if kind != "gpt2" else 0
    )  # angles by a product, where a version makes them so
    counted = forward.get_total_flops() - 2 * pairs * 81
    assert counted - 2 * 2 * 9 * shape.layers * shape.layer_matrices in (0, rotary, rotary // 2)
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), abs=2 * rotary)
    causal = sum(min(token, shape.window or 9) for token in range(1, 10))
    assert seen == pairs / shape.layers * ((shape.layers - shape.window_layers) * 45 + shape.window_layers * causal)


def test_a_model_keeps_its_attention(floor):
    """Building another model from its config must not change it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32, attn_implementation="sdpa")
    floor.ModelShape.of(model.config, torch.bfloat16)
    assert model.config._attn_implementation == "sdpa" and model.config.dtype == torch.float32


def test_windows_are_those_of_a_mask(floor):
    shape = toy(floor, window=4, window_layers=1)
    tokens = torch.arange(9)
    causal = tokens[None] <= tokens[:, None]
    windowed = causal & (tokens[:, None] - tokens[None] < 4)
    attention = 4 * 12 * int(causal.sum() + windowed.sum())
    assert floor.body_flop(shape, 9) == 2 * 9 * 2 * TOY_MATRICES + attention

    # A step at context 9 after a prompt of 7, two samples each: the window's layer sees 2 own tokens and 2 of the prompt.
    unit = floor.Rates(1.0, 1.0, "x", "test")
    step = floor.decode_step_floor(shape, unit, rows=6, context=9, prompt=7, samples_per_prompt=2)
    layer = 2 * 2 * 3 * 2
    assert step.bytes == 2 * (TOY_BODY + 88) + layer * (6 * 2 + 3 * 7) + layer * (6 * 2 + 3 * 2)
    assert step.flop == 6 * (2 * (2 * TOY_MATRICES + 88) + 4 * 12 * (9 + 4))


def test_autocast_reads_16_bits_and_updates_32(floor):
    shape = toy(floor, dtype_bytes=4, compute_bytes=2)
    assert shape.cache_bytes_per_token == 2 * 2 * 3 * 2 * 2
    setting = floor.StepSetting(1, 1, 1)
    assert floor.forward_work(shape, setting).bytes == 2 * TOY_BODY
    assert floor.optimizer_work(shape, setting).bytes == 7 * 4 * (TOY_BODY + 88)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.MixtralConfig(), "dense decoder, got MixtralConfig with num_.*experts 8"),
        (lambda t: t.MambaConfig(), "attention in every layer, got MambaConfig without num_attention_heads"),
        (lambda t: t.RecurrentGemmaConfig(), "RecurrentGemmaConfig (with|has) "),
        (lambda t: t.T5Config(), "a decoder alone, got the encoder and decoder of T5Config"),
        (lambda t: t.FalconConfig(num_hidden_layers=2), "attention and one MLP: FalconConfig has .* do not give"),
    ],
)
def test_what_a_shape_cannot_count_is_refused(floor, make, message):
    import transformers

    with pytest.raises(ValueError, match=message):
        floor.ModelShape.of(make(transformers), torch.bfloat16)


def test_wrong_shapes_and_settings(floor):
    with pytest.raises(ValueError, match="dtype must be given for a config that names none, got LlamaConfig"):
        floor.ModelShape.of(tiny_config("llama"))
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads 3, got 4"):
        toy(floor, kv_heads=3)
    with pytest.raises(ValueError, match="window_layers must be 0 without a window and 1 to 2 with one, got 3"):
        toy(floor, window=5, window_layers=3)
    for arguments, message in (
        ((0, 5, 3), "batch_size must be >= 1, got 0"),
        ((4, 5, 3, 4), "trained_tokens must be 1 to horizon = 3, got 4"),
        ((4, 5, 3, None, 3), "samples_per_prompt must be a divisor of batch_size 4, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            floor.StepSetting(*arguments)
    with pytest.raises(ValueError, match="flop_per_s must be > 0 and finite, got 0.0"):
        floor.Rates(1.0, 0.0, "x", "test")


def stage_floors(floor):
    seconds = {"rollout": 4.0, "student_forward": 1.0, "teacher_forward": 2.0, "divergence": 0.5}
    seconds |= {"backward": 2.0, "optimizer": 0.5}
    return {stage: floor.StageFloor(1e12, 2e9, value, "flop") for stage, value in seconds.items()}


def test_shares_by_hand(floor):
    floors = stage_floors(floor)
    measured = {stage: 2.0 for stage in floors} | {"rollout": 16.0}
    shares = floor.shares(measured, floors)
    assert shares["rollout"] == 0.25 and shares["teacher_forward"] == 1.0 and shares["divergence"] == 0.25
    assert shares["total"] == pytest.approx(10 / 26)
    with pytest.raises(ValueError, match="measured stages must be .*'rollout'.*, got \\['rollout'\\]"):
        floor.shares({"rollout": 1.0}, floors)
    with pytest.raises(ValueError, match="measured seconds of divergence must be > 0, got 0"):
        floor.shares(measured | {"divergence": 0}, floors)


def test_the_table_says_what_was_counted(floor):
    floors = stage_floors(floor)
    rows = floor.table_rows(floors)
    assert len(rows[0]) == len(floor.HEADINGS) and len(rows) == 7
    assert rows[0] == ("rollout", "1", "2", "4,000", "flop") and rows[-1] == ("total", "6", "12", "10,000", "")


def test_named_gpus(bench, floor):
    gpu_rates = bench("gpu_rates")
    h200 = gpu_rates.published_gpu("h200", "--rates")
    assert h200.folder == "nvidia-h200"
    assert h200.rates("bfloat16").copy_bytes_per_s == 4.8e12 and h200.rates("bfloat16").flop_per_s == 989e12
    assert h200.rates("float32").flop_per_s == 67e12 and "published" in h200.rates("float32").source
    with pytest.raises(ValueError, match="--rates must be among .*h200.*, got 'h3'"):
        gpu_rates.published_gpu("h3", "--rates")
    # What decodes is bound by bytes and the rest by products on every one of them.
    for gpu in gpu_rates.GPUS.values():
        assert 100 < gpu.rates("bfloat16").flop_per_s / gpu.rates("bfloat16").copy_bytes_per_s < 500


def test_rates_are_measured(bench):
    gpu_rates = bench("gpu_rates")
    rates = gpu_rates.measured_rates(torch.device("cpu"), "float32", is_smoke=True)
    assert 0 < rates.copy_bytes_per_s < 1e13 and 0 < rates.flop_per_s < 1e14
    assert math.isfinite(rates.flop_per_s) and "measured" in rates.source
    with pytest.raises(ValueError, match="dtype must be float32 where the rates are a CPU's, got 'bfloat16'"):
        gpu_rates.measured_rates(torch.device("cpu"), "bfloat16", is_smoke=True)


def test_the_command(floor, capsys, monkeypatch):
    pair = ["--student", "tiny", "--teacher", "tiny", "--batch-size", "3", "--prompt", "6", "--horizon", "5"]
    assert floor.main([*pair, "--rates", "h200"]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA H200: 4,800 GB/s, 989 TFLOP/s (published" in told and "A lower bound, not a prediction." in told
    assert all(stage in told for stage in (*floor.STAGES, "total"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = []
    monkeypatch.setattr(
        floor,
        "measured_rates",
        lambda device, dtype: asked.append((device.type, dtype)) or floor.Rates(1e9, 1e9, "it", "m"),
    )
    assert floor.main(pair) == 0 and asked == [("cpu", "float32")]
    assert "it: 1 GB/s, 0.001 TFLOP/s (m)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "h3"], "--rates must be among"),
        (["--rates", "h200", "--student", "./nothing"], "--student must be among .*tiny.* got './nothing'"),
        (["--rates", "h200", "--dtype", "float32", "--autocast"], "--autocast needs --dtype bfloat16, got float32"),
        (["--rates", "h200", "--batch-size", "0"], "batch_size must be >= 1, got 0"),
    ],
)
def test_wrong_options(floor, capsys, arguments, message):
    import re

    with pytest.raises(SystemExit):
        floor.main(["--student", "tiny", "--teacher", "tiny", *arguments])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
