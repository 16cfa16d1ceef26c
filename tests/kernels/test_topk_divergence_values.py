"""Is topk_divergence the divergence over the K given ids and everything else?

python -m pytest tests/kernels/test_topk_divergence_values.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, softmax

from esr_kernels.divergence import ForwardKL, GeneralizedJSD, ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import make_hidden_pair
from esr_kernels.topk_divergence import topk_divergence

VOCAB = 23


def served_teacher(hidden, weight, num_ids, temperature=1.0):
    """The teacher's most probable ids in a shuffled order, with their log-probabilities, and its full distribution."""
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    ids = logprobs.topk(num_ids, dim=-1).indices
    ids = ids[:, torch.randperm(num_ids, generator=torch.Generator().manual_seed(0))]
    return ids, logprobs.gather(-1, ids), logprobs.exp().numpy()


def with_tail(probabilities: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(rows, V) and (rows, K) -> (rows, K + 1)."""
    given = np.take_along_axis(probabilities, ids, axis=-1)
    rest = np.stack([np.delete(row, row_ids).sum() for row, row_ids in zip(probabilities, ids, strict=True)])
    return np.concatenate([given, rest[:, None]], axis=-1)


@pytest.mark.parametrize("num_ids", [1, 5, VOCAB - 1])
@pytest.mark.parametrize("name", CASES)
def test_value_is_the_formula_over_k_plus_one_events(name, num_ids):
    x, w, y, u = make_hidden_pair(6, VOCAB, 4, 6, gap=1.0, seed=1, dtype=torch.float64)
    ids, logprobs, q = served_teacher(y, u, num_ids, temperature=1.5)
    output = topk_divergence(x, w, ids, logprobs, CASES[name].divergence, loss_temperature=1.5, impl=Impl.REFERENCE)
    p = softmax((x @ w.T).numpy() / 1.5)
    p, q = with_tail(p, ids.numpy()), with_tail(q, ids.numpy())
    np.testing.assert_allclose(output.divergence_N.numpy(), CASES[name].value(p, q), rtol=1e-10)
    np.testing.assert_allclose(output.student_entropy_N.numpy(), -(p * np.log(p)).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(output.teacher_entropy_N.numpy(), -(q * np.log(q)).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_without_tail_bucket_both_sides_are_renormalised(name):
    x, w, y, u = make_hidden_pair(6, VOCAB, 4, 6, gap=1.0, seed=2, dtype=torch.float64)
    ids, logprobs, q = served_teacher(y, u, 5)
    output = topk_divergence(x, w, ids, logprobs, CASES[name].divergence, tail_bucket=False, impl=Impl.REFERENCE)
    p, q = (np.take_along_axis(a, ids.numpy(), axis=-1) for a in (softmax((x @ w.T).numpy()), q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    np.testing.assert_allclose(output.divergence_N.numpy(), CASES[name].value(p, q), rtol=1e-10)


@pytest.mark.parametrize("tail_bucket", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_all_ids_give_the_full_divergence(name, tail_bucket):
    x, w, y, u = make_hidden_pair(6, VOCAB, 4, 6, gap=1.0, seed=3, dtype=torch.float64)
    ids, logprobs, q = served_teacher(y, u, VOCAB)
    output = topk_divergence(x, w, ids, logprobs, CASES[name].divergence, tail_bucket=tail_bucket, impl=Impl.REFERENCE)
    expected = CASES[name].value(softmax((x @ w.T).numpy()), q)
    np.testing.assert_allclose(output.divergence_N.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_tail_bucket_is_a_lower_bound_that_grows_with_the_ids(name):
    x, w, y, u = make_hidden_pair(32, VOCAB, 4, 6, gap=0.7, spread=0.7, seed=4, dtype=torch.float64)
    all_ids, all_logprobs, q = served_teacher(y, u, VOCAB)
    values = [
        topk_divergence(
            x, w, all_ids[:, :k], all_logprobs[:, :k], CASES[name].divergence, impl=Impl.REFERENCE
        ).divergence_N.numpy()
        for k in range(1, VOCAB)
    ]
    values.append(CASES[name].value(softmax((x @ w.T).numpy()), q))
    assert (np.diff(values, axis=0) >= -1e-12).all()
    assert (values[0] >= -1e-12).all()


def test_default_is_forward_kl_with_tail():
    x, w, y, u = make_hidden_pair(3, VOCAB, 4, 6, seed=5, dtype=torch.float64)
    ids, logprobs, q = served_teacher(y, u, 4)
    output = topk_divergence(x, w, ids, logprobs, impl=Impl.REFERENCE)
    p, q = with_tail(softmax((x @ w.T).numpy()), ids.numpy()), with_tail(q, ids.numpy())
    np.testing.assert_allclose(output.divergence_N.numpy(), (q * np.log(q / p)).sum(-1), rtol=1e-10)


def test_head_with_bias_scale_and_softcap():
    """S5."""
    x, w, y, u = make_hidden_pair(4, VOCAB, 4, 6, seed=6, dtype=torch.float64)
    ids, logprobs, q = served_teacher(y, u, 4)
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    head = OutputHead(w, bias, logit_scale=0.5, softcap=2.0)
    output = topk_divergence(x, head, ids, logprobs, ReverseKL(), impl=Impl.REFERENCE)
    p = softmax(2.0 * np.tanh(0.5 * (x.numpy() @ w.numpy().T + bias.numpy()) / 2.0))
    p, q = with_tail(p, ids.numpy()), with_tail(q, ids.numpy())
    np.testing.assert_allclose(output.divergence_N.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_n6_16_bit_hidden_states_are_computed_in_float32(dtype):
    """Small multiples of 1/8 are exact in every dtype, and so are their products in float32."""
    generator = torch.Generator().manual_seed(7)
    x, w = (torch.randint(-8, 9, shape, generator=generator) / 8 for shape in ((5, 4), (VOCAB, 4)))
    ids = torch.arange(6, dtype=torch.int32).expand(5, -1)
    logprobs = torch.full((5, 6), -2.0)
    expected = topk_divergence(x, w, ids, logprobs, impl=Impl.REFERENCE).divergence_N
    output = topk_divergence(x.to(dtype), w.to(dtype), ids, logprobs.to(dtype), impl=Impl.REFERENCE)
    assert output.divergence_N.dtype == torch.float32
    assert torch.equal(output.divergence_N, expected)


def test_float64_log_probabilities_make_float64_outputs():
    x, w, y, u = make_hidden_pair(3, VOCAB, 4, 6, seed=8)
    ids, logprobs, _ = served_teacher(y, u, 4)
    output = topk_divergence(x, w, ids, logprobs.double(), GeneralizedJSD(0.5), impl=Impl.REFERENCE)
    assert all(field.dtype == torch.float64 for field in output)


def test_log_probabilities_are_nan_and_only_the_divergence_is_differentiable():
    x, w, y, u = make_hidden_pair(3, VOCAB, 4, 6, seed=9)
    ids, logprobs, _ = served_teacher(y, u, 4)
    output = topk_divergence(x.requires_grad_(), w, ids, logprobs, ForwardKL(), impl=Impl.REFERENCE)
    assert output.student_logprob_N.isnan().all() and output.teacher_logprob_N.isnan().all()
    assert [field.requires_grad for field in output] == [True, False, False, False, False, False]


def test_top1_agreement_is_of_the_full_student_against_the_best_given_id():
    """Student's best id: 2, 2, 2, 0 (tie of 0 and 1). Teacher's best given id: 2, 3, 1, 0 (tie in its slots)."""
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0], [0.0, 1.0, 5.0, 2.0], [0.0, 1.0, 5.0, 2.0], [3.0, 3.0, 0.0, 0.0]])
    ids = torch.tensor([[3, 2], [3, 2], [3, 1], [1, 0]])
    logprobs = torch.tensor([[0.2, 0.7], [0.7, 0.2], [0.1, 0.2], [0.4, 0.4]]).log()
    output = topk_divergence(logits, torch.eye(4), ids, logprobs, impl=Impl.REFERENCE)
    assert output.top1_agreement_N.tolist() == [1.0, 0.0, 0.0, 1.0]
