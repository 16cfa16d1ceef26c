"""Is an adapter what peft says it is, and is it exactly absent when switched off?  pytest tests/distill/test_adapters.py"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, make_model, make_tokenizer
from torch import nn
from transformers import Gemma2Config, GPT2Config, Phi3Config

from esr_distill.config.lora import LoraSettings
from esr_distill.input_error import InputError
from esr_distill.models import load_model
from esr_distill.models.adapters import (
    adapter_off,
    adapter_weights,
    add_adapter,
    find_adapter,
    load_frozen_adapter,
    load_trained_adapter,
    save_adapter,
)

pytest.importorskip("peft", reason="peft is optional")

IDS_1_T = torch.tensor([[1, 5, 13, 7, 15]])
SETTINGS = LoraSettings(
    use_peft=True, lora_r=3, lora_alpha=5, lora_dropout=0.5, lora_target_modules=("q_proj", "up_proj")
)


def with_random_adapter(model, settings: LoraSettings = SETTINGS):
    """An adapter that does something: a new one is a product with zeros."""
    add_adapter(model, settings, 0)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_weights(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS_1_T).logits


def test_the_adapted_layers_are_w_plus_scaled_b_a():
    """Against a model whose weights are the sums, worked out here."""
    model = with_random_adapter(make_model(3))
    merged = make_model(3)
    weights = adapter_weights(model)
    with torch.no_grad():
        for name in {name.rsplit(".lora_", 1)[0] for name in weights}:
            a_R_I, b_O_R = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            assert a_R_I.shape[0] == b_O_R.shape[1] == 3
            merged.get_submodule(name).weight += (5 / 3) * b_O_R @ a_R_I
    assert len(weights) == 2 * 2 * 2  # two layers, two matrices in each, A and B
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-4, rtol=1e-5)
    assert (logits(model) - logits(make_model(3))).abs().max() > 0.1


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed():
    base = logits(make_model(0))
    drawn = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        model = make_model(0)
        add_adapter(model, SETTINGS, seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(logits(model), base)
        drawn.append(adapter_weights(model)["model.layers.0.mlp.up_proj.lora_A.weight"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_only_the_adapter_trains_and_it_is_in_eval_mode_with_the_model():
    model = make_model(0)
    add_adapter(model, SETTINGS, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 8
    assert not any(module.training for module in model.modules())


def test_the_adapter_of_a_bfloat16_model_is_float32():
    model = make_model(0).to(torch.bfloat16)
    add_adapter(model, SETTINGS, 0)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False), (torch.float32, True)}
    assert logits(model).dtype == torch.bfloat16


def test_off_is_exactly_the_base_model_and_comes_back():
    base = logits(make_model(0))
    model = with_random_adapter(make_model(0))
    adapted = logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted) and not torch.equal(adapted, base)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_switching_off_between_forward_and_backward_changes_no_gradient():
    gradients = []
    for is_switched in (False, True):
        model = with_random_adapter(make_model(0))
        loss = model(IDS_1_T).logits.square().mean()
        if is_switched:
            with adapter_off(model):
                logits(model)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 8
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_all_linear_is_every_matrix_but_the_output_head():
    model = make_model(0)
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    add_adapter(model, LoraSettings(use_peft=True, lora_target_modules="all-linear"), 0)
    assert {name.rsplit(".lora_", 1)[0] for name in adapter_weights(model)} == expected and len(expected) == 14


@pytest.mark.parametrize(
    ("config_class", "names"),
    [
        (GPT2Config, ("c_attn", "c_fc")),
        (Phi3Config, ("qkv_proj", "gate_up_proj")),
        (Gemma2Config, ("q_proj", "down_proj")),
    ],
)
def test_other_families_have_other_names(config_class, names):
    model = make_model(0, config_class)
    base = logits(model)
    add_adapter(model, LoraSettings(use_peft=True, lora_target_modules=names), 0)
    assert torch.equal(logits(model), base)
    assert {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in adapter_weights(model)} == set(names)


@pytest.mark.parametrize("name", ["query_proj", "lm_head", "embed_tokens", "mlp", "input_layernorm"])
def test_names_that_are_no_inner_linear_layers(name):
    """peft goes on without a name that it does not find, and would train a copy of a tied head."""
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(
        InputError,
        match=rf"model\.lora\.lora_target_modules must be last names of linear layers of LlamaForCausalLM \({known}\), "
        rf"got '{name}'",
    ):
        add_adapter(make_model(0), LoraSettings(use_peft=True, lora_target_modules=("q_proj", name)), 0)


def test_without_peft(monkeypatch, saved):
    monkeypatch.setattr("esr_distill.models.adapters.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.lora\.use_peft must be left out where .*\(pip install peft\)"):
        add_adapter(make_model(0), SETTINGS, 0)
    with pytest.raises(InputError, match=r"model\.teacher must be left out where .*\(pip install peft\)"):
        load_frozen_adapter(make_model(0), str(saved), "model.teacher")


def test_peft_is_imported_only_where_it_is_used():
    program = "import sys; import esr_distill.train; print('peft' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


# Files


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """The folder of an adapter of the model in `base`."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load(base)
    model.generation_config.eos_token_id = [2, 7]
    save_adapter(with_random_adapter(model), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(source, **changed):
    options = {"dtype": "float32", "attn_implementation": "sdpa", "device": torch.device("cpu")} | changed
    return load_model(str(source), "model.teacher", **options)


def change_config(folder, **changed):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))


def test_peft_reads_what_is_written(base, saved):
    from peft import AutoPeftModelForCausalLM, PeftModel

    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    ]
    expected = logits(with_random_adapter(make_model(0)))
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(0), saved)), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(saved)), expected)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 5, "CAUSAL_LM")
    assert config["inference_mode"] is True


def test_what_peft_writes_is_read(base, tmp_path):
    """Its own file of an adapter with another rank in one layer, and rslora's scale."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=2, rank_pattern={"v_proj": 4}, use_rslora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(tuned))


def test_a_saved_adapter_comes_back_frozen_on_its_base_model(saved):
    model = load(saved)
    assert torch.equal(logits(model), logits(with_random_adapter(make_model(0))))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert find_adapter(str(saved))["r"] == 3
    assert model.generation_config.eos_token_id == [2, 7]


def test_an_adapter_that_says_nothing_of_stops_leaves_the_base_models(folder):
    (folder / "generation_config.json").unlink()
    assert load(folder).generation_config.eos_token_id == EOS


def test_training_goes_on_from_a_saved_adapter(saved):
    model = make_model(0)
    add_adapter(model, SETTINGS, 9)
    load_trained_adapter(model, SETTINGS, str(saved), "model.lora.start_from")
    assert torch.equal(logits(model), logits(with_random_adapter(make_model(0))))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 8


def test_float32_is_kept_on_a_bfloat16_model(saved):
    model = make_model(0).to(torch.bfloat16)
    add_adapter(model, SETTINGS, 9)
    load_trained_adapter(model, SETTINGS, str(saved), "model.lora.start_from")
    on_disk = load_file(saved / "adapter_model.safetensors")
    for name, tensor in adapter_weights(model).items():
        assert torch.equal(tensor, on_disk[f"base_model.model.{name}"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_alpha": 6}, r"an adapter whose lora_alpha is 6, got 5 in"),
        ({"lora_r": 4}, r"an adapter whose r is 4, got 3 in"),
        (
            {"lora_target_modules": ("q_proj",)},
            r"where model\.layers\.0\.mlp\.up_proj\.lora_A\.weight is \(3, 32\) and must be left out",
        ),
        (
            {"lora_target_modules": ("q_proj", "up_proj", "o_proj")},
            r"where model\.layers\.0\.self_attn\.o_proj\.lora_A\.weight is missing and must be \(3, 32\)",
        ),
    ],
)
def test_an_adapter_of_another_shape_is_refused(saved, changed, message):
    fields = {"lora_r": 3, "lora_alpha": 5, "lora_target_modules": ("q_proj", "up_proj")} | changed
    settings = LoraSettings(use_peft=True, **fields)
    model = make_model(0)
    add_adapter(model, settings, 0)
    with pytest.raises(InputError, match=r"model\.lora\.start_from must hold .*" + message):
        load_trained_adapter(model, settings, str(saved), "model.lora.start_from")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora is unset or false, got True"),
        ({"use_rslora": True}, "use_rslora is unset or false, got True"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern is unset or false, got \{'q_proj': 2\}"),
        ({"peft_type": "IA3"}, "peft_type is 'LORA', got 'IA3'"),
    ],
)
def test_another_kind_of_adapter_is_not_trained_as_lora(folder, changed, message):
    change_config(folder, **changed)
    model = make_model(0)
    add_adapter(model, SETTINGS, 0)
    with pytest.raises(InputError, match=r"model\.lora\.start_from must hold an adapter whose " + message):
        load_trained_adapter(model, SETTINGS, str(folder), "model.lora.start_from")


def test_a_folder_without_an_adapter(base):
    model = make_model(0)
    add_adapter(model, SETTINGS, 0)
    with pytest.raises(
        InputError, match=r"start_from must hold an adapter \(adapter_config\.json\), got .*which has none"
    ):
        load_trained_adapter(model, SETTINGS, str(base), "model.lora.start_from")


def test_a_pickled_adapter_is_refused(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"model\.teacher must hold adapter_model\.safetensors, got"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(folder, bad):
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights[name][2, 1] = bad
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(
        InputError, match=r"model\.teacher must have finite weights, .* in model\.layers\.1\.mlp\.up_proj"
    ):
        load(folder)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path_factory):
    wide = tmp_path_factory.mktemp("wide")
    make_model(0, hidden_size=48).save_pretrained(wide)
    change_config(folder, base_model_name_or_path=str(wide))
    with pytest.raises(
        InputError, match=r"model\.teacher must hold the adapter of the layers and the rank that are set"
    ):
        load(folder)
    change_config(folder, base_model_name_or_path=str(wide), target_modules=["c_attn"])
    with pytest.raises(InputError, match=r"model\.teacher must hold an adapter for LlamaForCausalLM, got"):
        load(folder)


def test_an_adapter_without_its_base_model(folder, base):
    change_config(folder, base_model_name_or_path=None)
    with pytest.raises(
        InputError, match=r"model\.teacher must hold an adapter that names its base model, .*names none"
    ):
        load(folder)
    change_config(folder, base_model_name_or_path="/no/such/model")
    with pytest.raises(InputError, match=r"the base model of model\.teacher must be a folder with a saved model"):
        load(folder)
    change_config(folder, base_model_name_or_path=str(base))
    (folder / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(
        InputError, match=r"model\.teacher must hold a model, or an adapter of a whole model, .*mixes them"
    ):
        load(folder)
