"""Are gradients exact for any upstream, zero outside the prefix, and deaf to poison there?

python -m pytest tests/kernels/test_prefix_logprobs_gradients.py
"""

import pytest
import torch
from torch.autograd import gradcheck

from esr_kernels import Impl, OutputHead, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.prefix_logprobs.reference import prefix_logprobs_reference

B, T, D, V, HORIZON = 4, 8, 5, 7, 4
STARTS, LENGTHS = torch.tensor([1, 3, 5, 8]), torch.tensor([7, 2, 0, 0])
# Written by hand from STARTS, LENGTHS and HORIZON: the rows that predict a valid slot.
PREDICTING_B_T = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


def make(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias, upstream = normal(B, T, D), normal(V, D), normal(V), normal(B, HORIZON)
    return hidden, weight, bias, upstream, torch.randint(V, (B, T), generator=generator)


def from_logits(logits, token_ids, **options):
    return prefix_logprobs(logits, token_ids, STARTS, HORIZON, lengths_B=LENGTHS, impl=Impl.REFERENCE, **options)


def from_hidden(hidden, head, token_ids, **options):
    return linear_prefix_logprobs(
        hidden, head, token_ids, STARTS, HORIZON, lengths_B=LENGTHS, impl=Impl.REFERENCE, **options
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_finite_differences_from_logits(temperature):
    hidden, weight, _, _, token_ids = make()
    logits = (hidden @ weight.T).requires_grad_()
    assert gradcheck(lambda x: from_logits(x, token_ids, temperature=temperature).logprobs_B_K, (logits,))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_finite_differences_from_hidden_states_weight_and_bias(softcap):
    hidden, weight, bias, _, token_ids = make()
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def logprobs(hidden, weight, bias):
        head = OutputHead(weight, bias, logit_scale=1.3, softcap=softcap)
        return from_hidden(hidden, head, token_ids, temperature=0.8).logprobs_B_K

    assert gradcheck(logprobs, inputs)


def test_equals_the_masked_full_sequence():
    """P2: cross entropy of every position of the full sequence, weighted by the upstream at its slot and 0 elsewhere."""
    hidden, weight, bias, upstream, token_ids = make()
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    result = from_hidden(hidden, OutputHead(weight, bias), token_ids, temperature=0.8)
    got = torch.autograd.grad((result.logprobs_B_K * upstream).sum(), (hidden, weight, bias))

    weights_B_T = torch.zeros(B, T, dtype=torch.float64)
    weights_B_T[0, 0:4] = upstream[0, 0:4]
    weights_B_T[1, 2:4] = upstream[1, 0:2]
    logits = torch.nn.functional.linear(hidden, weight, bias) / 0.8
    minus_logprob_B_T = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, V), token_ids[:, 1:].reshape(-1), reduction="none"
    ).reshape(B, T - 1)
    loss = -(minus_logprob_B_T * weights_B_T[:, :-1]).sum()
    torch.testing.assert_close((result.logprobs_B_K * upstream).sum(), loss, rtol=1e-12, atol=0)
    for mine, full in zip(got, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, full, rtol=1e-10, atol=1e-12)


def test_gradient_is_exactly_zero_outside_the_prefix_and_nonzero_inside():
    hidden, weight, _, upstream, token_ids = make()
    logits = (hidden @ weight.T).requires_grad_()
    from_logits(logits, token_ids).logprobs_B_K.backward(upstream)
    assert (logits.grad[~PREDICTING_B_T] == 0).all()
    assert (logits.grad[PREDICTING_B_T] != 0).all()
    # each row of d(logits) sums to zero: a log-prob does not see a shift of its logits
    assert logits.grad.sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_outside_the_prefix_changes_nothing(poison):
    """NaN or inf in rows, and wild token ids, that no valid slot reads: same values and gradients, bit for bit."""
    hidden, weight, _, upstream, token_ids = make()
    dirty_hidden = hidden.masked_fill(~PREDICTING_B_T[..., None], poison)
    is_target_B_T = torch.nn.functional.pad(PREDICTING_B_T[:, :-1], (1, 0))
    dirty_ids = token_ids.masked_fill(~is_target_B_T, -100)
    dirty_upstream = upstream.clone()
    dirty_upstream[1, 2:] = dirty_upstream[2:] = poison

    runs = []
    for h, ids, up in ((hidden, token_ids, upstream), (dirty_hidden, dirty_ids, dirty_upstream)):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        result = from_hidden(h, w, ids)
        result.logprobs_B_K.backward(up)
        logits = (hidden @ weight.T).masked_fill(h.detach().sum(-1, keepdim=True).isfinite().logical_not(), poison)
        logits.requires_grad_()
        plain = from_logits(logits, ids)
        plain.logprobs_B_K.backward(up)
        runs.append((*result, h.grad, w.grad, *plain, logits.grad))
    for clean, dirty in zip(*runs, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


def test_only_prefix_rows_are_projected(monkeypatch):
    seen = []
    project = OutputHead.logits

    def spy(self, hidden):
        seen.append(tuple(hidden.shape))
        return project(self, hidden)

    monkeypatch.setattr(OutputHead, "logits", spy)
    hidden, weight, _, _, token_ids = make()
    from_hidden(hidden, weight, token_ids)
    assert seen == [(int(PREDICTING_B_T.sum()), D)]


def test_entropy_is_detached_and_frozen_inputs_get_no_gradient():
    hidden, weight, _, _, token_ids = make()
    result = from_hidden(hidden.requires_grad_(), weight, token_ids)
    assert result.logprobs_B_K.requires_grad
    assert not result.entropy_B_K.requires_grad
    result.logprobs_B_K.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_gradient_of_minus_infinite_logits_is_finite():
    logits = torch.tensor([[[0.0, -torch.inf, 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    result = prefix_logprobs(logits, torch.tensor([[0, 2]]), torch.tensor([1]), 1, impl=Impl.REFERENCE)
    result.logprobs_B_K.sum().backward()
    p = torch.tensor([0.0, 0.0, 1.0]).exp() * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([0.0, 0.0, 1.0]) - p / p.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_float32_inside(dtype):
    """Against float64 on the same rounded inputs: values to float32, gradients to the rounding of their dtype."""
    hidden, weight, _, upstream, token_ids = make()
    low = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    high = [x.detach().double().requires_grad_() for x in low]
    results = []
    for h, w in (low, high):
        result = from_hidden(h, w, token_ids)
        result.logprobs_B_K.backward(upstream.to(result.logprobs_B_K.dtype))
        results.append(result)
    torch.testing.assert_close(results[0].logprobs_B_K.double(), results[1].logprobs_B_K, rtol=1e-6, atol=2e-6)
    for a, b in zip(low, high, strict=True):
        assert a.grad.dtype == dtype
        assert (a.grad.double() - b.grad).norm() <= 2e-3 * b.grad.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_rows_of_nothing_and_tokens_that_are_none_have_gradient_zero(temperature):
    """Exactly, between ordinary slots, for any upstream gradient; no NaN comes of -inf - -inf."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 5, 6, generator=generator)
    logits[0, 1] = -torch.inf
    logits.requires_grad_()
    ids = torch.tensor([[0, 2, 3, -100, 4]])  # slots 0 to 3; slot 2 holds no token of the vocabulary
    result = prefix_logprobs_reference(logits, ids, torch.tensor([1]), 4, None, temperature)
    assert result.logprobs_B_K.isfinite().tolist() == [[True, False, False, True]]
    upstream = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    (gradient,) = torch.autograd.grad(result.logprobs_B_K, logits, upstream)
    assert (gradient[0, [1, 2, 4]] == 0).all()
    for row, token, weight in ((0, 2, 1.0), (3, 4, 0.5)):
        onehot = torch.nn.functional.one_hot(torch.tensor(token), 6)
        expected = weight * (onehot - torch.softmax(logits[0, row].detach() / temperature, -1)) / temperature
        torch.testing.assert_close(gradient[0, row], expected, rtol=1e-5, atol=1e-6)


def test_a_poisoned_row_keeps_its_nan_to_itself():
    """NaN or +inf logits: NaN in the row's own gradient, and the other rows as without them."""
    clean = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    gradients = []
    for poison in (None, float("nan"), float("inf")):
        logits = clean.clone()
        logits[0, 1, 3] = clean[0, 1, 3] if poison is None else poison
        logits.requires_grad_()
        logprobs = prefix_logprobs_reference(
            logits, torch.tensor([[0, 1, 2, 3]]), torch.tensor([1]), 3, None, 1.0
        ).logprobs_B_K
        gradients.append(torch.autograd.grad(logprobs, logits, torch.tensor([[1.0, 2.0, 3.0]]))[0])
    for gradient in gradients[1:]:
        assert gradient[0, 1].isnan().any() and torch.equal(gradient[0, [0, 2, 3]], gradients[0][0, [0, 2, 3]])
