"""Does the experiment on logit precision measure what it says?  pytest tests/bench/test_logit_precision.py"""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, ReverseKL, token_divergence

SMALL = ["--rows", "6", "--vocab-size", "3001", "--hidden-size", "16", "--confident-rows", "3"]


@pytest.fixture(scope="module")
def experiment():
    return importlib.import_module("bench.precision.logit_precision")


@pytest.fixture(scope="module")
def results(experiment, tmp_path_factory):
    output = tmp_path_factory.mktemp("logit_precision")
    assert experiment.main([*SMALL, "--noise", "0.5", "0.05", "--output", str(output)]) == 0
    assert (output / "logit_precision.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "logit_precision.json").read_text())


def errors(results: dict, noise: float, divergence: str, quantity: str) -> dict:
    (level,) = [level for level in results["sources"]["drawn"]["levels"] if level["noise"] == noise]
    return level["divergences"][divergence][quantity]


def test_bfloat16_rounding_is_that_of_torch(experiment):
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    ties = np.arange(0x3F80_0000, 0x3F90_0000, 0x8000, dtype=np.uint32)  # halfway between neighbours, to even
    edges = np.array([0, 1, 0x7F7F_FFFF, 0x7F80_0000, 0xFF80_0000, 0x7FFF_FFFF, 0xFFFF_FFFF], dtype=np.uint32)
    values = np.concatenate([bits, ties, edges]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(experiment.round_to_bfloat16(values), expected)


def test_tile_relative_storage_column_by_column(experiment):
    generator = np.random.default_rng(0)
    teacher = generator.normal(7, 5, (2, 1000)).astype(np.float32)
    student = teacher + generator.normal(0, 0.1, teacher.shape).astype(np.float32)
    apart = experiment.LOGIT_STORAGES["tile_relative_apart"](student, teacher)
    student_read, teacher_read = experiment.LOGIT_STORAGES["tile_relative"](student, teacher)
    np.testing.assert_array_equal(student_read, apart[0])
    for row in range(2):
        for column in (0, 127, 128, 500, 999):
            tile = slice(column // 128 * 128, column // 128 * 128 + 128)
            (s, s_max), (t, t_max) = ((side[row, column], side[row, tile].max()) for side in (student, teacher))
            s_stored, t_stored = np.float16(s - s_max), np.float16(t - t_max)
            assert apart[0][row, column] == np.float32(s_stored) + (s_max - student[row].max())
            assert apart[1][row, column] == np.float32(t_stored) + (t_max - teacher[row].max())
            if s_stored >= -8:
                t_stored = np.float32(np.float16((t - t_max) - (s - s_max))) + np.float32(s_stored)
            assert teacher_read[row, column] == np.float32(t_stored) + (t_max - teacher[row].max())


def test_the_order_in_memory_changes_nothing(experiment):
    student, teacher = np.random.default_rng(0).normal(-9, 2, (2, 3, 5000)).astype(np.float32)
    rows = experiment.values_and_gradients(student, teacher)
    columns = experiment.values_and_gradients(np.asfortranarray(student), np.asfortranarray(teacher))
    for name, (value_N, gradient) in rows.items():
        np.testing.assert_array_equal(columns[name][0], value_N)
        np.testing.assert_array_equal(columns[name][1], gradient)


def test_values_and_gradients_are_those_of_the_reference(experiment):
    student, teacher = np.random.default_rng(0).normal(0, 3, (2, 4, 37))
    computed = experiment.values_and_gradients(*(experiment.below_row_maximum(x) for x in (student, teacher)))
    for name, divergence in [
        ("forward_kl", ForwardKL()),
        ("reverse_kl", ReverseKL()),
        ("jsd_0.5", GeneralizedJSD(0.5)),
    ]:
        leaf = torch.from_numpy(student).requires_grad_()
        value_N = token_divergence(leaf, torch.from_numpy(teacher), divergence, impl=Impl.REFERENCE).divergence_N
        value_N.sum().backward()
        np.testing.assert_allclose(computed[name][0], value_N.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(computed[name][1], leaf.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.7, 1e4])
def test_the_row_scale_is_a_power_of_two_that_never_overflows(experiment, value):
    bound = 3 + 2 * value
    gradient = np.array([[bound, -bound, 2.0**-13, 0.1]])
    read = experiment.row_scaled_float16(gradient, "reverse_kl", np.array([value]))
    assert np.isfinite(read).all()
    assert read[0, 2] == 2.0**-13
    np.testing.assert_allclose(read, gradient, rtol=2.0**-11)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_storages_are_ordered(results, divergence):
    near = errors(results, 0.05, divergence, "logits")
    assert near["float32"] < near["tile_relative"] < 5e-4
    assert near["tile_relative"] < near["tile_relative_apart"] / 2
    assert near["tile_relative_apart"] < near["float16"] / 5
    assert near["float16"] < near["bfloat16"] / 2
    assert near["bfloat16"] > 0.3
    assert near["bfloat16"] > 2 * errors(results, 0.5, divergence, "logits")["bfloat16"]
    kept = errors(results, 0.05, divergence, "logits_gradient")
    assert 5e-4 < kept["bfloat16"] < 3e-3
    assert kept["row_scaled_float16"] < 5e-4


def test_errors_of_the_hidden_gradient_add_up(results):
    near = errors(results, 0.05, "reverse_kl", "hidden_gradient")
    assert 1e-3 < near["exact"] < 2.5e-3  # the rounding of the result alone
    assert near["bfloat16"] > 1.15 * near["exact"]
    assert near["float32_then_row_scaled_float16"] < 1.1 * near["exact"]
    assert near["bfloat16_then_bfloat16"] > 0.3


def test_the_likeliest_token_loses_its_digits_unless_it_takes_minus_the_others(results):
    assert [row["remainder"] for row in results["confident"]] == [1e-1, 1e-3, 1e-5, 1e-7]
    for row in results["confident"]:
        assert max(way["minus_the_others"] for way in row["divergences"].values()) < 1e-5
    assert max(way["direct"] for way in row["divergences"].values()) > 1e-2


def test_a_result_says_where_it_comes_from_and_repeats(experiment, results, tmp_path):
    assert set(results["machine"]["versions"]) >= {"numpy", "torch"}
    assert results["settings"]["seed"] == 0 and "commit" in results["machine"]
    experiment.main([*SMALL, "--noise", "0.05", "--output", str(tmp_path)])
    again = json.loads((tmp_path / "logit_precision.json").read_text())
    for quantity in ("logits", "hidden_gradient"):
        assert errors(again, 0.05, "reverse_kl", quantity) == errors(results, 0.05, "reverse_kl", quantity)


def save_model(folder: Path, vocab_size: int) -> None:
    """A random model of one layer with a tokenizer of whole words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, initializer_range=1.0)).save_pretrained(folder)
    words = {"[UNK]": 0, "the": 1, "is": 2, "a": 3, "of": 4, "and": 5}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def test_rows_of_a_model(experiment, tmp_path):
    save_model(tmp_path / "tiny", vocab_size=211)
    experiment.main([*SMALL, "--noise", "0.5", "--model", str(tmp_path / "tiny"), "--output", str(tmp_path)])
    results = json.loads((tmp_path / "logit_precision.json").read_text())
    assert set(results["sources"]) == {"drawn", "tiny"}
    source = results["sources"]["tiny"]
    assert source["vocab_size"] == 211
    error = source["levels"][0]["divergences"]["reverse_kl"]["logits"]
    assert error["float32"] < 1e-5 < 1e-3 < error["bfloat16"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--record"], "--record needs --model"),
        (["--rows", "0"], "argument --rows: must be > 0, got 0"),
        (["--noise", "0.1", "-1"], "argument --noise: must be > 0, got -1"),
    ],
)
def test_wrong_arguments_are_errors(experiment, capsys, arguments, message):
    with pytest.raises(SystemExit):
        experiment.main(arguments)
    assert message in capsys.readouterr().err
