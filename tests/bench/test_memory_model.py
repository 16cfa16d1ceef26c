"""Is the memory of a step what tensors really take: those of AdamW, of the engine's cache, and what autograd saves?

python -m pytest tests/bench/test_memory_model.py
"""

import dataclasses

import pytest
import torch


@pytest.fixture(scope="module")
def memory(bench):
    return bench("memory_model")


@pytest.fixture(scope="module")
def floor(bench):
    return bench("floor")


def toy(floor, **changes):
    sizes = {"layers": 2, "hidden": 8, "intermediate": 10, "heads": 4, "kv_heads": 2, "head_dim": 3, "vocab_size": 11}
    return floor.ModelShape(**(sizes | {"tied": True, "dtype_bytes": 2} | changes))


TOY_PARAMETERS = 2 * (8 * 12 * 2 + 8 * 6 * 2 + 3 * 8 * 10) + 8 * 11


def tiny_model(kind, dtype=torch.float32, **changes):
    import transformers

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "head_dim": 16,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 53}
    config = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[kind](**(sizes | changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def parts_of(memory, student, teacher, setting, **options):
    made = memory.memory_parts(student, teacher, setting, memory_bytes=80e9, **options)
    return {part.name: part.bytes for part in made}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_head_trained", [True, False])
def test_weights_gradients_and_moments_are_those_of_adamw(memory, floor, dtype, is_head_trained):
    model = tiny_model("qwen3", dtype)
    model.lm_head.weight.requires_grad_(is_head_trained)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.arange(10)[None]).logits.float().square().mean().backward()
    gradients = sum(parameter.grad.nbytes for parameter in trained)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]

    shape = floor.ModelShape.of(model.config)
    setting = floor.StepSetting(2, 5, 3, is_head_trained=is_head_trained)
    parts = parts_of(memory, shape, toy(floor), setting)
    assert parts["student weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert parts["gradients"] == gradients
    assert parts["AdamW moments"] == sum(moment.nbytes for moment in moments)
    assert parts["teacher weights"] == 2 * TOY_PARAMETERS


@pytest.mark.parametrize("samples_per_prompt", [1, 2])
def test_the_cache_is_that_of_the_engine(bench, memory, floor, samples_per_prompt):
    from esr_distill.rollout import InProcessBackend

    model = tiny_model("llama")
    shape, setting = (
        floor.ModelShape.of(model.config),
        floor.StepSetting(4, 9, 7, samples_per_prompt=samples_per_prompt),
    )
    prompts = dataclasses.replace(
        bench("rollout_models").make_prompts(model, 4, 9, is_ragged=False), samples_per_prompt=samples_per_prompt
    )
    engine = InProcessBackend()
    rollouts = bench("bench_rollouts")
    rollouts.rollouts(model, prompts, 7, rollouts.SAMPLER, engine)
    columns = memory.rollout_columns(setting, has_graphs=False)
    assert columns == 16  # 9 + 6 fed tokens, to a multiple of 8
    assert engine.cache.num_bytes == memory.cache_bytes(shape, 4, columns)
    assert memory.rollout_columns(setting) == 64 + 8  # on a GPU a prompt ends at a multiple of 64

    read = model(prompts.prompt_ids_B_P, use_cache=True).past_key_values
    grown = sum(tensor.nbytes for layer in read.layers for tensor in (layer.keys, layer.values))
    assert grown == memory.cache_bytes(shape, 4, 9)


def saved_bytes(model, rows, tokens):
    """Storages that autograd keeps of a forward, each once, without parameters."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    ids_B_T = torch.randint(model.config.vocab_size, (rows, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(
            input_ids=ids_B_T,
            attention_mask=torch.ones_like(ids_B_T),
            position_ids=torch.arange(tokens).expand(rows, tokens),
            use_cache=False,
        )
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_hidden_layers": 1, "intermediate_size": 200}, {"num_key_value_heads": 6}]
)
def test_activations_are_what_autograd_saves(memory, floor, kind, changes):
    model = tiny_model(kind, **changes)
    predicted = memory.activation_bytes(floor.ModelShape.of(model.config), 3, 11)
    assert predicted == pytest.approx(saved_bytes(model, 3, 11), rel=0.15)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_activations_in_16_bits_and_under_autocast(memory, floor, kind):
    model = tiny_model(kind, torch.bfloat16)
    predicted = memory.activation_bytes(floor.ModelShape.of(model.config), 5, 13)
    assert predicted == pytest.approx(saved_bytes(model, 5, 13), rel=0.15)

    model = tiny_model(kind)
    shape = floor.ModelShape.of(model.config, compute_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        saved = saved_bytes(model, 5, 13)
    copies = memory.cast_copy_bytes(shape)
    assert copies == 2 * 3 * (48 * 96 * 2 + 48 * 32 * 2 + 3 * 48 * 72)
    assert memory.activation_bytes(shape, 5, 13) + copies == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable:FutureWarning"
)  # its later name is not in all versions
def test_checkpointed_activations(memory, floor, kind):
    """What is kept between the layers is measured; inside one it is what the layer keeps without checkpoints."""
    whole, one_less = (tiny_model(kind, num_hidden_layers=layers) for layers in (5, 4))
    per_layer = saved_bytes(whole, 3, 11) - saved_bytes(one_less, 3, 11)
    without = saved_bytes(whole, 3, 11)
    whole.train()
    whole.gradient_checkpointing_enable({"use_reentrant": True})
    between = saved_bytes(whole, 3, 11)
    assert between < 0.3 * without
    predicted = memory.activation_bytes(floor.ModelShape.of(whole.config), 3, 11, is_checkpointed=True)
    assert predicted == pytest.approx(between + per_layer, rel=0.15)


def test_the_divergence_holds_what_its_plan_says(memory, floor):
    """3200 rows of 151,936 ids in 16 bits on 141 GB: all rows in one chunk, d(logits) kept; on 24 GB projected again."""
    student, teacher = (floor.load_shape(name, "--x", "bfloat16") for name in ("qwen3-1.7b", "qwen3-8b"))
    setting = floor.StepSetting(32, 200, 100)
    row = 2 * (2 * 151_936 + 4 * 151_936 // 128 + 4 * 2048)  # tile-relative: both sides, tile maxima, a slice
    backward = 6 * 3200 * 2048 + 6 * 16_384 * 2048
    kept = memory.divergence_bytes(student, teacher, setting, 141e9)
    assert 3200 * row + 2 * 3200 * 151_936 + backward <= kept <= 141e9 / 16 + backward
    again = memory.divergence_bytes(student, teacher, setting, 24e9)
    assert again <= 24e9 / 16 + backward + 4 * 151_936 * 2048
    assert again >= 4 * 151_936 * 2048 + backward
    frozen = memory.divergence_bytes(student, teacher, dataclasses.replace(setting, is_head_trained=False), 141e9)
    assert frozen < kept


def test_sharded_parts_by_hand(memory, floor):
    setting = floor.StepSetting(4, 5, 3)
    student, teacher = toy(floor), toy(floor, tied=False)
    whole = parts_of(memory, student, teacher, setting, gpus=4)
    sharded = parts_of(memory, student, teacher, setting, gpus=4, is_sharded=True)
    for name in ("student weights", "gradients", "AdamW moments", "teacher weights"):
        assert sharded[name] == whole[name] / 4
    for name in ("KV cache", "activations", "divergence", "teacher forward"):
        assert sharded[name] == whole[name]
    assert sharded["gathered for rollouts"] == 2 * TOY_PARAMETERS
    assert sharded["gathered for the update"] == 2 * (TOY_PARAMETERS + TOY_PARAMETERS + 88)  # two layers are all
    assert whole["teacher forward"] == 4 * 8 * 2 * (2 * 8 + 3 * 10)
    assert "gathered for rollouts" not in whole


def test_the_peak_is_what_lives_and_the_larger_phase(memory):
    part = memory.MemoryPart
    parts = [
        part("a", 5),
        part("b", 1, "rollout"),
        part("c", 3, "rollout"),
        part("d", 2, "update"),
        part("e", 1, "update"),
    ]
    assert memory.peak_bytes(parts) == 5 + 4
