"""Does the real-model demo train its teacher on the response only, measure what it says, and go on after a stop?

`pytest tests/distill/test_real_demo.py` (nothing is downloaded)
"""

import io
import json
import math
import os
import signal

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esr_distill import train as training
from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.real_demo import fetch_smollm2 as fetching
from esr_distill.real_demo import fine_tune_teacher as fine_tuning
from esr_distill.real_demo import run as demo
from esr_distill.real_demo.gsm8k import (
    Problem,
)
from esr_distill.real_demo.measurement import TEACHER_FORMAT, final_answer, ratio
from esr_distill.real_demo.remembered import remembered
from esr_distill.real_demo.report import running_mean, table_rows, write_picture
from esr_distill.real_demo.settings import RealDemoConfig

WORDS = ["<pad>", "<eos>", "user", "assistant", "system", ":", "how", "many", "one", "two", "three", "is", "####"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CPU = torch.device("cpu")


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_measurement_is_repeated_only_with_other_settings(tmp_path):
    path, calls = tmp_path / "measured" / "x.json", []

    def measure():
        calls.append(1)
        return {"value": len(calls)}

    assert [remembered(path, {"n": n}, measure)["value"] for n in (1, 1, 2, 2, 1)] == [1, 1, 2, 2, 3]


# The teacher


def chat_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(context: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=context,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


CHAT = DataConfig(prompts="-", system_prompt="how")


def test_prompt_and_response_ids_by_hand():
    rows = fine_tuning.encode_solutions(chat_tokenizer(), [Problem("how many", "one is #### two", "two")], CHAT)
    # system : how user : how many assistant :          one is #### two <eos>
    assert rows == [([4, 5, 6, 2, 5, 6, 7, 3, 5], [8, 11, 12, 9, 1])]


def test_labels_cover_the_response_and_its_eos_only():
    rows = [([4, 5, 6], [8, 9, 1]), ([4], [10, 1])]
    ids, mask, labels = fine_tuning.make_batch(rows, pad_id=1)  # pad is EOS, as in SmolLM2
    assert ids.tolist() == [[4, 5, 6, 8, 9, 1], [4, 10, 1, 1, 1, 1]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 8, 9, 1], [-100, 10, 1, -100, -100, -100]]


def test_response_loss_is_the_models_own():
    model, batch = tiny_llama(), fine_tuning.make_batch([([4, 5, 6], [8, 9, 1]), ([4], [10, 1])], pad_id=1)
    ids, mask, labels = batch
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(fine_tuning.response_loss(model, *batch), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_fine_tuning_lowers_the_loss(autocast):
    model, rows = tiny_llama(), [([4, 5, 6], [8, 9, 1])] * fine_tuning.BATCH_SIZE
    losses = fine_tuning.fine_tune(model, rows * 12, 12, pad_id=1, autocast=autocast, console=quiet_console())
    assert len(losses) == 12
    # Step 0 has learning rate 0 in the warm-up; from a random model the loss starts near the uniform one.
    assert abs(losses[0] - math.log(len(WORDS))) < 0.3
    assert losses[-1] < losses[0] - 0.005
    assert losses[-1] < min(losses[:-2])


def test_fine_tuning_under_autocast_sees_the_updated_weights():
    rows = [([4, 5, 6], [8, 9, 1])] * fine_tuning.BATCH_SIZE
    runs = [
        fine_tuning.fine_tune(tiny_llama(), rows * 20, 20, pad_id=1, autocast=autocast, console=quiet_console())
        for autocast in (False, True)
    ]
    falls = [losses[0] - losses[-1] for losses in runs]
    assert falls[1] == pytest.approx(falls[0], rel=0.05)


def test_teacher_is_saved_and_used_again(tmp_path):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    tiny_llama().save_pretrained(student)
    chat_tokenizer().save_pretrained(student)
    problems = [Problem("how many", "one is #### two", "two")] * 2 * fine_tuning.BATCH_SIZE

    def make(steps: int) -> dict:
        return fine_tuning.fine_tune_teacher(
            student, teacher, problems, CHAT, quiet_console(), steps=steps, device=CPU, autocast=False
        )

    first = make(2)
    saved = LlamaForCausalLM.from_pretrained(teacher)
    assert saved.dtype == torch.bfloat16 and len(first["loss"]) == 2
    assert not torch.equal(saved.float().lm_head.weight, tiny_llama().lm_head.weight.bfloat16().float())
    assert make(2) == first
    assert len(make(1)["loss"]) == 1


# Measures and report


@pytest.mark.parametrize(
    ("reply", "expected"), [("so 3\n#### 3", True), ("####$4", True), ("#### none", False), ("## 3", False)]
)
def test_teacher_format(reply, expected):
    assert (TEACHER_FORMAT.search(reply) is not None) is expected


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("2+3=5\n#### 1,005", "1005"), ("#### 5\n#### 6", "5"), ("so 2+3 makes $5.", "5"), ("none", None)],
)
def test_final_answer(reply, answer):
    assert final_answer(reply) == answer


def test_means_by_hand():
    assert ratio(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == 1.0
    assert ratio(torch.zeros(2), torch.zeros(2)) is None
    assert running_mean([1.0, 2.0, 6.0, 7.0], 1) == [1.5, 3.0, 5.0, 6.5]


def test_report_shows_the_numbers(tmp_path):
    model = {"accuracy": 0.25, "standard_error": 0.125, "count": 12, "mean_length": 70.4, "finished": 0.5}
    model |= {"teacher_format": 0.75, "reverse_kl_inside_horizon": 0.5, "reverse_kl_past_horizon": None}
    model |= {"reverse_kl_by_position": [0.5, 0.25], "rollouts_by_position": [12, 12]}
    results = {
        "settings": {"horizon": 1, "steps": 2, "seed": 0, "problems": 12},
        "machine": {"gpu": None, "processor": "a processor", "torch_threads": 1},
        "models": {"student before": model, "student after": model},
        "distillation": {"loss": [0.5, 0.25], "config": {"rollout": {"batch_size": 4}}},
    }
    assert table_rows(results)[0] == ("student before", "25.0 ± 12.5", "75", "50", "70", "0.500", "")
    write_picture(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "least"), [("teacher_steps", 1), ("steps", 1), ("horizon", 1), ("problems", 2)])
def test_counts_have_a_least_value(name, least):
    with pytest.raises(InputError, match=f"{name} must be >= {least}, got {least - 1}"):
        RealDemoConfig(**{name: least - 1})


def test_ctrl_c_ends_with_130(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fetch_smollm2", interrupted)
    assert demo.run_real_demo(RealDemoConfig(output_dir=str(tmp_path))) == 130


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    """A function that runs the whole demo on a tiny random model in place of the fetched one."""

    def fetch(models_dir, console):
        folder = models_dir / fetching.MODEL_NAME
        if not folder.exists():
            tiny_llama(context=512).save_pretrained(folder)
            chat_tokenizer().save_pretrained(folder)
            (folder / fetching.ORIGIN).write_text('{"seconds": 0.5}')
        return folder

    monkeypatch.setattr(demo, "fetch_smollm2", fetch)
    settings = {"teacher_steps": 1, "steps": 2, "horizon": 3, "problems": 3, "autocast": "off", "device": "cpu"}
    return lambda: demo.run_real_demo(RealDemoConfig(output_dir=str(tmp_path), **settings))


def test_stopped_demo_goes_on_and_a_finished_one_repeats_nothing(tiny_demo, monkeypatch, tmp_path):
    real_step = training.train_step
    steps, threads = [], torch.get_num_threads()

    def step_with_ctrl_c(run, step, *more):
        steps.append(step)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(run, step, *more)

    monkeypatch.setattr(training, "train_step", step_with_ctrl_c)
    assert tiny_demo() == 130
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(fine_tuning, "fine_tune", lambda *_, **__: pytest.fail("the teacher was made again"))
    assert tiny_demo() == 0
    assert steps == [0, 1]

    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(results["distillation"]["loss"]), len(results["teacher"]["loss"])] == [2, 1]
    assert results["distillation"]["trained_tokens"] <= 2 * demo.ROLLOUT_BATCH_SIZE * 3
    assert results["machine"]["torch_threads"] == threads
    after = results["models"]["student after"]
    assert after["count"] == 3 and len(after["reverse_kl_by_position"]) <= 6
    assert after["reverse_kl_inside_horizon"] > 0
    assert results["stage_seconds"]["fetch and convert"] == 0.5
    assert (tmp_path / "demo-real.png").stat().st_size > 10_000

    monkeypatch.setattr(demo.Measurement, "of", lambda *_: pytest.fail("a model was measured again"))
    assert tiny_demo() == 0
    assert steps == [0, 1]
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["models"] == results["models"] and again["distillation"] == results["distillation"]
