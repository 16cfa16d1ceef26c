"""Do the fused prefix ops read exactly the rows that predict a token of the prefix, wherever a response starts and ends?

python -m pytest tests/kernels/test_fused_prefix_slots.py

Expected values are a loop over the slots in numpy. What no valid slot reads holds NaN, or a token id of -100.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from esr_kernels import LogitStorage, OutputHead, PrefixLogprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.linear_prefix_logprobs import autograd as linear_autograd
from esr_kernels.output_projection import projection
from esr_kernels.prefix_logprobs import prefix_checks
from esr_kernels.prefix_logprobs.reference import prefix_logprobs_reference
from esr_kernels.testing.error_budget import relative_error_in_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
V = 11
EOS, PAD, OUTSIDE = 7, 9, -100
every_op = pytest.mark.parametrize("op", ["logits", "hidden", "hidden, uncounted"])
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# name: T, starts, lengths, horizon, and by hand the number of valid slots of each rollout
CASES = {
    "default lengths": (7, [1, 3, 7], None, 4, [4, 4, 0]),
    "horizon beyond the response": (6, [2, 4], [3, 1], 9, [3, 1]),
    "horizon inside the response": (9, [1, 3], [8, 6], 2, [2, 2]),
    "horizon 0": (4, [1, 2], [3, 1], 0, [0, 0]),
    "left padding, ragged on the right": (8, [4, 4, 4, 4], [4, 2, 0, 1], 5, [4, 2, 0, 1]),
    "prompts of other lengths": (8, [2, 6, 4], [6, 2, 3], 3, [3, 2, 3]),
    "prompt of one token": (5, [1, 1], [4, 2], 4, [4, 2]),
    "response in the last column": (5, [4, 4], [1, 0], 2, [1, 0]),
    "no response at all": (5, [5, 2], [0, 0], 2, [0, 0]),
    "two columns": (2, [1, 2], None, 3, [1, 0]),
    "one column": (1, [1, 1], [0, 0], 2, [0, 0]),
    "no rollout": (5, [], [], 3, []),
}


class Batch:
    """Logits and token ids of a case, with poison wherever no valid slot reads, and upstream gradients likewise."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.num_columns, self.starts, self.lengths, self.horizon, self.counts = CASES[name]
        B, T, K = len(self.starts), self.num_columns, self.horizon
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(B, T, V, generator=generator)
        ids = torch.randint(V, (B, T), generator=generator)
        upstream = torch.randn(B, K, generator=generator)
        self.logits, self.ids, self.upstream = (torch.full_like(x, NAN) for x in (logits, ids.float(), upstream))
        self.ids = torch.full_like(ids, OUTSIDE)
        for b, t in self.slots():
            row, column = self.starts[b] - 1 + t, self.starts[b] + t
            self.logits[b, row], self.ids[b, column], self.upstream[b, t] = (
                logits[b, row],
                ids[b, column],
                upstream[b, t],
            )

    def slots(self) -> list[tuple[int, int]]:
        return [(b, t) for b, count in enumerate(self.counts) for t in range(count)]

    def run(
        self, op: str, monkeypatch: pytest.MonkeyPatch, temperature: float = 1.0, dtype: torch.dtype = torch.int64
    ) -> tuple[PrefixLogprobs, Tensor]:
        """The result and d(logits); for the linear op logits are hidden states and the head is the identity."""
        starts = torch.tensor(self.starts, dtype=dtype)
        lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=dtype)
        leaf, ids = self.logits.to(DEVICE, copy=True).requires_grad_(), self.ids.to(DEVICE)
        inputs, function = (leaf,), prefix_logprobs
        if op != "logits":
            inputs, function = (leaf, torch.eye(V, device=DEVICE)), linear_prefix_logprobs
            monkeypatch.setattr(linear_autograd, "can_count_slots", lambda starts: op == "hidden")
        result = function(*inputs, ids, starts, self.horizon, lengths_B=lengths, temperature=temperature)
        (gradient,) = torch.autograd.grad(result.logprobs_B_K, leaf, self.upstream.to(DEVICE))
        return PrefixLogprobs(*(field.detach().cpu() for field in result)), gradient.cpu()

    def expected(self, temperature: float = 1.0) -> tuple[PrefixLogprobs, Tensor]:
        """In float64 by the definition, slot by slot."""
        shape = (len(self.starts), self.horizon)
        logprobs, entropy, gradient = np.zeros(shape), np.zeros(shape), np.zeros(self.logits.shape)
        mask, is_top1 = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for b, t in self.slots():
            row, token = self.starts[b] - 1 + t, int(self.ids[b, self.starts[b] + t])
            z = self.logits[b, row].double().numpy() / temperature
            p = np.exp(z) / np.exp(z).sum()
            logprobs[b, t], entropy[b, t] = np.log(p[token]), -(p * np.log(p)).sum()
            mask[b, t], is_top1[b, t] = True, z.argmax() == token
            gradient[b, row] = self.upstream[b, t].item() * ((np.arange(V) == token) - p) / temperature
        return PrefixLogprobs(*map(torch.from_numpy, (logprobs, entropy, mask, is_top1))), torch.from_numpy(gradient)


def assert_is(actual: tuple[PrefixLogprobs, Tensor], expected: tuple[PrefixLogprobs, Tensor]) -> None:
    """Logits of size 2 carry errors of eps times 10 at most, and so do their differences; zeros are exact."""
    (result, gradient), (wanted, wanted_gradient) = actual, expected
    assert torch.equal(result.mask_B_K, wanted.mask_B_K) and torch.equal(result.is_top1_B_K, wanted.is_top1_B_K)
    pairs = (*zip(result[:2], wanted[:2], strict=True), (gradient, wanted_gradient))
    for value, exact in pairs:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=2e-6)
        assert (value[exact == 0] == 0).all()


@pytest.mark.parametrize("name", CASES)
@every_op
def test_p1_every_placement_of_the_response(monkeypatch, op, name):
    """Values, entropies, flags, masks and gradients; NaN in any other row or upstream gradient is never seen."""
    batch = Batch(name, seed=len(name))
    assert_is(batch.run(op, monkeypatch, temperature=0.8), batch.expected(temperature=0.8))


@every_op
def test_p1_an_eos_inside_the_prefix_ends_nothing_by_itself(monkeypatch, op):
    """Lengths alone decide: an EOS counts, as do tokens after it that lengths include, and padding after them does not."""
    batch = Batch("prompts of other lengths", seed=1)
    batch.ids[0, 2:5] = torch.tensor([EOS, EOS, PAD])  # three valid slots
    batch.ids[1, 6:8] = torch.tensor([PAD, EOS])
    assert_is(batch.run(op, monkeypatch), batch.expected())


@every_op
def test_n8_poison_outside_the_prefix_changes_nothing_bit_for_bit(monkeypatch, op):
    """The same batch with ordinary numbers in the place of NaN, infinities and ids outside of the vocabulary."""
    for name in ("left padding, ragged on the right", "prompts of other lengths"):
        poisoned, clean = Batch(name, seed=2), Batch(name, seed=2)
        clean.logits, clean.upstream = clean.logits.nan_to_num(0.5), clean.upstream.nan_to_num(1.5)
        clean.ids = clean.ids.masked_fill(clean.ids == OUTSIDE, 3)
        poisoned.logits = torch.where(poisoned.logits.isnan(), torch.tensor([NAN, math.inf] * 6)[:V], poisoned.logits)
        (result, gradient), (wanted, wanted_gradient) = poisoned.run(op, monkeypatch), clean.run(op, monkeypatch)
        for actual, exact in zip((*result, gradient), (*wanted, wanted_gradient), strict=True):
            assert torch.equal(actual, exact) and exact.isfinite().all()


@pytest.mark.parametrize("is_counted", [True, False], ids=["counted", "uncounted"])
def test_p2_equals_the_gradient_of_the_masked_full_sequence(monkeypatch, is_counted):
    """Cross entropy of all positions in float64, weighted by the upstream gradient at its slot and by 0 elsewhere."""
    B, T, D, horizon, starts, lengths = 3, 7, 5, 3, [1, 4, 3], [6, 2, 1]
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((B, T, D), (V, D), (V,)))
    ids, upstream = torch.randint(V, (B, T), generator=generator), torch.randn(B, horizon, generator=generator)
    weight_B_T = torch.zeros(B, T, dtype=torch.float64)
    weight_B_T[0, 0:3], weight_B_T[1, 3:5], weight_B_T[2, 2:3] = upstream[0], upstream[1, :2], upstream[2, :1]

    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*exact) / 0.8
    logits_N_V, targets_N = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits_N_V, targets_N, reduction="none")
    full = torch.autograd.grad(-(losses * weight_B_T[:, :-1].flatten()).sum(), [logits, *exact])

    monkeypatch.setattr(linear_autograd, "can_count_slots", lambda starts: is_counted)
    where = ids.to(DEVICE), torch.tensor(starts), horizon
    options = {"lengths_B": torch.tensor(lengths), "temperature": 0.8}
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias)]
    result = linear_prefix_logprobs(leaves[0], OutputHead(*leaves[1:]), *where, **options)
    of_hidden = torch.autograd.grad(result.logprobs_B_K, leaves, upstream.to(DEVICE))
    logits_leaf = (0.8 * logits.detach().float()).to(DEVICE).requires_grad_()
    result = prefix_logprobs(logits_leaf, *where, **options)
    (of_logits,) = torch.autograd.grad(result.logprobs_B_K, logits_leaf, upstream.to(DEVICE))
    for actual, expected in zip((of_logits * 0.8, *of_hidden), full, strict=True):
        assert relative_error_in_norm(actual.cpu(), expected) < 2e-6  # 20 eps: sums of 11 numbers
        assert (actual.cpu()[expected == 0] == 0).all()


def test_only_rows_of_valid_slots_are_projected_where_the_host_can_count(monkeypatch):
    """And where it cannot, as many as there can be, of which the invalid ones are zeros."""
    operands = []
    product = projection.matmul_float32

    def spy(a, b, *, out, accumulate=False):
        operands.append(a.cpu())
        product(a, b, out=out, accumulate=accumulate)

    monkeypatch.setattr(projection, "matmul_float32", spy)
    batch = Batch("left padding, ragged on the right", seed=4)
    read = torch.stack([batch.logits[b, batch.starts[b] - 1 + t] for b, t in batch.slots()])
    batch.run("hidden", monkeypatch)
    assert [tuple(a.shape) for a in operands] == [(7, V)] and torch.equal(operands[0], read)

    operands.clear()
    batch.run("hidden, uncounted", monkeypatch)
    assert [tuple(a.shape) for a in operands] == [(4 * 5, V)]  # B min(horizon, T - 1) rows
    is_zero = (operands[0] == 0).all(-1)
    assert int(is_zero.sum()) == 20 - 7 and torch.equal(operands[0][~is_zero], read)


def test_a_horizon_beyond_the_tensor_projects_no_more_rows_than_the_tensor_has(monkeypatch):
    shapes = []
    product = projection.matmul_float32

    def spy(a, b, *, out, accumulate=False):
        shapes.append(tuple(a.shape))
        product(a, b, out=out, accumulate=accumulate)

    monkeypatch.setattr(projection, "matmul_float32", spy)
    Batch("horizon beyond the response").run("hidden, uncounted", monkeypatch)
    assert shapes == [(2 * 5, V)]


# What a device may hold: starts, lengths, and by hand the number of valid slots, for T = 6 and a horizon of 4.
OUT_OF_RANGE = {
    "starts": ([0, -3, 7, 100, 6, 2], [2, 2, 2, 2, 1, -1]),
    "lengths": ([2, 1, 3, 3, 5, 2], [9, 4, 0, 3, 2, -5]),
}
COUNTS = {"starts": [0, 0, 0, 0, 0, 0], "lengths": [4, 4, 0, 3, 1, 0]}


@pytest.fixture
def values_cannot_be_seen(monkeypatch):
    """As on a device, whose values the host does not wait for."""
    monkeypatch.setattr(prefix_checks, "can_look_at", lambda values: False)


@pytest.mark.parametrize(("what", "dtype"), [("starts", torch.int64), ("lengths", torch.int32)], ids=str)
@every_op
def test_starts_and_lengths_out_of_range_are_masked(monkeypatch, values_cannot_be_seen, op, what, dtype):
    monkeypatch.setitem(CASES, "device", (6, *OUT_OF_RANGE[what], 4, COUNTS[what]))
    batch = Batch("device", seed=5)
    assert_is(batch.run(op, monkeypatch, dtype=dtype), batch.expected())


@every_op
def test_tokens_out_of_range_give_nan_without_gradient(monkeypatch, values_cannot_be_seen, op):
    """-1 too, which elsewhere stands for no question; the other slots do not notice. NaN upstream is ignored there."""
    batch = Batch("prompts of other lengths", seed=6)
    wanted, wanted_gradient = batch.run(op, monkeypatch)
    bad = [(0, 0, -1), (0, 2, V), (1, 1, 2**31 + 3), (2, 1, -100)]
    for b, t, token in bad:
        batch.ids[b, batch.starts[b] + t] = token
        batch.upstream[b, t] = 2.5
    result, gradient = batch.run(op, monkeypatch)
    for b, t, _ in bad:
        assert result.logprobs_B_K[b, t].isnan() and not result.is_top1_B_K[b, t] and result.mask_B_K[b, t]
        assert (gradient[b, batch.starts[b] - 1 + t] == 0).all()
        wanted.logprobs_B_K[b, t], wanted.is_top1_B_K[b, t] = NAN, False
        wanted_gradient[b, batch.starts[b] - 1 + t] = 0.0
    for actual, exact in zip((*result, gradient), (*wanted, wanted_gradient), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    starts, lengths = torch.tensor(batch.starts), torch.tensor(batch.lengths)
    reference = prefix_logprobs_reference(batch.logits, batch.ids, starts, batch.horizon, lengths, 1.0)
    for actual, exact in zip(result, reference, strict=True):
        torch.testing.assert_close(actual, exact, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_slots_that_the_host_cannot_count_change_nothing(monkeypatch, trained, dtype, storage):
    """Rows of the prefix among rows of zeros: the same values and gradients as without them, whatever upstream is there."""
    B, T, D, generator = 3, 5, 8, torch.Generator().manual_seed(7)
    hidden = torch.randn(B, T, D, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(300, D, generator=generator).to(DEVICE, dtype)
    ids, upstream = torch.randint(300, (B, T), generator=generator), torch.randn(B, 3, generator=generator)
    upstream[1, 1:] = upstream[2] = NAN  # not valid
    runs = []
    for is_counted in (True, False):
        monkeypatch.setattr(linear_autograd, "can_count_slots", lambda starts, answer=is_counted: answer)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        starts, lengths = torch.tensor([1, 3, 2]), torch.tensor([4, 1, 0])
        result = linear_prefix_logprobs(*leaves, ids.to(DEVICE), starts, 3, lengths_B=lengths, logits=storage)
        result.logprobs_B_K.backward(upstream.to(DEVICE))
        runs.append([*(x.detach() for x in result), *(x.grad for x in leaves if x.requires_grad)])
    for counted, uncounted in zip(*runs, strict=True):
        # A matrix product of another height may round another way, a stored float16 or a bfloat16 by a unit in its last place.
        assert counted.isfinite().all()
        is_exact = dtype == torch.float32 and storage == LogitStorage.FLOAT32
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if is_exact else {"rtol": 8e-3, "atol": 1e-4}
        torch.testing.assert_close(uncounted, counted, **tolerance)
