"""Does a run train an adapter and nothing else, and resume it to the bit?  pytest tests/distill/test_lora_runs.py"""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_config import REQUIRED, parse
from test_train import interrupt_after, losses, record_rollouts, tiny_config
from tiny_models import make_model, make_tokenizer
from whole_logits import reverse_kl_of_rollouts

from esr_distill.checkpoint import find_checkpoints
from esr_distill.command_line import main
from esr_distill.config import EvaluationConfig, ModelConfig, TrainConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.config_file import load_saved_config, save_config
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.models import load_model
from esr_distill.models.adapters import adapter_weights, add_adapter, save_adapter
from esr_distill.train import train
from esr_distill.training_run import prepare_run

pytest.importorskip("peft", reason="peft is optional")

LORA = LoraSettings(use_peft=True, lora_r=4, lora_alpha=8)


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def lora_config(folder: Path, name: str = "run", lora: LoraSettings = LORA, **changed) -> TrainConfig:
    steps = changed.pop("steps", 4)
    config = tiny_config(folder, name, steps)
    return replace(config, model=replace(config.model, lora=lora, **changed))


def save_random_adapter(folder: Path, lora: LoraSettings = LORA) -> Path:
    """An adapter of the student in `folder` that does something."""
    model = load_model(
        str(folder / "student"),
        "model.student",
        dtype="float32",
        attn_implementation="sdpa",
        device=torch.device("cpu"),
    )
    add_adapter(model, lora, 0)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_weights(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


def merged_student(folder: Path, adapter: Path, lora: LoraSettings = LORA):
    """The student with W + alpha / r B A for W, from the files."""
    model, weights = make_model(0), load_file(adapter / "adapter_model.safetensors")
    names = {name.rsplit(".lora_", 1)[0] for name in weights}
    with torch.no_grad():
        for name in names:
            layer = model.get_submodule(name.removeprefix("base_model.model."))
            product = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
            layer.weight += lora.lora_alpha / lora.lora_r * product
    assert len(names) == 14
    return model


def test_a_run_with_dropout_trains_the_adapter_alone(tmp_path, console):
    config = lora_config(tmp_path)
    run = prepare_run(config, console)
    assert run.student.training
    train(config, console)
    checkpoint = find_checkpoints(tmp_path / "run")[-1]
    trained = load_file(checkpoint / "adapter_model.safetensors")
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    fresh = adapter_weights(run.student)
    for name, tensor in fresh.items():
        assert not torch.equal(trained[f"base_model.model.{name}"], tensor), name
    base = make_model(0)
    for name, parameter in base.named_parameters():
        layer = name.removesuffix(".weight")
        adapted = f"{layer}.base_layer.weight"
        names = dict(run.student.named_parameters())
        assert torch.equal(names[adapted if adapted in names else name], parameter)


def test_a_run_resumed_with_dropout_is_the_same_to_the_bit(tmp_path, console, monkeypatch):
    """And evaluations between the steps change nothing."""
    lora = replace(LORA, lora_dropout=0.5)
    asked = EvaluationConfig(str(tmp_path / "prompts.jsonl"), every=2, max_tokens=6, limit=8)
    whole = replace(lora_config(tmp_path, "whole", lora, steps=6), evaluation=asked)
    halted = lora_config(tmp_path, "halted", lora, steps=6)
    assert train(whole, console).finished
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert train(halted, console).step == 3
    torch.manual_seed(99)  # what another process would find
    assert train(halted, console, resume=True).finished
    assert losses(halted) == losses(whole) and len(losses(whole)) == 6
    folders = [find_checkpoints(tmp_path / run)[-1] for run in ("whole", "halted")]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 28
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in folders]
    torch_states = [state["random_states"][0]["torch_random_state"] for state in states]
    assert torch.equal(*torch_states)
    for index, state in states[0]["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], states[1]["optimizer"]["state"][index]["exp_avg_sq"])


def test_dropout_is_drawn_from_the_seed(tmp_path, console):
    """Loss of the second step: that of the first does not depend on the adapter, which still is a product with zeros."""
    lora = replace(LORA, lora_dropout=0.5)
    seen = {}
    for name, settings in {"a": lora, "b": lora, "none": replace(LORA, lora_dropout=0.0)}.items():
        torch.manual_seed(len(seen))
        config = lora_config(tmp_path, name, settings, steps=3)
        train(config, console)
        seen[name] = losses(config)
    assert seen["a"] == seen["b"]
    assert seen["a"][0] == seen["none"][0] and seen["a"][2] != seen["none"][2]


def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(tmp_path, console):
    from peft import AutoPeftModelForCausalLM

    config = lora_config(tmp_path, steps=2)
    checkpoint = train(config, console).checkpoint
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", "README.md"} <= names
    assert not names & {"model.safetensors", "config.json"}
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    sizes = sorted(state["exp_avg"].numel() for state in saved["state"].values())
    assert sizes == sorted(tensor.numel() for tensor in adapter.values()) and len(sizes) == 28

    ids_1_T = torch.tensor([[1, 5, 13, 7]])
    with torch.no_grad():
        expected = merged_student(tmp_path, checkpoint)(ids_1_T).logits
        ours = load_model(
            str(checkpoint), "model", dtype="float32", attn_implementation="sdpa", device=torch.device("cpu")
        )
        torch.testing.assert_close(ours(ids_1_T).logits, expected, atol=1e-4, rtol=1e-5)
        theirs = AutoPeftModelForCausalLM.from_pretrained(checkpoint)(ids_1_T).logits
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-5)


def test_the_loss_is_that_of_student_and_base_model(tmp_path, console, monkeypatch):
    """Teacher self, from a saved adapter on; both sides worked out from whole models and whole logits."""
    tiny_config(tmp_path)
    adapter = save_random_adapter(tmp_path)
    lora = replace(LORA, start_from=str(adapter), lora_dropout=0.0)
    config = lora_config(tmp_path, lora=lora, teacher="self", steps=3)
    seen = []
    record_rollouts(monkeypatch, seen)
    train(config, console)
    with torch.no_grad():
        expected = reverse_kl_of_rollouts(merged_student(tmp_path, adapter), make_model(0), seen[0]).item()
    assert losses(config)[0] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1 and losses(config)[-1] != losses(config)[0]


def test_teacher_self_begins_at_zero_without_an_adapter_to_start_from(tmp_path):
    text = StringIO()
    config = lora_config(tmp_path, teacher="self", steps=2)
    train(config, Console(file=text, width=300))
    assert losses(config)[0] == pytest.approx(0.0, abs=1e-6)
    assert "teacher: the student without its adapter" in text.getvalue()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("backend", ["inprocess", "hf_generate"])
def test_teacher_self_runs_with_every_backend_and_early_prompts(tmp_path, console, backend, early):
    tiny_config(tmp_path)
    lora = replace(LORA, start_from=str(save_random_adapter(tmp_path)))
    config = lora_config(tmp_path, lora=lora, teacher="self", steps=2)
    config = replace(config, rollout=replace(config.rollout, backend=backend, overlap_teacher=early))
    train(config, console)
    assert all(0.01 < loss < 100 for loss in losses(config))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("teacher", ["self", None])
def test_gradient_checkpointing_changes_no_loss(tmp_path, console, dropout, teacher):
    tiny_config(tmp_path)
    lora = replace(LORA, start_from=str(save_random_adapter(tmp_path)), lora_dropout=dropout)
    others = {} if teacher is None else {"teacher": teacher}
    found = []
    for is_on in (False, True):
        config = lora_config(tmp_path, str(is_on), lora, gradient_checkpointing=is_on, steps=3, **others)
        train(config, console)
        found.append(losses(config))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_gradient_checkpointing_of_all_weights_changes_no_loss(tmp_path, console):
    found = []
    for is_on in (False, True):
        config = tiny_config(tmp_path, str(is_on), steps=4)
        train(replace(config, model=replace(config.model, gradient_checkpointing=is_on)), console)
        found.append(losses(config))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("precision", [{"autocast": True}, {"dtype": "bfloat16", "teacher_dtype": "bfloat16"}])
def test_an_adapter_in_16_bits_resumes_to_the_bit(tmp_path, console, monkeypatch, precision):
    runs = [lora_config(tmp_path, name, gradient_checkpointing=True, **precision) for name in ("whole", "halted")]
    train(runs[0], console)
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        train(runs[1], console)
    train(runs[1], console, resume=True)
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == 4
    trained = load_file(find_checkpoints(tmp_path / "whole")[-1] / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_a_teacher_may_be_an_adapter(tmp_path, console, monkeypatch):
    config = tiny_config(tmp_path, steps=1)
    adapter = save_random_adapter(tmp_path)
    make_tokenizer().save_pretrained(adapter)
    seen = []
    record_rollouts(monkeypatch, seen)
    train(replace(config, model=replace(config.model, teacher=str(adapter))), console)
    with torch.no_grad():
        expected = reverse_kl_of_rollouts(make_model(0), merged_student(tmp_path, adapter), seen[0]).item()
    assert losses(config)[0] == pytest.approx(expected, rel=1e-4)


def test_the_eval_command_takes_a_checkpoint_with_an_adapter(tmp_path, console):
    """Its replies are those of the run's own evaluation."""
    config = lora_config(tmp_path, steps=2)
    prompts = config.data.prompts
    config = replace(config, evaluation=EvaluationConfig(prompts, every=2, max_tokens=6))
    checkpoint = train(config, console).checkpoint
    output = tmp_path / "accuracy.json"
    options = {"model": checkpoint, "prompts": prompts, "chat_template": "false", "max_tokens": 6, "output": output}
    assert main(["eval", *(f"--{name}={value}" for name, value in options.items())]) == 0
    measured = json.loads(output.read_text())
    during = read_metrics(tmp_path / "run" / "metrics.jsonl", "evaluation")[-1]
    assert during["step"] == 2
    assert all(measured[name] == during[name] for name in ("accuracy", "count", "mean_length", "finished"))


# What is refused


def test_a_student_that_is_an_adapter_is_refused(tmp_path, console):
    tiny_config(tmp_path)
    adapter = save_random_adapter(tmp_path)
    make_tokenizer().save_pretrained(adapter)
    with pytest.raises(
        InputError, match=r"model\.student must be a whole model, got .*adapter'.*set model\.student to the"
    ):
        prepare_run(lora_config(tmp_path, student=str(adapter)), console)


def test_going_on_as_another_kind_of_run_is_refused(tmp_path, console):
    whole, adapter = tiny_config(tmp_path, "whole", steps=1), lora_config(tmp_path, "adapter", steps=1)
    train(whole, console)
    train(adapter, console)
    with pytest.raises(
        InputError, match=r"the checkpoint must hold an adapter \(adapter_config\.json\), got .*has none"
    ):
        train(replace(adapter, run=whole.run), console, resume=True)
    with pytest.raises(InputError, match=r"model\.student must be a whole model, got"):
        train(replace(whole, run=adapter.run), console, resume=True)
    other_rank = replace(adapter, model=replace(adapter.model, lora=replace(LORA, lora_r=5)))
    with pytest.raises(InputError, match=r"the checkpoint must hold an adapter whose r is 5, got 4"):
        train(other_rank, console, resume=True)


def test_the_options_of_other_groups_that_do_not_fit(tmp_path, console):
    config = lora_config(tmp_path)
    rollout = replace(config.rollout, backend="vllm", vllm_url="http://h:1", vllm_weights_folder="w")
    with pytest.raises(
        InputError, match=r"rollout\.backend must be inprocess or hf_generate with model\.lora\.use_peft"
    ):
        prepare_run(replace(config, rollout=rollout), console)
    with pytest.raises(
        InputError, match=r"model\.teacher_offload must be false without a CUDA device, got true on cpu"
    ):
        prepare_run(replace(config, model=replace(config.model, teacher_offload=True)), console)
    with pytest.raises(
        InputError, match=r"model\.lora\.load_in_4bit must be false without a CUDA device, got true on cpu"
    ):
        prepare_run(lora_config(tmp_path, lora=replace(LORA, load_in_4bit=True)), console)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LoraSettings(lora_r=8),
            r"model\.lora\.lora_r must be 32 or unset unless model\.lora\.use_peft is true, got 8",
        ),
        (
            lambda: LoraSettings(load_in_4bit=True),
            r"model\.lora\.load_in_4bit must be False or unset unless .*use_peft is true",
        ),
        (lambda: LoraSettings(use_peft=True, lora_r=0), r"model\.lora\.lora_r must be >= 1, got 0"),
        (lambda: LoraSettings(use_peft=True, lora_alpha=0), r"model\.lora\.lora_alpha must be > 0, got 0"),
        (lambda: LoraSettings(use_peft=True, lora_dropout=1.0), r"lora_dropout must be in \[0, 1\), got 1\.0"),
        (
            lambda: LoraSettings(use_peft=True, lora_target_modules=()),
            r"lora_target_modules must be all-linear or at least one name, got \(\)",
        ),
        (
            lambda: ModelConfig("s", "self"),
            r"model\.teacher must be another model unless model\.lora\.use_peft is true",
        ),
        (
            lambda: ModelConfig("self", "t"),
            r"model\.student must be a hub id or a local folder \(\./self is one\), got 'self'",
        ),
        (
            lambda: ModelConfig("s", "self", dtype="bfloat16", lora=LORA),
            r"model\.teacher_dtype must be model\.dtype = bfloat16 for model\.teacher self, got 'float32'",
        ),
        (
            lambda: ModelConfig("s", "self", teacher_gguf_file="a.gguf", lora=LORA),
            r"model\.teacher_gguf_file must be unset for model\.teacher self, got 'a\.gguf'",
        ),
        (
            lambda: ModelConfig("s", "self", teacher_offload=True, lora=LORA),
            r"model\.teacher_offload must be false for model\.teacher self",
        ),
        (
            lambda: ModelConfig("s", "t", student_gguf_file="a.gguf", lora=replace(LORA, load_in_4bit=True)),
            r"model\.lora\.load_in_4bit must be false for a student out of a GGUF file",
        ),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_defaults_are_those_of_the_paper():
    settings = LoraSettings(use_peft=True)
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout) == (32, 64, 0.05)
    assert " ".join(settings.lora_target_modules) == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], LoraSettings()),
        (["--model.lora.use_peft=true", "--model.lora.lora_r=8"], LoraSettings(use_peft=True, lora_r=8)),
        (
            ["--model.lora.use_peft=true", "--model.lora.lora_target_modules=all-linear"],
            LoraSettings(use_peft=True, lora_target_modules="all-linear"),
        ),
        (
            [
                "--model.lora.use_peft=true",
                "--model.lora.lora_target_modules=[q_proj,v_proj]",
                "--model.lora.start_from=a",
            ],
            LoraSettings(use_peft=True, lora_target_modules=("q_proj", "v_proj"), start_from="a"),
        ),
    ],
)
def test_flags_and_the_file_that_a_run_leaves(tmp_path, flags, expected):
    config = parse([*REQUIRED, *flags, f"--run.output_dir={tmp_path}"])
    assert config.model.lora == expected
    save_config(config, tmp_path)
    assert load_saved_config(tmp_path) == config
