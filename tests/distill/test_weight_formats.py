"""Are weights read from GGUF as they were written, and never from a pickle?  pytest tests/distill/test_weight_formats.py"""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_train import losses, tiny_config
from tiny_gguf import gguf_tokens, save_gguf
from tiny_models import make_model, make_tokenizer, save_pair

import esr_distill.models as models_module
import esr_distill.models.weight_formats as weight_formats_module
from esr_distill.input_error import InputError
from esr_distill.models import load_model, load_tokenizer
from esr_distill.models.weight_formats import check_safetensors, four_bit_arguments, gguf_arguments
from esr_distill.train import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(source, **changed):
    options = {"dtype": "float32", "attn_implementation": "sdpa", "device": CPU} | changed
    return load_model(str(source), "model.student", **options)


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_a_folder_of_pickles_says_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        InputError,
        match=rf"model\.student must be a folder with weights in safetensors, got '{tmp_path}' with {name}, a pickle, "
        r"which can run code when it is read; convert it where you trust it: .*save_pretrained",
    ):
        check_safetensors(str(tmp_path), "model.student")


def test_safetensors_beside_pickles_are_read(tmp_path):
    """Hub repositories often hold both."""
    make_model(0).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert torch.equal(load(tmp_path).lm_head.weight, make_model(0).lm_head.weight)


@pytest.mark.parametrize("is_trusted", [False, True])
def test_code_beside_a_model_runs_where_it_is_trusted(tmp_path, monkeypatch, is_trusted):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    trace = tmp_path / "was_run"
    folder = tmp_path / "student"
    make_model(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    if is_trusted:
        model = load(folder, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
        assert torch.equal(model.lm_head.weight, make_model(0).lm_head.weight)
    else:
        with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
            load(folder)
    assert trace.exists() is is_trusted


# GGUF


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    pytest.importorskip("gguf", reason="gguf is optional")
    pytest.importorskip("accelerate", reason="accelerate is optional")
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(folder / "tiny.gguf")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_tokenizer_out_of_a_gguf_file(gguf_folder, dtype):
    model = load(gguf_folder, gguf_file="tiny.gguf", dtype=dtype)
    expected = make_model(0, vocab_size=21).to(getattr(torch, dtype))
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert model.get_parameter(name).requires_grad
    ids_1_T = torch.tensor([[1, 5, 13, 7]])
    if dtype == "float32":
        torch.testing.assert_close(model(ids_1_T).logits, expected(ids_1_T).logits)
    tokenizer = load_tokenizer(str(gguf_folder), "model.student", gguf_file="tiny.gguf")
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(gguf_tokens())}
    assert (
        tokenizer("1+2=")["input_ids"] == make_tokenizer()("1+2=")["input_ids"][1:]
    )  # no <bos>: the file asks for none
    assert tokenizer("12")["input_ids"] == [19]


def test_a_run_from_gguf_files_and_its_checkpoint(tmp_path, gguf_folder):
    config = tiny_config(tmp_path, steps=2)
    save_gguf(gguf_folder / "teacher.gguf", seed=1)
    model = replace(
        config.model,
        student=str(gguf_folder),
        teacher=str(gguf_folder),
        student_gguf_file="tiny.gguf",
        teacher_gguf_file="teacher.gguf",
    )
    config = replace(config, model=model)
    checkpoint = train(config, Console(quiet=True)).checkpoint
    assert all(loss > 0.01 for loss in losses(config))
    assert not torch.equal(load(checkpoint).lm_head.weight, make_model(0, vocab_size=21).lm_head.weight)
    longer = replace(config, run=replace(config.run, steps=3))
    assert train(longer, Console(quiet=True), resume=True).step == 3


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            {"gguf"},
            r"model\.student_gguf_file must be unset without the packages .*got no gguf \(pip install gguf accel",
        ),
        ({"gguf", "accelerate"}, r"got no gguf and no accelerate \(pip install gguf accelerate\)"),
    ],
)
def test_gguf_without_its_packages(monkeypatch, tmp_path, missing, message):
    monkeypatch.setattr(weight_formats_module, "find_spec", lambda name: None if name in missing else object())
    for use in (load, lambda source, **options: load_tokenizer(str(source), "model.student", **options)):
        with pytest.raises(InputError, match=message):
            use(tmp_path, gguf_file="a.gguf")


def test_a_gguf_file_that_is_not_there(gguf_folder):
    with pytest.raises(InputError, match=r"model\.student_gguf_file must be the name of a file in '.*', got 'b\.gguf'"):
        load(gguf_folder, gguf_file="b.gguf")


def test_a_damaged_gguf_file(gguf_folder, tmp_path):
    shutil.copy(gguf_folder / "tiny.gguf", tmp_path / "cut.gguf")
    whole = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
        load(tmp_path, gguf_file="cut.gguf")


def test_gguf_keeps_weights_that_can_be_trained(monkeypatch):
    monkeypatch.setattr(weight_formats_module, "find_spec", lambda name: object())
    arguments = gguf_arguments("owner/model", "a.gguf", "model.student")  # a hub id: no file to look for
    assert arguments["gguf_file"] == "a.gguf" and arguments["quantization_config"].dequantize


# 4 bits: the loading itself needs a CUDA device and bitsandbytes, and has not been run on one


def test_4_bits_without_a_cuda_device(tmp_path):
    save_pair(tmp_path)
    with pytest.raises(
        InputError, match=r"model\.lora\.load_in_4bit must be false without a CUDA device, got true on cpu"
    ):
        load(tmp_path / "student", in_4_bit=True)


def test_4_bits_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(weight_formats_module, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(
        InputError,
        match=r"load_in_4bit must be false without .*got no bitsandbytes \(pip install bitsandbytes accelerate\)",
    ):
        four_bit_arguments(torch.bfloat16, torch.device("cuda"))


def test_4_bits_are_those_of_qlora_and_stay_where_they_are_loaded(monkeypatch, tmp_path):
    made, seen = [], {}
    monkeypatch.setattr(weight_formats_module, "find_spec", lambda name: object())
    monkeypatch.setattr(
        weight_formats_module, "BitsAndBytesConfig", lambda **fields: made.append(SimpleNamespace(**fields)) or made[-1]
    )

    def from_pretrained(source, **arguments):
        seen.update(arguments)
        model = make_model(0)
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("packed weights cannot be moved"))
        return model, {"missing_keys": []}

    monkeypatch.setattr(models_module.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    device = torch.device("cuda")
    load(tmp_path, in_4_bit=True, device=device, dtype="bfloat16")
    assert seen["quantization_config"] is made[0] and seen["device_map"] == {"": device}
    assert vars(made[0]) == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
