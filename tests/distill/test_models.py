"""Are models loaded whole or refused with a reason, and is every way to stop known?  pytest tests/distill/test_models.py"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, PAD, VOCAB_SIZE, make_model, make_tokenizer, save_pair

from esr_distill.input_error import InputError
from esr_distill.models import StopIds, choose_attention, choose_device, find_stop_ids, load_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return folder / "student"


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "student")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(source, **changed):
    options = {"dtype": "float32", "attn_implementation": "sdpa", "device": CPU} | changed
    return load_model(str(source), "model.student", **options)


# Loading


@pytest.mark.parametrize(
    ("name", "device", "is_in_16_bits", "is_installed", "expected"),
    [
        ("auto", "cuda", True, True, "flash_attention_2"),
        ("auto", "cuda", True, False, "sdpa"),
        ("auto", "cuda", False, True, "sdpa"),
        ("auto", "cpu", True, True, "sdpa"),
        ("eager", "cuda", True, True, "eager"),
        ("flash_attention_2", "cuda", True, False, "flash_attention_2"),
    ],
)
def test_attention_that_auto_stands_for(monkeypatch, name, device, is_in_16_bits, is_installed, expected):
    monkeypatch.setattr("esr_distill.models.is_flash_attn_2_available", lambda: is_installed)
    assert choose_attention(name, torch.device(device), is_in_16_bits=is_in_16_bits) == expected


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_saved_model_comes_back(saved, attn_implementation):
    model = load(saved, attn_implementation=attn_implementation)
    for name, parameter in make_model(0).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert model.get_parameter(name).requires_grad
    assert not model.training
    assert model.config._attn_implementation == attn_implementation


def test_dtype(saved):
    model = load(saved, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, make_model(0).lm_head.weight.to(torch.bfloat16))


def test_a_saved_tokenizer_comes_back(saved):
    tokenizer = load_tokenizer(str(saved), "model.student")
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer("1+2=")["input_ids"] == make_tokenizer()("1+2=")["input_ids"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", r"model\.student must be a folder with a saved model and tokenizer, got '/no/such/folder'"),
        ("./nothing", r"model\.student must be a folder with a saved model and tokenizer, got '\./nothing'"),
        (
            "nobody/no-model",
            r"model\.student must be a local folder or a hub id that can be reached, got 'nobody/no-mod",
        ),
        ("a/b/c", r"model\.student must be a local folder or a hub id that can be reached, got 'a/b/c'"),
    ],
)
def test_unknown_sources(source, message):
    with pytest.raises(InputError, match=message):
        load(source)
    with pytest.raises(InputError, match=message):
        load_tokenizer(source, "model.student")


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"model\.teacher must be a folder with a saved model"):
        load_tokenizer(str(tmp_path), "model.teacher")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, bad):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.student must have finite weights, got .* in model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(folder)


def test_pickled_weights_are_refused(folder):
    """A pickle can run any code when it is read."""
    (folder / "model.safetensors").unlink()
    torch.save(make_model(0).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        InputError,
        match=r"model\.student must be a folder with weights in safetensors, got .* a pickle, which can run code",
    ):
        load(folder)


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    trace = tmp_path / "was_run"
    (folder / "modeling_own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {name: "modeling_own.Own" for name in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
        load(folder)
    assert not trace.exists()


def test_weights_that_are_not_there(folder):
    """transformers would go on with random ones."""
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"must have saved weights for all of LlamaForCausalLM, got none for lm_head"):
        load(folder)


def test_tied_weights_need_no_second_copy(tmp_path):
    model = make_model(0, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).lm_head.weight, model.model.embed_tokens.weight)


def test_damaged_folders(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
        load(folder)
    (folder / "model.safetensors").write_bytes(whole)

    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
        load(folder)
    (folder / "config.json").write_text(config[: len(config) // 2])
    with pytest.raises(InputError, match=r"model\.student must be a folder with a saved model"):
        load(folder)


def test_flash_attention_on_a_cpu(saved):
    with pytest.raises(InputError, match=r"model\.attn_implementation must be sdpa or eager on a CPU"):
        load(saved, attn_implementation="flash_attention_2")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(InputError, match=r"model\.device must be cpu or auto .*, got 'cuda'"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU


# Stop ids


def model_stopping_at(eos_ids: int | list[int] | None, seed: int = 0, **overrides):
    model = make_model(seed, **overrides)
    model.generation_config.eos_token_id = eos_ids
    return model


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (None, None, (EOS,)),
        (EOS, EOS, (EOS,)),
        (7, 5, (EOS, 5, 7)),
        ([9, EOS], [18, 9], (EOS, 9, 18)),
        ([0], None, (0, EOS)),
    ],
)
def test_stop_ids_are_the_union(student, teacher, expected):
    stop = find_stop_ids(make_tokenizer(), model_stopping_at(student), model_stopping_at(teacher, 1))
    assert stop == StopIds(expected, PAD)


def test_a_tokenizer_without_special_tokens():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    assert find_stop_ids(tokenizer, model_stopping_at([9, 4])) == StopIds((4, 9), 4)
    with pytest.raises(InputError, match="must name an end-of-sequence id, got none"):
        find_stop_ids(tokenizer, model_stopping_at(None))


def test_the_teachers_tokenizer_may_end_with_another_id():
    """As those of a base model and an instruct model do, although their ids mean the same."""
    theirs = make_tokenizer()
    theirs.eos_token, theirs.pad_token = "#", "."
    models = model_stopping_at(EOS), model_stopping_at([EOS], 1)
    assert find_stop_ids(make_tokenizer(), *models, teacher_tokenizer=theirs) == StopIds((EOS, 17), PAD)
    theirs.eos_token = None
    assert find_stop_ids(make_tokenizer(), *models, teacher_tokenizer=theirs) == StopIds((EOS,), PAD)
    ours = make_tokenizer()
    ours.eos_token = ours.pad_token = None
    theirs.eos_token = "9"
    silent = model_stopping_at(None), model_stopping_at(None, 1)
    assert find_stop_ids(ours, *silent, teacher_tokenizer=theirs) == StopIds((12,), 12)


def test_pad_may_be_eos():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert find_stop_ids(tokenizer, model_stopping_at(EOS)) == StopIds((EOS,), EOS)


def test_a_pad_id_that_the_model_cannot_embed():
    """A pad token added to the tokenizer alone: its id would be looked up, though nothing attends to it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<filler>"})
    assert tokenizer.pad_token_id == VOCAB_SIZE
    assert find_stop_ids(tokenizer, model_stopping_at([9, EOS])) == StopIds((EOS, 9), EOS)
    assert find_stop_ids(tokenizer, model_stopping_at(EOS, vocab_size=32)).pad_id == VOCAB_SIZE


def test_stop_ids_outside_the_vocabulary():
    wide, narrow = model_stopping_at(25, vocab_size=32), model_stopping_at(EOS, 1)
    with pytest.raises(InputError, match=r"end-of-sequence ids must be below the vocabulary size 19, got \[2, 25\]"):
        find_stop_ids(make_tokenizer(), wide, narrow)
    assert find_stop_ids(make_tokenizer(), wide).eos_ids == (EOS, 25)
    with pytest.raises(InputError, match=r"below the vocabulary size 20, got \[2, 25\]"):
        find_stop_ids(make_tokenizer(), wide, vocab_size=20)
