"""Does `esr-distill eval` read the models that `train` reads: GGUF files, and code that is trusted?

pytest tests/distill/test_evaluate_command.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_gguf import save_gguf
from tiny_models import make_model, make_tokenizer, write_prompts
from transformers import AutoTokenizer

from esr_distill.command_line import main
from esr_distill.config import EvalConfig
from esr_distill.input_error import InputError


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def evaluate(model: Path, output: Path, **options) -> int:
    """The status of `eval` on five sums, with the replies in `output`."""
    write_prompts(output.parent / "problems.jsonl", count=5)
    options = {
        "model": model,
        "prompts": output.parent / "problems.jsonl",
        "chat_template": "false",
        "device": "cpu",
        "max_tokens": 7,
        "output": output,
        "save_replies": "true",
    } | options
    return main(["eval", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


def replies(output: Path) -> list[str]:
    return [text for row in json.loads(output.read_text())["problems"] for text in row["replies"]]


# GGUF


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    """Two models as GGUF files, and the first one as safetensors with the tokenizer that transformers reads out of its file."""
    pytest.importorskip("gguf", reason="gguf is optional")
    pytest.importorskip("accelerate", reason="accelerate is optional")
    folder = tmp_path_factory.mktemp("gguf")
    for seed in (0, 1):
        save_gguf(folder / f"model{seed}.gguf", seed)
    make_model(0, vocab_size=21).save_pretrained(folder / "safetensors")
    AutoTokenizer.from_pretrained(folder, gguf_file="model0.gguf").save_pretrained(folder / "safetensors")
    return folder


def test_a_gguf_file_answers_as_the_same_weights_in_safetensors(gguf_folder, tmp_path):
    assert evaluate(gguf_folder / "safetensors", tmp_path / "safetensors.json") == 0
    for seed in (0, 1):
        output = tmp_path / f"model{seed}.json"
        assert evaluate(gguf_folder, output, model_gguf_file=f"model{seed}.gguf") == 0
        assert json.loads(output.read_text())["options"]["model_gguf_file"] == f"model{seed}.gguf"
    expected = replies(tmp_path / "safetensors.json")
    assert any(expected) and len(expected) == 5
    assert replies(tmp_path / "model0.json") == expected != replies(tmp_path / "model1.json")


def test_a_gguf_file_that_is_not_there(gguf_folder, tmp_path, capsys):
    assert evaluate(gguf_folder, tmp_path / "out.json", model_gguf_file="other.gguf") == 2
    error = capsys.readouterr().err
    assert f"eval: model_gguf_file must be the name of a file in '{gguf_folder}', got 'other.gguf'" in error


def test_an_empty_name_is_no_file():
    with pytest.raises(InputError, match=r"^model_gguf_file must be the name of a file or unset, got ''"):
        EvalConfig(model="m", prompts="p", model_gguf_file="")


# A cut vocabulary


def test_a_cut_vocabulary_answers_as_the_model_without_surplus_ids(tmp_path, capsys):
    """The head has ids that the tokenizer does not know, and likes them best."""
    model, narrow = make_model(0, vocab_size=25), make_model(0)
    narrow.load_state_dict(
        {name: weight[: len(narrow.state_dict()[name])] for name, weight in model.state_dict().items()}
    )
    with torch.no_grad():
        model.lm_head.weight[19:] = 3 * model.lm_head.weight[4:10]
    for folder, saved in (("model", model), ("narrow", narrow)):
        saved.save_pretrained(tmp_path / folder)
        make_tokenizer().save_pretrained(tmp_path / folder)
        assert evaluate(tmp_path / folder, tmp_path / f"{folder}.json") == 0
    assert evaluate(tmp_path / "model", tmp_path / "cut.json", vocab_size=19) == 0
    whole, cut, expected = (replies(tmp_path / f"{name}.json") for name in ("model", "cut", "narrow"))
    assert cut == expected != whole and any(cut)
    assert json.loads((tmp_path / "cut.json").read_text())["options"]["vocab_size"] == 19
    for vocab_size in (18, 26):
        assert evaluate(tmp_path / "model", tmp_path / "bad.json", vocab_size=vocab_size) == 2
        assert (
            "eval: vocab_size must be above the tokenizer's largest id 18 and at most 25, the width of the model's output "
            f"head, got {vocab_size}" in capsys.readouterr().err
        )
    with pytest.raises(InputError, match=r"^vocab_size must be >= 1 or unset, got 0"):
        EvalConfig(model="m", prompts="p", vocab_size=0)


def test_another_cut_is_named_in_a_comparison(tmp_path, capsys):
    folder = tmp_path / "[/b] model"
    make_model(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert evaluate(folder, tmp_path / "one.json") == 0
    assert evaluate(folder, tmp_path / "two.json", vocab_size=19, compare=tmp_path / "one.json") == 0
    printed = capsys.readouterr().out
    assert "vocab_size is 19 here and None there\n" in printed
    assert f"\n{folder}: accuracy " in printed and f"problems, this model minus {folder}\n" in printed


# Code of a model


@pytest.mark.parametrize("is_trusted", [False, True])
def test_code_beside_a_model_runs_where_it_is_trusted(tmp_path, monkeypatch, capsys, is_trusted):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    trace, model = tmp_path / "was_run", tmp_path / "model"
    make_model(0).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    assert evaluate(model, tmp_path / "plain.json") == 0
    (model / "modeling_evaluated.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class EvaluatedConfig(LlamaConfig):\n    model_type = 'evaluated'\n"
        "class EvaluatedForCausalLM(LlamaForCausalLM):\n    config_class = EvaluatedConfig\n"
    )
    names = {
        "AutoConfig": "modeling_evaluated.EvaluatedConfig",
        "AutoModelForCausalLM": "modeling_evaluated.EvaluatedForCausalLM",
    }
    config = json.loads((model / "config.json").read_text()) | {"auto_map": names, "model_type": "evaluated"}
    (model / "config.json").write_text(json.dumps(config))
    status = evaluate(model, tmp_path / "out.json", trust_remote_code=str(is_trusted).lower())
    assert trace.exists() is is_trusted
    if is_trusted:
        assert status == 0 and replies(tmp_path / "out.json") == replies(tmp_path / "plain.json")
    else:
        assert status == 2 and "eval: model must be a folder with a saved model" in capsys.readouterr().err
