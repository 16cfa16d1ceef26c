"""Are both fused prefix ops within the error budget, for every dtype, storage, head, vocabulary, temperature and stride?

python -m pytest tests/kernels/test_fused_prefix_logprobs.py
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esr_kernels import Impl, LogitStorage, OutputHead, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.gather_logprobs import forward_kernel
from esr_kernels.prefix_logprobs import (
    backward_kernel,
    registration,  # noqa: F401 (defines the ops)
)
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.logprob_inputs import PrefixInputs, make_prefix_inputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_linear_prefix_logprobs,
    evaluate_prefix_logprobs,
    linear_prefix_logprobs_oracle,
    prefix_logprobs_oracle,
)
from esr_kernels.testing.oracle import Results, converted
from esr_kernels.tile_config import TileConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
TILE_RELATIVE = LogitStorage.TILE_RELATIVE_FP16
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, TILE_RELATIVE])
every_dtype = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def prefix_inputs(vocab_size: int = 643, *, horizon: int = 3, **options) -> PrefixInputs:
    """Three rollouts of six columns, of which one has no response, one ends before the horizon and one after it."""
    inputs = make_prefix_inputs(3, 6, vocab_size, 20, horizon=horizon, **options)
    starts, lengths = torch.tensor([2, 6, 3], device=DEVICE), torch.tensor([4, 0, 2], device=DEVICE)
    return converted(inputs, DEVICE)._replace(starts_B=starts, lengths_B=lengths)


def upstream_of(inputs: PrefixInputs) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(len(inputs.starts_B), inputs.horizon, generator=generator).to(DEVICE)


def check_logits(inputs: PrefixInputs, logits: Tensor | None = None, **options) -> Results:
    logits = inputs.logits() if logits is None else logits
    return check_against(
        prefix_logprobs_oracle, evaluate_prefix_logprobs, logits, inputs, upstream_of(inputs), **options
    )


def check_hidden(inputs: PrefixInputs, **options) -> Results:
    return check_against(
        linear_prefix_logprobs_oracle, evaluate_linear_prefix_logprobs, inputs, upstream_of(inputs), **options
    )


def assert_same(actual: Results, expected: Results) -> None:
    """Bit by bit, NaN included."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@every_dtype
def test_every_dtype_and_temperature_of_logits(dtype, temperature):
    results = check_logits(prefix_inputs(seed=1, dtype=dtype), temperature=temperature)
    assert results["grad_logits"].dtype == dtype
    assert results["mask"].sum() == 5 and 0 < results["is_top1"].sum() < 5


@every_storage
@pytest.mark.parametrize(("dtype", "temperature"), [(FLOAT32, 0.3), (FLOAT16, 5.0), (BFLOAT16, 0.7)], ids=str)
def test_every_dtype_storage_and_temperature_of_hidden_states(dtype, temperature, storage):
    """With all that a head can have at once."""
    inputs = prefix_inputs(seed=2, dtype=dtype, has_bias=True, logit_scale=0.8, softcap=7.0)
    if dtype == FLOAT32 and storage == TILE_RELATIVE:
        check_float32_inputs_stored_tile_relative(inputs, temperature=temperature)
    else:
        check_hidden(inputs, logits=storage, temperature=temperature)


def check_float32_inputs_stored_tile_relative(inputs: PrefixInputs, **options) -> None:
    """The caller asks for 11 bits of the distance to a tile's maximum: the bars of 16 bits hold, those of float32 cannot."""
    options["logits"] = TILE_RELATIVE
    actual = evaluate_linear_prefix_logprobs(inputs, upstream_of(inputs), impl=Impl.FUSED, **options)
    oracle = linear_prefix_logprobs_oracle(inputs, upstream_of(inputs), **options)
    for name, value in actual.items():
        if name.startswith("grad_"):
            assert relative_error_in_norm(value, oracle.values[name]) < 2e-3, name
        else:  # in these, the bounds hold
            assert ((value.double() - oracle.values[name].double()).abs() <= oracle.bounds[name]).all(), name


HEADS = {
    "bias": {"has_bias": True},
    "logit scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 2.0},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_s5_heads(head, dtype):
    storage = LogitStorage.FLOAT32 if dtype == FLOAT32 else TILE_RELATIVE
    check_hidden(prefix_inputs(seed=3, dtype=dtype, **HEADS[head]), logits=storage, temperature=1.3)


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)], ids=str)
def test_s5_hidden_states_weight_and_bias_may_differ_in_dtype(hidden_dtype, weight_dtype):
    """As under autocast, or with a float32 master head: multiplied in float32, each gradient in the dtype of its tensor."""
    inputs = prefix_inputs(seed=4, dtype=BFLOAT16, has_bias=True)
    head = OutputHead(inputs.head.weight.to(weight_dtype), inputs.head.bias.to(FLOAT16))
    results = check_hidden(inputs._replace(hidden_B_T_D=inputs.hidden_B_T_D.to(hidden_dtype), head=head))
    dtypes = [results[f"grad_{name}"].dtype for name in ("hidden", "weight", "bias")]
    assert dtypes == [hidden_dtype, weight_dtype, FLOAT16]


VOCABULARIES = [1, 2, 67, 127, 128, 129, 1000, 5003, 128 * 37]  # one id, below a tile, odd, several tiles of a program


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_s1_vocabularies(vocab_size):
    inputs = prefix_inputs(vocab_size, horizon=2, seed=5, dtype=BFLOAT16)
    of_logits, of_hidden = check_logits(inputs), check_hidden(inputs, logits=TILE_RELATIVE)
    if vocab_size == 1:
        for results in (of_logits, of_hidden):
            values = [value for name, value in results.items() if name not in ("mask", "is_top1")]
            assert all((value == 0).all() for value in values)  # a certain token: log-prob, entropy and gradient 0
            assert torch.equal(results["is_top1"], results["mask"])


@pytest.mark.parametrize(("dtype", "block_vocab"), [(FLOAT32, 128), (BFLOAT16, 128), (FLOAT16, 256)], ids=str)
def test_a_row_of_many_tiles(monkeypatch, dtype, block_vocab):
    """Rows that rise and fall by 600 from tile to tile, one of which the first 300 columns are masked."""
    tile = TileConfig(block_vocab, num_warps=1)
    for module in (forward_kernel, backward_kernel):
        monkeypatch.setattr(module, "choose_one_sided_tile_config", lambda vocab_size, num_ids: tile)
    inputs = prefix_inputs(700, seed=6)
    logits = inputs.logits()
    ramp = torch.linspace(0, 600, 700, device=DEVICE)
    logits[0, 1] += ramp
    logits[0, 2] -= ramp
    logits[0, 3, :300] = -INF
    inputs.token_ids_B_T[0, 2:5] = torch.tensor([690, 3, 310], device=DEVICE)
    results = check_logits(inputs, logits.to(dtype))
    assert (results["logprobs"][0] < 0).all() and (results["grad_logits"][0, 3, :300] == 0).all()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_n6_equal_logits_in_another_dtype_give_equal_log_probs(dtype):
    """Log-probs and entropies never pass through 16 bits."""
    inputs = prefix_inputs(300, seed=7)
    logits = (4 * inputs.logits()).round() / 4  # multiples of 1/4 below 16: exact in every dtype
    low, full = (
        evaluate_prefix_logprobs(x, inputs, upstream_of(inputs), impl=Impl.FUSED) for x in (logits.to(dtype), logits)
    )
    assert torch.equal(low["is_top1"], full["is_top1"])
    for name in ("logprobs", "entropy"):  # kernels of two dtypes may add in two orders
        torch.testing.assert_close(low[name], full[name], rtol=1e-6, atol=1e-6)


def test_hidden_states_give_what_their_logits_give():
    """One definition for both ops: slots, temperature, entropy, flags."""
    inputs = prefix_inputs(seed=8, has_bias=True, softcap=8.0)
    arguments = inputs.token_ids_B_T, inputs.starts_B, inputs.horizon
    options = {"lengths_B": inputs.lengths_B, "temperature": 1.7}
    of_hidden = linear_prefix_logprobs(inputs.hidden_B_T_D, inputs.head, *arguments, **options)
    of_logits = prefix_logprobs(inputs.logits(), *arguments, **options)
    for actual, expected in zip(of_hidden, of_logits, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def test_a_tied_embedding_gets_both_gradients():
    """hidden = embedding[ids], head = embedding: the gradient is the sum of the two untied ones."""
    inputs = prefix_inputs(300, seed=9)

    def gradients(embedding: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        result = linear_prefix_logprobs(
            embedding[inputs.token_ids_B_T], weight, *inputs[2:4], inputs.horizon, lengths_B=inputs.lengths_B
        )
        leaves = [embedding] if embedding is weight else [embedding, weight]
        return torch.autograd.grad(result.logprobs_B_K, leaves, upstream_of(inputs))

    tied = inputs.head.weight.clone().requires_grad_()
    of_embedding, of_head = gradients(*(inputs.head.weight.clone().requires_grad_() for _ in range(2)))
    # Float32 sums in another order.
    torch.testing.assert_close(gradients(tied, tied)[0], of_embedding + of_head, rtol=1e-6, atol=1e-6)


def in_columns_of_more(x: Tensor) -> Tensor:
    """The last axis is a slice of one twice as long and three more, whose other columns are NaN."""
    other = torch.full_like(x, NAN)
    return torch.cat([other[..., :3], x, other], dim=-1)[..., 3 : 3 + x.shape[-1]]


LAYOUTS = {
    "T before B": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last axis first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "columns of more": in_columns_of_more,
    "every second rollout": lambda x: torch.stack([x, torch.full_like(x, NAN)], dim=1)[:, 0],
    "every second column": lambda x: torch.stack([torch.full_like(x, NAN), x], dim=2)[:, :, 1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_s2_strided_logits_and_hidden_states(layout):
    """Logits of any strides give the same bits, with a contiguous gradient; NaN lies between them."""
    inputs, move = prefix_inputs(300, seed=10), LAYOUTS[layout]
    logits = inputs.logits()
    strided, hidden = move(logits), move(inputs.hidden_B_T_D)
    assert not strided.is_contiguous() and not hidden.is_contiguous() and torch.equal(strided, logits)
    upstream = upstream_of(inputs)
    expected, actual = (evaluate_prefix_logprobs(x, inputs, upstream, impl=Impl.FUSED) for x in (logits, strided))
    assert_same(actual, expected)
    expected, actual = (
        evaluate_linear_prefix_logprobs(i, upstream, impl=Impl.FUSED)
        for i in (inputs, inputs._replace(hidden_B_T_D=hidden))
    )
    assert_same(actual, expected)


def test_s2_one_row_of_logits_for_all_rollouts():
    """Expanded logits: every rollout reads the same memory, and the gradient adds up over them."""
    inputs = prefix_inputs(300, seed=11)._replace(starts_B=torch.tensor([2, 2, 3], device=DEVICE))
    logits = inputs.logits()[:1].clone().requires_grad_()
    arguments = inputs.token_ids_B_T, inputs.starts_B, inputs.horizon

    def gradient(logits_B_T_V: Tensor) -> Tensor:
        result = prefix_logprobs(logits_B_T_V, *arguments, lengths_B=inputs.lengths_B)
        return torch.autograd.grad(result.logprobs_B_K, logits, upstream_of(inputs))[0]

    assert torch.equal(gradient(logits.expand(3, -1, -1)), gradient(logits.repeat(3, 1, 1)))


@pytest.mark.parametrize("layout", ["transposed", "every third", "expanded", "float64"])
def test_s2_upstream_gradients_of_any_strides(layout):
    inputs = prefix_inputs(300, seed=12)
    upstream = upstream_of(inputs)
    if layout == "expanded":
        upstream = upstream[:1, :1].expand(3, 3)
    moved = {
        "transposed": lambda x: x.T.contiguous().T,
        "every third": lambda x: torch.stack([x, x + 1, x + 2], dim=2)[:, :, 0],
        "expanded": lambda x: x,
        "float64": lambda x: x.double(),
    }[layout](upstream)
    assert layout == "float64" or not moved.is_contiguous()
    for evaluate, arguments in (
        (evaluate_prefix_logprobs, (inputs.logits(), inputs)),
        (evaluate_linear_prefix_logprobs, (inputs,)),
    ):
        expected = evaluate(*arguments, upstream.contiguous(), impl=Impl.FUSED)
        assert_same(evaluate(*arguments, moved, impl=Impl.FUSED), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_s2_ids_starts_lengths_and_bias_of_any_strides(dtype):
    inputs = prefix_inputs(300, seed=13, has_bias=True)

    def spread(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 5), x.flip(0)], dim=-1)[..., 0]

    integers = (spread(x.to(dtype)) for x in inputs[2:5])
    strided = PrefixInputs(
        inputs.hidden_B_T_D, replace(inputs.head, bias=spread(inputs.head.bias)), *integers, inputs.horizon
    )
    assert not any(x.is_contiguous() for x in (*strided[2:5], strided.head.bias))
    upstream = upstream_of(inputs)
    expected, actual = (
        evaluate_linear_prefix_logprobs(i, upstream, impl=Impl.FUSED, logits=TILE_RELATIVE) for i in (inputs, strided)
    )
    assert_same(actual, expected)
    expected, actual = (
        evaluate_prefix_logprobs(inputs.logits(), i, upstream, impl=Impl.FUSED) for i in (inputs, strided)
    )
    assert_same(actual, expected)


def test_s2_the_registered_ops_take_vectors_of_any_strides():
    """Rows, ids and upstream gradients, each every second element of a vector twice as long."""
    logits = prefix_inputs(300, seed=15).logits()
    vectors = (
        torch.tensor([2, 9, 17], device=DEVICE),
        torch.tensor([5, 299, -1], device=DEVICE),
        torch.tensor([0.5, -2.0, 1.0], device=DEVICE),
    )
    strided = [torch.stack([x, x.flip(0)], dim=1).flatten()[::2] for x in vectors]
    runs = []
    for rows, ids, upstream in (vectors, strided):
        *outputs, sums = torch.ops.esr_kernels.prefix_logprobs_forward(logits, rows, ids, 0.7)
        gradient = torch.ops.esr_kernels.prefix_logprobs_backward(upstream, logits, rows, ids, sums, 0.7)
        runs.append([*outputs, gradient])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert [int((row != 0).any()) for row in runs[0][-1].flatten(0, 1)].count(1) == 2


def test_x7_inputs_are_not_written_to():
    inputs = prefix_inputs(300, seed=14, dtype=BFLOAT16, has_bias=True)
    logits, upstream = inputs.logits(), upstream_of(inputs)
    tensors = [logits, upstream, inputs.hidden_B_T_D, inputs.head.weight, inputs.head.bias, *inputs[2:5]]
    before = [tensor.clone() for tensor in tensors]
    evaluate_prefix_logprobs(logits, inputs, upstream, impl=Impl.FUSED)
    for storage in (LogitStorage.FLOAT32, TILE_RELATIVE):
        for workspace_bytes in (None, 2 * 4 * 384):  # d(logits) kept, or projected again
            options = {"logits": storage, "workspace_bytes": workspace_bytes}
            evaluate_linear_prefix_logprobs(inputs, upstream, impl=Impl.FUSED, **options)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
