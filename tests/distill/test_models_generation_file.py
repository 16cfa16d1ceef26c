"""Is a damaged generation_config.json refused, which transformers passes over; and does a run stop where either tokenizer ends?

pytest tests/distill/test_models_generation_file.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import EOS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

import esr_distill.training_run as training_run_module
from esr_distill.config.lora import LoraSettings
from esr_distill.input_error import InputError
from esr_distill.models import load_model
from esr_distill.models.adapters import add_adapter, save_adapter
from esr_distill.models.train_mode import seed_dropout
from esr_distill.training_run import prepare_run


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def load(folder: Path):
    cpu = torch.device("cpu")
    return load_model(str(folder), "model.teacher", dtype="float32", attn_implementation="sdpa", device=cpu)


READABLE = r"a generation_config\.json that can be read, or none, got .*JSONDecodeError"
IDS = r"a generation_config\.json whose eos_token_id is an id or a list of ids, got "
DAMAGED = [
    ('{"eos_token_id": [2, 1', READABLE),
    ("", READABLE),
    ("[2, 17]", r"a generation_config\.json with an object, got list in "),
    ('{"eos_token_id": "<eos>"}', f"{IDS}'<eos>' in "),
    ('{"eos_token_id": [2, null]}', IDS + r"\[2, None\] in "),
    ('{"eos_token_id": [2, -1]}', IDS + r"\[2, -1\] in "),
]


@pytest.mark.parametrize(("text", "message"), DAMAGED)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    make_model(0).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"^model\.teacher must hold " + message):
        load(tmp_path)


def test_transformers_itself_says_nothing(tmp_path):
    """Else there would be nothing to check."""
    make_model(0).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(DAMAGED[0][0])
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == EOS


@pytest.mark.parametrize(("named", "expected"), [(17, 17), ([2, 17], [2, 17]), (None, None)])
def test_ids_and_lists_of_ids_are_read(tmp_path, named, expected):
    make_model(0).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "generation_config.json").read_text()) | {"eos_token_id": named}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert load(tmp_path).generation_config.eos_token_id == expected


def test_without_the_file_the_models_config_says_it(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).generation_config.eos_token_id == EOS


@pytest.mark.parametrize(("text", "message"), DAMAGED[:3])
def test_a_damaged_file_beside_an_adapter_is_refused(tmp_path, text, message):
    pytest.importorskip("peft", reason="peft is optional")
    make_model(0).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    add_adapter(model, LoraSettings(use_peft=True, lora_r=2), 0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, folder)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"^model\.teacher must hold " + message):
        load(folder)


# The run


def test_a_run_stops_where_the_teachers_tokenizer_ends(tmp_path, console):
    """A teacher that was tuned to answer, on a tokenizer whose end is "#" while both generation configs say <eos>."""
    config = tiny_config(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "#"
    tokenizer.save_pretrained(tmp_path / "teacher")
    run = prepare_run(config, console)
    assert run.stop.eos_ids == (EOS, 17) == run.rollout_request.eos_ids
    assert run.student.generation_config.eos_token_id == [EOS, 17]  # what a checkpoint says


@pytest.mark.parametrize("name", ["b[/x]c", "e[red]x y", "a folder " * 12])
def test_paths_are_printed_as_they_are(tmp_path, name):
    config = tiny_config(tmp_path)
    shutil.move(tmp_path / "student", tmp_path / name)
    printed = Console(record=True, width=60)
    prepare_run(replace(config, model=replace(config.model, student=str(tmp_path / name))), printed)
    assert f"student {tmp_path / name} (0.0 M parameters" in printed.export_text()


def test_the_words_of_a_backend_are_no_markup(tmp_path, monkeypatch):
    """A vLLM server's folder may hold brackets."""

    class Backend:
        def describe(self, student):
            return "weights through /shared/[/run]"

    monkeypatch.setattr(training_run_module, "make_backend", lambda *_, **__: Backend())
    printed = Console(record=True, width=60)
    prepare_run(tiny_config(tmp_path), printed)
    assert "weights through /shared/[/run]\n" in printed.export_text()


@pytest.mark.parametrize(("seed", "rank", "expected"), [(2**64 - 1, 1, 0), (2**64 - 2, 3, 1), (7, 0, 7), (7, 2, 9)])
def test_the_largest_seed_of_a_run_has_neighbours(seed, rank, expected):
    with torch.random.fork_rng(devices=[]):
        seed_dropout(seed, rank)
        drawn = torch.rand(3)
        torch.manual_seed(expected)
        assert torch.equal(drawn, torch.rand(3))
