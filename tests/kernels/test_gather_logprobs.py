"""Are log-probs of many ids per row exact, with padding and duplicates, in value and gradient?

python -m pytest tests/kernels/test_gather_logprobs.py
"""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from esr_kernels import Impl, OutputHead, gather_logprobs
from esr_kernels.gather_logprobs.reference import gather_logprobs_reference

N, D, V = 4, 5, 9
# padding, duplicates, a row of padding alone, the first and the last id
TOKEN_IDS = torch.tensor([[0, 8, 3], [2, 2, -1], [-1, -1, -1], [-1, 5, 5]])


def make():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(N, D), normal(V, D), normal(V), normal(*TOKEN_IDS.shape)


def test_equals_numpy():
    hidden, weight, bias, _ = make()
    head = OutputHead(weight, bias, logit_scale=0.5, softcap=4.0)
    got = gather_logprobs(hidden, head, TOKEN_IDS, temperature=0.7, impl=Impl.REFERENCE)
    z = 4 * np.tanh(0.5 * (hidden.numpy() @ weight.numpy().T + bias.numpy()) / 4) / 0.7
    logprobs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = [[logprobs[n, i] if i >= 0 else 0.0 for i in row] for n, row in enumerate(TOKEN_IDS.tolist())]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """A unit vector reads a column of the weight; probabilities (1, 2, 5)/8 and (3, 3, 2)/8."""
    weight = torch.tensor([[1.0, 3.0], [2.0, 3.0], [5.0, 2.0]]).log()
    got = gather_logprobs(torch.eye(2), weight, torch.tensor([[2, 0, 2], [-1, 1, 2]]), impl=Impl.REFERENCE)
    expected = torch.tensor([[5 / 8, 1 / 8, 5 / 8], [1.0, 3 / 8, 2 / 8]]).log()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_probabilities_of_all_ids_sum_to_one():
    hidden, weight, _, _ = make()
    got = gather_logprobs(hidden, weight, torch.arange(V).expand(N, V), temperature=2.0, impl=Impl.REFERENCE)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_finite_differences():
    hidden, weight, bias, _ = make()
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert gradcheck(
        lambda h, w, b: gather_logprobs(h, OutputHead(w, b), TOKEN_IDS, temperature=0.7, impl=Impl.REFERENCE), inputs
    )


def test_gradient_by_formula_with_duplicates():
    """d(logits) = onehot-sum of the upstream - softmax * (sum of the upstream), padding counting nothing."""
    hidden, weight, _, upstream = make()
    hidden.requires_grad_()
    gather_logprobs(hidden, weight, TOKEN_IDS, impl=Impl.REFERENCE).backward(upstream)
    z = hidden.detach().numpy() @ weight.numpy().T
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    d_logits = np.zeros((N, V))
    for n, row in enumerate(TOKEN_IDS.tolist()):
        for k, i in enumerate(row):
            if i >= 0:
                d_logits[n] -= upstream[n, k].item() * p[n]
                d_logits[n, i] += upstream[n, k].item()
    np.testing.assert_allclose(hidden.grad.numpy(), d_logits @ weight.numpy(), rtol=1e-11, atol=1e-12)
    assert (hidden.grad[2] == 0).all()


def test_poison_in_padding_changes_nothing():
    """A row of padding with NaN hidden state, and NaN upstream at padding."""
    hidden, weight, _, upstream = make()
    runs = []
    for poison in (0.0, math.nan):
        h, w, up = hidden.clone(), weight.clone().requires_grad_(), upstream.clone()
        h[2], up[TOKEN_IDS < 0] = poison, poison
        h.requires_grad_()
        got = gather_logprobs(h, w, TOKEN_IDS, impl=Impl.REFERENCE)
        got.backward(up)
        runs.append((got, h.grad, w.grad))
    for clean, dirty in zip(*runs, strict=True):
        assert torch.equal(clean, dirty)


def test_a_fully_masked_row_and_ids_that_are_none():
    """Log-probs -inf, padding 0, NaN for what is no id (which is refused on the CPU but not on a device); gradient 0."""
    hidden, weight = torch.randn(4, D, generator=torch.Generator().manual_seed(4)), torch.ones(V, D)
    hidden[1], weight[3:] = -math.inf, 2.0
    hidden.requires_grad_()
    ids = torch.tensor([[0, -5, 4], [0, -1, V], [V, -2, -100], [1, 1, 8]])
    got = gather_logprobs_reference(hidden, OutputHead(weight), ids, 1.0)
    assert got[1, :2].tolist() == [-math.inf, 0.0] and got.isnan().tolist() == [
        [False, True, False],
        [False, False, True],
        [True, True, True],
        [False, False, False],
    ]
    (gradient,) = torch.autograd.grad(got, hidden, torch.full((4, 3), 2.0))
    z = (hidden.detach() @ weight.T)[0]
    p = torch.softmax(z, -1)
    onehots = torch.nn.functional.one_hot(torch.tensor([0, 4]), V).sum(0)
    torch.testing.assert_close(gradient[0], 2 * (onehots - 2 * p) @ weight, rtol=1e-5, atol=1e-5)
    assert (gradient[1:3] == 0).all() and (gradient[3] != 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty(shape):
    hidden = torch.randn(shape[0], D, requires_grad=True)
    got = gather_logprobs(hidden, torch.randn(V, D), torch.zeros(shape, dtype=torch.int64), impl=Impl.REFERENCE)
    assert got.shape == shape
    got.sum().backward()
    assert hidden.grad.shape == (shape[0], D)
    assert (hidden.grad == 0).all()


def test_low_precision_gives_float32():
    hidden, weight, _, _ = make()
    low = gather_logprobs(hidden.bfloat16(), weight.bfloat16(), TOKEN_IDS.int(), impl=Impl.REFERENCE)
    high = gather_logprobs(hidden.bfloat16().double(), weight.bfloat16().double(), TOKEN_IDS, impl=Impl.REFERENCE)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_N_D": torch.zeros(4)}, ValueError, r"hidden_N_D must have shape \(N, D\)"),
        ({"head": torch.zeros(V, D + 1)}, ValueError, r"head.weight must have shape \(V, D\) = \(V, 5\), got \(9, 6\)"),
        ({"head": None}, TypeError, r"head must be an OutputHead or a weight tensor \(V, hidden\), got NoneType"),
        ({"token_ids_N_K": torch.zeros(N)}, TypeError, r"token_ids_N_K must have dtype int32, int64, got float32"),
        ({"token_ids_N_K": torch.zeros(3, 2).long()}, ValueError, r"token_ids_N_K must have shape \(N, K\) = \(4, K\)"),
        ({"token_ids_N_K": torch.tensor([[0], [1], [9], [2]])}, ValueError, r"must be in \[-1, 8\], got 9 in row 2"),
        ({"token_ids_N_K": torch.tensor([[0], [-2], [1], [2]])}, ValueError, r"must be in \[-1, 8\], got -2 in row 1"),
        ({"temperature": -1.0}, ValueError, r"temperature must be finite and > 0, got -1.0"),
    ],
)
def test_refuses(changed, error, message):
    given = {"hidden_N_D": torch.zeros(N, D), "head": torch.zeros(V, D), "token_ids_N_K": TOKEN_IDS}
    with pytest.raises(error, match=rf"^gather_logprobs: .*{message}"):
        gather_logprobs(**{**given, "impl": Impl.REFERENCE, **changed})
