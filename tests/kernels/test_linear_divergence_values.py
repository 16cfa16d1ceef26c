"""Is linear_divergence the divergence of the two projected models, whatever their heads, sizes and dtypes?

python -m pytest tests/kernels/test_linear_divergence_values.py
"""

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, softmax

from esr_kernels.divergence import ForwardKL, GeneralizedJSD
from esr_kernels.impl import Impl
from esr_kernels.linear_divergence import linear_divergence
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import make_hidden_pair


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_formula(name):
    """S5: hidden sizes 5 and 8."""
    x, w, y, u = make_hidden_pair(6, 23, 5, 8, gap=1.0, seed=1, dtype=torch.float64)
    output = linear_divergence(x, w, y, u, CASES[name].divergence, loss_temperature=1.5, impl=Impl.REFERENCE)
    p, q = softmax((x @ w.T).numpy() / 1.5), softmax((y @ u.T).numpy() / 1.5)
    np.testing.assert_allclose(output.divergence_N.numpy(), CASES[name].value(p, q), rtol=1e-11)


def test_s5_bias_scale_and_softcap_of_either_side():
    x, w, y, u = make_hidden_pair(6, 23, 5, 8, gap=1.0, seed=2, dtype=torch.float64)
    b, c = torch.linspace(-1, 1, 23, dtype=torch.float64), torch.linspace(2, 0, 23, dtype=torch.float64)
    student_head = OutputHead(w, bias=b, logit_scale=0.25, softcap=3.0)
    teacher_head = OutputHead(u, bias=c, logit_scale=2.0)
    output = linear_divergence(x, student_head, y, teacher_head, ForwardKL(), impl=Impl.REFERENCE)
    student_logits = 3.0 * np.tanh(0.25 * (x.numpy() @ w.numpy().T + b.numpy()) / 3.0)
    teacher_logits = 2.0 * (y.numpy() @ u.numpy().T + c.numpy())
    expected = CASES["forward_kl"].value(softmax(student_logits), softmax(teacher_logits))
    np.testing.assert_allclose(output.divergence_N.numpy(), expected, rtol=1e-11)


def test_statistics_stop_event_and_vocabulary_cut():
    """S4: heads of 23 and 26 ids compared on the first 20, of which 4 and 11 end a response."""
    x, w, y, u = make_hidden_pair(3, 26, 5, 8, gap=1.0, seed=3, dtype=torch.float64)
    student_head = OutputHead(w[:23], bias=torch.linspace(-1, 1, 23, dtype=torch.float64))
    output = linear_divergence(
        x,
        student_head,
        y,
        u,
        GeneralizedJSD(0.5),
        token_ids_N=torch.tensor([11, 0, 22]),
        stop_ids=[4, 11],
        vocab_size=20,
        impl=Impl.REFERENCE,
    )
    p = softmax((x @ w[:23].T + student_head.bias).numpy()[:, :20])
    q = softmax((y @ u.T).numpy()[:, :20])
    for probabilities in (p, q):
        probabilities[:, 4] += probabilities[:, 11]
    p, q = np.delete(p, 11, axis=-1), np.delete(q, 11, axis=-1)
    np.testing.assert_allclose(output.divergence_N.numpy(), CASES["jsd_0.5"].value(p, q), rtol=1e-11)
    np.testing.assert_allclose(output.student_entropy_N.numpy(), -(p * np.log(p)).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(output.teacher_entropy_N.numpy(), -(q * np.log(q)).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(output.student_logprob_N.numpy(), [np.log(p[0, 4]), np.log(p[1, 0]), np.nan], rtol=1e-11)
    np.testing.assert_allclose(output.teacher_logprob_N.numpy(), [np.log(q[0, 4]), np.log(q[1, 0]), np.nan], rtol=1e-11)
    assert output.top1_agreement_N.tolist() == (p.argmax(-1) == q.argmax(-1)).astype(float).tolist()


@pytest.mark.parametrize("vocab_size", [1, 7, 129, 1187])
def test_s1_odd_vocabularies(vocab_size):
    x, w, y, u = make_hidden_pair(5, vocab_size, 3, 7, seed=4, dtype=torch.float64)
    output = linear_divergence(x, w, y, u, ForwardKL(), impl=Impl.REFERENCE)
    expected = CASES["forward_kl"].value(softmax((x @ w.T).numpy()), softmax((y @ u.T).numpy()))
    np.testing.assert_allclose(output.divergence_N.numpy(), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_inputs_are_not_rounded_to_16_bits(dtype):
    x, w, y, u = make_hidden_pair(16, 200, 32, 48, gap=0.05, seed=5, dtype=dtype)
    output = linear_divergence(x, w, y, u, ForwardKL(), impl=Impl.REFERENCE)
    exact = [t.double().numpy() for t in (x, w, y, u)]
    expected = CASES["forward_kl"].value(softmax(exact[0] @ exact[1].T), softmax(exact[2] @ exact[3].T))
    assert output.divergence_N.dtype == torch.float32
    np.testing.assert_allclose(output.divergence_N.numpy(), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = linear_divergence(x, w, y, u, ForwardKL(), impl=Impl.REFERENCE)
    assert torch.equal(in_autocast.divergence_N, output.divergence_N)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_s3_any_number_of_rows(rows):
    x, w, y, u = make_hidden_pair(rows, 13, 4, 6, seed=6)
    x.requires_grad_()
    w.requires_grad_()
    output = linear_divergence(x, w, y, u, impl=Impl.REFERENCE)
    output.divergence_N.sum().backward()
    assert all(field.shape == (rows,) for field in output)
    assert x.grad.shape == (rows, 4) and w.grad.shape == (13, 4)
    assert w.grad.isfinite().all() and bool((w.grad != 0).any()) == (rows > 0)


def test_how_fused_stores_logits_does_not_change_the_reference():
    x, w, y, u = make_hidden_pair(5, 40, 4, 6, seed=7)
    expected = linear_divergence(x, w, y, u, impl=Impl.REFERENCE).divergence_N
    for storage in LogitStorage:
        output = linear_divergence(x, w, y, u, logits=storage, workspace_bytes=1, impl=Impl.REFERENCE)
        assert torch.equal(output.divergence_N, expected)
