"""Are prefix log-probs, entropies and masks those of a numpy loop and of tables written by hand?

python -m pytest tests/kernels/test_prefix_logprobs_values.py
"""

import math

import numpy as np
import pytest
import torch

from esr_kernels import Impl, OutputHead, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.prefix_logprobs.reference import prefix_logprobs_reference

# name: B, T, V, horizon, starts, lengths
CASES = {
    "default lengths": (3, 7, 11, 4, [1, 3, 7], None),
    "horizon beyond the response": (2, 6, 5, 9, [2, 4], [3, 1]),
    "horizon inside the response": (2, 9, 5, 2, [1, 3], [8, 6]),
    "left padding, right padding": (4, 8, 17, 5, [4, 4, 4, 4], [4, 2, 0, 1]),
    "prompt of one token": (2, 5, 3, 4, [1, 1], [4, 2]),
    "one row, one slot": (1, 2, 67, 1, [1], [1]),
    "vocabulary of one": (2, 4, 1, 3, [1, 2], None),
}


def make(name: str, dtype: torch.dtype = torch.float32):
    B, T, V, horizon, starts, lengths = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = (3 * torch.randn(B, T, V, generator=generator)).to(dtype)
    token_ids = torch.randint(V, (B, T), generator=generator)
    lengths = None if lengths is None else torch.tensor(lengths)
    return logits, token_ids, torch.tensor(starts), horizon, lengths


def loop_in_numpy(logits, token_ids, starts, horizon, lengths, temperature):
    """The definition slot by slot in float64: (logprobs, entropy, mask)."""
    B, T, _ = logits.shape
    logprobs, entropy = np.zeros((B, horizon)), np.zeros((B, horizon))
    mask = np.zeros((B, horizon), dtype=bool)
    for b in range(B):
        length = T - int(starts[b]) if lengths is None else int(lengths[b])
        for t in range(min(horizon, length)):
            z = logits[b, int(starts[b]) - 1 + t].double().numpy() / temperature
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            logprobs[b, t] = np.log(p[token_ids[b, int(starts[b]) + t]])
            entropy[b, t] = np.log(1 / p) @ p
            mask[b, t] = True
    return logprobs, entropy, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", CASES)
def test_equals_numpy_loop(name, temperature, dtype):
    logits, token_ids, starts, horizon, lengths = make(name, dtype)
    result = prefix_logprobs(
        logits, token_ids, starts, horizon, lengths_B=lengths, temperature=temperature, impl=Impl.REFERENCE
    )
    logprobs, entropy, mask = loop_in_numpy(logits, token_ids, starts, horizon, lengths, temperature)
    assert np.array_equal(result.mask_B_K.numpy(), mask)
    out_dtype, bound = (torch.float64, 1e-12) if dtype is torch.float64 else (torch.float32, 2e-6)
    assert result.logprobs_B_K.dtype == result.entropy_B_K.dtype == out_dtype
    np.testing.assert_allclose(result.logprobs_B_K.double().numpy(), logprobs, rtol=bound, atol=bound)
    np.testing.assert_allclose(result.entropy_B_K.double().numpy(), entropy, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", CASES)
def test_from_hidden_states_equals_numpy_loop(name):
    """Head with bias, logit scale and soft cap, written out here in numpy."""
    logits, token_ids, starts, horizon, lengths = make(name, torch.float64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*logits.shape[:2], 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(logits.shape[2], 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(logits.shape[2], generator=generator, dtype=torch.float64)
    head = OutputHead(weight, bias, logit_scale=0.7, softcap=2.0)
    result = linear_prefix_logprobs(
        hidden, head, token_ids, starts, horizon, lengths_B=lengths, temperature=0.9, impl=Impl.REFERENCE
    )
    projected = 2.0 * np.tanh(0.7 * (hidden.numpy() @ weight.numpy().T + bias.numpy()) / 2.0)
    logprobs, entropy, mask = loop_in_numpy(torch.tensor(projected), token_ids, starts, horizon, lengths, 0.9)
    assert np.array_equal(result.mask_B_K.numpy(), mask)
    np.testing.assert_allclose(result.logprobs_B_K.numpy(), logprobs, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(result.entropy_B_K.numpy(), entropy, rtol=1e-11, atol=1e-12)


def test_bare_weight_is_a_head():
    """hidden = unit vector i reads column i of the weight: logits by hand."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).log()
    result = linear_prefix_logprobs(
        torch.eye(2)[None], weight, torch.tensor([[0, 1]]), torch.tensor([1]), 1, impl=Impl.REFERENCE
    )
    assert result.logprobs_B_K.item() == pytest.approx(math.log(3 / 4), abs=1e-6)


# Column t of this row of logits predicts with probabilities (t+1, 1, 1)/(t+3): shifted reads give other numbers.
SHIFT_TABLE = torch.tensor([[[1.0, 1, 1], [2, 1, 1], [3, 1, 1], [4, 1, 1], [5, 1, 1]]]).log()


@pytest.mark.parametrize(
    ("token_ids", "start", "length", "horizon", "probabilities"),
    [
        ([9, 0, 0, 0, 0], 1, 4, 4, [1 / 3, 2 / 4, 3 / 5, 4 / 6]),  # prompt of one token: row 0 predicts column 1
        ([9, 9, 9, 0, 1], 3, 2, 4, [3 / 5, 1 / 6, None, None]),  # left padding, horizon longer than the response
        ([9, 9, 0, 2, 9], 2, 2, 3, [2 / 4, 1 / 5, None]),  # right padding of an id outside the vocabulary is not read
        ([9, 9, 0, 2, 9], 2, 2, 1, [2 / 4]),  # horizon shorter than the response
        ([9, 0, 2, 0, 0], 1, 4, 4, [1 / 3, 1 / 4, 3 / 5, 4 / 6]),  # an EOS (id 2) inside: lengths decide, not the op
        ([9, 2, 2, 2, 2], 1, 1, 3, [1 / 3, None, None]),  # EOS = pad: EOS at the first token, padding after it
        ([9, 9, 9, 9, 0], 4, 1, 2, [4 / 6, None]),  # last column
        ([9, 9, 9, 9, 9], 5, 0, 2, [None, None]),  # no response
    ],
)
def test_shift_by_one_by_hand(token_ids, start, length, horizon, probabilities):
    result = prefix_logprobs(
        SHIFT_TABLE,
        torch.tensor([token_ids]),
        torch.tensor([start]),
        horizon,
        lengths_B=torch.tensor([length]),
        impl=Impl.REFERENCE,
    )
    assert result.mask_B_K.tolist() == [[p is not None for p in probabilities]]
    expected = [0.0 if p is None else math.log(p) for p in probabilities]
    assert result.logprobs_B_K.tolist() == [pytest.approx(expected, abs=1e-6)]


def test_entropy_by_hand():
    """Columns: uniform over 4, one possible id, uniform over 2; a -inf logit adds 0, also as the target's neighbour."""
    inf = math.inf
    logits = torch.tensor([[[0.0, 0, 0, 0], [-inf, 5, -inf, -inf], [7, -inf, -inf, 7], [0, 0, 0, 0]]])
    result = prefix_logprobs(logits, torch.tensor([[0, 2, 1, 1]]), torch.tensor([1]), 3, impl=Impl.REFERENCE)
    assert result.entropy_B_K.tolist() == [pytest.approx([math.log(4), 0.0, math.log(2)], abs=1e-6)]
    assert result.logprobs_B_K.tolist() == [pytest.approx([-math.log(4), 0.0, -inf], abs=1e-6)]


def test_temperature_by_hand():
    """Temperature 0.5 squares the probabilities (1, 2)/3 to (1, 4)/5."""
    logits = torch.tensor([[[1.0, 2.0], [1.0, 1.0]]]).log()
    result = prefix_logprobs(logits, torch.tensor([[0, 1]]), torch.tensor([1]), 1, temperature=0.5, impl=Impl.REFERENCE)
    assert result.logprobs_B_K.item() == pytest.approx(math.log(4 / 5), abs=1e-6)
    assert result.entropy_B_K.item() == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8), abs=1e-6)


@pytest.mark.parametrize(("B", "horizon"), [(2, 0), (0, 3), (0, 0)])
def test_empty_results(B, horizon):
    logits = torch.randn(B, 4, 5, requires_grad=True)
    result = prefix_logprobs(
        logits, torch.zeros(B, 4, dtype=torch.int64), torch.ones(B, dtype=torch.int64), horizon, impl=Impl.REFERENCE
    )
    assert [tuple(x.shape) for x in result] == [(B, horizon)] * 4
    result.logprobs_B_K.sum().backward()
    assert (logits.grad == 0).all()


def test_integer_dtypes_and_strides_do_not_matter():
    logits, token_ids, starts, horizon, lengths = make("left padding, right padding")
    expected = prefix_logprobs(logits, token_ids, starts, horizon, lengths_B=lengths, impl=Impl.REFERENCE)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    got = prefix_logprobs(strided, token_ids.int(), starts.int(), horizon, lengths_B=lengths.int(), impl=Impl.REFERENCE)
    assert not strided.is_contiguous()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "token", "logprob", "entropy", "is_top1"),
    [
        ([0.0, 2.0, 1.0], 1, 2 - math.log(1 + math.e + math.e**2), None, True),
        ([0.0, 2.0, 1.0], 2, 1 - math.log(1 + math.e + math.e**2), None, False),
        ([3.0, 1.0, 3.0], 0, None, None, True),  # of two equal ones the lowest id is the likeliest
        ([3.0, 1.0, 3.0], 2, None, None, False),
        ([0.0, 0.0, 0.0], 1, -math.log(3), math.log(3), False),
        ([-INF, -1.0, -INF], 1, 0.0, 0.0, True),
        ([-INF, -1.0, -INF], 0, -INF, 0.0, False),
        ([-INF, -INF, -INF], 0, -INF, 0.0, False),  # a row of nothing has no likeliest token
        ([-INF, -INF, -INF], 2, -INF, 0.0, False),
        ([NAN, 2.0, 1.0], 1, NAN, NAN, False),
        ([NAN, 2.0, 1.0], 0, NAN, NAN, False),
        ([INF, 2.0, 1.0], 0, NAN, NAN, False),
        (
            [0.0, 2.0, 1.0],
            -1,
            NAN,
            None,
            False,
        ),  # no id of the vocabulary, which is refused on the CPU but not on a device
        ([0.0, 2.0, 1.0], 3, NAN, None, False),
        ([-INF, -INF, -INF], 3, NAN, 0.0, False),
    ],
)
def test_one_row_by_hand(row, token, logprob, entropy, is_top1):
    """The reference itself, without the checks of values before it, between two ordinary slots."""
    logits = torch.tensor([[[0.5, 0.0, 0.0], row, [0.0, 0.5, 0.0], [0.0] * 3]])
    ids = torch.tensor([[7, 0, token, 1]])
    result = prefix_logprobs_reference(logits, ids, torch.tensor([1]), 3, torch.tensor([3]), 1.0)
    ordinary = 0.5 - math.log(2 + math.exp(0.5))
    assert result.logprobs_B_K[0, [0, 2]].tolist() == pytest.approx([ordinary, ordinary], abs=1e-6)
    assert result.mask_B_K.all() and result.is_top1_B_K.tolist() == [[True, is_top1, True]]
    for actual, expected in ((result.logprobs_B_K, logprob), (result.entropy_B_K, entropy)):
        if expected is not None:
            assert actual[0, 1].item() == pytest.approx(expected, abs=1e-6, nan_ok=True)
