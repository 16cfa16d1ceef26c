"""Does the experiment on the precision of log-probs measure what it says?  pytest tests/bench/test_logprob_precision.py"""

import importlib
import json

import numpy as np
import pytest
import torch

from esr_kernels import ForwardKL, Impl, ReverseKL, gather_logprobs, topk_divergence


@pytest.fixture(scope="module")
def experiment():
    return importlib.import_module("bench.precision.logprob_precision")


@pytest.fixture(scope="module")
def results(experiment, tmp_path_factory):
    output = tmp_path_factory.mktemp("logprob_precision")
    options = ["--rows", "9", "--vocab-size", "3001", "--num-ids", "64", "--noise", "0.5", "0.05"]
    assert experiment.main([*options, "--output", str(output)]) == 0
    return json.loads((output / "logprob_precision.json").read_text())


def test_log_prob_and_gradient_are_those_of_the_reference(experiment):
    logits = np.random.default_rng(0).normal(0, 3, (4, 37))
    tokens = np.array([[0], [36], [5], [5]])
    logprob_N, gradient = experiment.logprob_and_gradient(experiment.below_row_maximum(logits), tokens)
    hidden = torch.tensor(logits, requires_grad=True)
    expected = gather_logprobs(hidden, torch.eye(37, dtype=torch.float64), torch.tensor(tokens), impl=Impl.REFERENCE)
    expected.sum().backward()
    np.testing.assert_allclose(logprob_N, expected[:, 0].detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient, hidden.grad.numpy(), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("name", "divergence"), [("reverse_kl", ReverseKL()), ("forward_kl", ForwardKL())])
def test_top_k_gradients_are_those_of_the_reference(experiment, name, divergence):
    student, teacher = np.random.default_rng(1).normal(0, 2, (2, 4, 37))
    ids = np.argsort(-teacher, axis=-1)[:, :5]
    logprobs = np.take_along_axis(experiment.log_softmax(teacher), ids, axis=-1)
    value_N, gradient = experiment.topk_gradients(experiment.below_row_maximum(student), ids, logprobs)[name]
    hidden = torch.tensor(student, requires_grad=True)
    head, known = torch.eye(37, dtype=torch.float64), (torch.tensor(ids), torch.tensor(logprobs))
    expected = topk_divergence(hidden, head, *known, divergence, impl=Impl.REFERENCE).divergence_N
    expected.sum().backward()
    np.testing.assert_allclose(value_N, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(gradient, hidden.grad.numpy(), rtol=1e-9, atol=1e-15)


def test_picked_ids_are_exact_and_the_other_columns_are_stored(experiment):
    logits = np.random.default_rng(2).normal(7, 5, (3, 300)).astype(np.float32)
    ids = np.array([[0, 299], [5, 130], [7, 8]])
    read = experiment.STORAGES["tile_relative_and_ids"](logits, ids)
    plain = experiment.STORAGES["tile_relative"](logits, ids)
    is_id = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(is_id, ids, True, axis=-1)
    np.testing.assert_array_equal(read[is_id], (logits - logits.max(axis=-1, keepdims=True))[is_id])
    np.testing.assert_array_equal(read[~is_id], plain[~is_id])
    assert (plain[~is_id] != (logits - logits.max(axis=-1, keepdims=True))[~is_id]).mean() > 0.5


def test_tokens_are_drawn_from_the_rows(experiment):
    logits = np.tile(np.log([0.5, 0.2, 0.3]), (20_000, 1))
    tokens = experiment.draw_tokens(logits, np.random.default_rng(3))
    counts = np.bincount(tokens[:, 0], minlength=3) / len(tokens)
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.3], atol=0.015)  # four standard deviations


def test_errors_are_ordered_as_the_bits(results):
    source = results["sources"]["drawn"]
    for column in ("logprob", "largest_logprob", "gradient"):
        errors = source[column]
        assert errors["bfloat16"] > 3 * errors["float16"] > 9 * errors["tile_relative_and_ids"] > 0, column
        assert errors["float32"] < 1e-5
    for level in source["topk"]:
        assert level["reverse_kl"]["bfloat16"] > 100 * level["reverse_kl"]["tile_relative_and_ids"]
        assert level["reverse_kl"]["tile_relative"] > 3 * level["reverse_kl"]["tile_relative_and_ids"]
    near, far = source["topk"][1], source["topk"][0]
    assert near["noise"] == 0.05 and near["value"]["reverse_kl"] < far["value"]["reverse_kl"]
    assert near["reverse_kl"]["bfloat16"] > far["reverse_kl"]["bfloat16"]


def test_recording_needs_a_model(experiment, capsys):
    with pytest.raises(SystemExit):
        experiment.main(["--record"])
    assert "--record needs --model" in capsys.readouterr().err
