"""Do the fused log-prob ops run the same way every time: repeated, compiled, under autocast, on another thread?

python -m pytest tests/kernels/test_fused_logprob_execution.py
"""

import functools
import threading

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esr_kernels import Impl, LogitStorage, OutputHead, gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.logprob_inputs import GatherInputs, PrefixInputs, make_gather_inputs, make_prefix_inputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_gather_logprobs,
    evaluate_linear_prefix_logprobs,
    evaluate_prefix_logprobs,
)
from esr_kernels.testing.oracle import Results, converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
VOCAB, SIZE = 300, 16
# d(logits) or logits kept, or made again in backward: 3300 bytes hold two float32 rows, or one of any other storage.
WORKSPACES = {"keep": None, "recompute": 3300}
every_workspace = pytest.mark.parametrize("workspace", WORKSPACES)
OPS = ("prefix", "linear_prefix", "gather")
REGISTERED = [
    "prefix_logprobs_forward",
    "prefix_logprobs_backward",
    "linear_prefix_logprobs_forward",
    "linear_backward_of_kept",
    "linear_prefix_logprobs_backward_by_recomputing",
    "gather_logprobs_forward",
    "gather_logprobs_backward",
]


def prefix_inputs(batch_size: int = 2, *, vocab_size: int = VOCAB, **options) -> PrefixInputs:
    """Rollouts of one to three valid slots of three."""
    inputs = make_prefix_inputs(batch_size, 5, vocab_size, SIZE, horizon=3, has_bias=True, **options)
    starts, rows = torch.full((batch_size,), 2), torch.arange(batch_size)
    return converted(inputs._replace(starts_B=starts, lengths_B=1 + rows % 3), DEVICE)


def gather_inputs(rows: int = 3, *, vocab_size: int = VOCAB, **options) -> GatherInputs:
    inputs = make_gather_inputs(Shape(rows, vocab_size, SIZE, SIZE + 1), 3, has_bias=True, **options)
    return converted(inputs, DEVICE)


def upstream_of(inputs: PrefixInputs | GatherInputs) -> Tensor:
    is_prefix = isinstance(inputs, PrefixInputs)
    shape = (len(inputs.starts_B), inputs.horizon) if is_prefix else inputs.token_ids_N_K.shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def evaluate(
    op: str, workspace: str = "keep", *, seed: int = 1, dtype: torch.dtype = torch.bfloat16, **options
) -> Results:
    """Results and all gradients of one call."""
    if op == "gather":
        inputs, function = gather_inputs(seed=seed, dtype=dtype), evaluate_gather_logprobs
    else:
        inputs, function = prefix_inputs(seed=seed, dtype=dtype), evaluate_linear_prefix_logprobs
    if op == "prefix":
        return evaluate_prefix_logprobs(inputs.logits(), inputs, upstream_of(inputs), impl=Impl.FUSED)
    options["workspace_bytes"] = WORKSPACES[workspace]
    return function(inputs, upstream_of(inputs), impl=Impl.FUSED, **options)


def assert_same(first: Results, second: Results) -> None:
    """Bit by bit."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("workspace", "storage"), [("keep", LogitStorage.FLOAT32), ("recompute", LogitStorage.TILE_RELATIVE_FP16)]
)
@pytest.mark.parametrize("op", ["linear_prefix", "gather"])
def test_x5_two_runs_agree_bit_by_bit_whatever_ran_between(op, storage, workspace):
    first = evaluate(op, workspace, logits=storage)
    evaluate(op, "keep", seed=2, dtype=torch.float32)
    assert_same(evaluate(op, workspace, logits=storage), first)


def test_x5_two_runs_of_logits_agree_bit_by_bit_whatever_ran_between():
    first = evaluate("prefix")
    evaluate("prefix", seed=2, dtype=torch.float32)
    assert_same(evaluate("prefix"), first)


def assert_compiled_is_eager(function, calls: list[tuple], num_leaves: int) -> None:
    """Value and gradients of the first arguments, in one graph, for calls that differ in sizes and numbers."""
    compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
    for arguments in calls:
        results = []
        for f in (function, compiled):
            leaves = [leaf.detach().clone().requires_grad_() for leaf in arguments[:num_leaves]]
            value, *others = f(*leaves, *arguments[num_leaves:])
            upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
            results.append([value, *others, *torch.autograd.grad(value, leaves, upstream)])
        for eager, traced in zip(*results, strict=True):
            assert traced.dtype == eager.dtype
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


def test_x2_prefix_logprobs_compiles_to_one_graph():
    """With the layer before it, for several batch sizes and temperatures; NaN in a column that no slot reads."""

    def loss(logits, ids, starts, lengths, temperature):
        result = prefix_logprobs(logits * 0.5, ids, starts, 3, lengths_B=lengths, temperature=temperature)
        return result.logprobs_B_K * 3.0, result.entropy_B_K, result.mask_B_K, result.is_top1_B_K

    calls = []
    for batch_size, temperature in ((2, 1.0), (3, 0.7)):
        inputs = prefix_inputs(batch_size, seed=batch_size)
        logits = inputs.logits()
        logits[:, 4] = torch.nan
        calls.append((logits, *inputs[2:5], temperature))
    assert_compiled_is_eager(loss, calls, num_leaves=1)


@every_workspace
def test_x2_linear_prefix_logprobs_compiles_to_one_graph(workspace):
    """A traced graph must hold for other starts and lengths, also where they are on the CPU."""

    def loss(hidden, weight, bias, ids, starts, lengths, temperature):
        head = OutputHead(weight, bias, logit_scale=0.5, softcap=8.0)
        options = {"lengths_B": lengths, "temperature": temperature, "workspace_bytes": WORKSPACES[workspace]}
        result = linear_prefix_logprobs(hidden.tanh(), head, ids, starts, 3, **options)
        return result.logprobs_B_K, result.entropy_B_K, result.is_top1_B_K

    calls = []
    for batch_size, temperature in ((2, 1.0), (3, 0.7))[: 2 if workspace == "keep" else 1]:
        inputs = prefix_inputs(batch_size, seed=batch_size)
        leaves = inputs.hidden_B_T_D, inputs.head.weight, inputs.head.bias
        for lengths in (inputs.lengths_B, (inputs.lengths_B + 1) % 4):
            calls.append((*leaves, inputs.token_ids_B_T, inputs.starts_B.cpu(), lengths.cpu(), temperature))
    assert_compiled_is_eager(loss, calls, num_leaves=3)


@every_workspace
def test_x2_gather_logprobs_compiles_to_one_graph(workspace):
    def loss(hidden, weight, bias, ids, scale, temperature):
        head = OutputHead(weight, bias, logit_scale=scale)
        logprobs = gather_logprobs(
            hidden * 2, head, ids, temperature=temperature, workspace_bytes=WORKSPACES[workspace]
        )
        return logprobs.sum(0, keepdim=True), logprobs.exp()

    calls = []
    for rows, scale, temperature in ((3, 1.0, 1.0), (4, 0.5, 0.8))[: 2 if workspace == "keep" else 1]:
        inputs = gather_inputs(rows, seed=rows)
        leaves = inputs.hidden_N_D, inputs.head.weight, inputs.head.bias
        calls.append((*leaves, inputs.token_ids_N_K, scale, temperature))
    assert_compiled_is_eager(loss, calls, num_leaves=3)


class RecordedCalls(TorchDispatchMode):
    """Every call of an op of this library, with its arguments, detached as autograd passes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "esr_kernels":
            self.calls.append((function, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return function(*args, **(kwargs or {}))


@functools.cache
def recorded_calls() -> list:
    """Whole tiles, for opcheck takes the padding of kept logits for a difference; one call of each schedule and storage."""
    prefix, gather = prefix_inputs(2, vocab_size=384, seed=5), gather_inputs(2, vocab_size=384, seed=5)
    with RecordedCalls() as recorded:
        evaluate_prefix_logprobs(prefix.logits().bfloat16(), prefix, upstream_of(prefix), impl=Impl.FUSED)
        for trained, workspace, storage in (
            (("hidden",), "keep", LogitStorage.TILE_RELATIVE_FP16),
            (("hidden", "weight", "bias"), "keep", LogitStorage.FLOAT32),
            (("weight", "bias"), "recompute", LogitStorage.FLOAT32),
            ((), "recompute", LogitStorage.FLOAT32),
        ):
            options = {"impl": Impl.FUSED, "trained": trained, "logits": storage}
            options["workspace_bytes"] = WORKSPACES[workspace]
            evaluate_linear_prefix_logprobs(prefix, upstream_of(prefix), **options)
            evaluate_gather_logprobs(gather, upstream_of(gather), **options)
    return recorded.calls


def name_of(function) -> str:
    return function.name().removeprefix("esr_kernels::").split(".")[0]


@pytest.mark.parametrize("name", REGISTERED)
def test_x2_every_registered_op_passes_opcheck(name):
    """Schema (nothing is written to or aliased), fake against real results, tracing with symbolic sizes."""
    calls = recorded_calls()
    assert {name_of(function) for function, _ in calls} == set(REGISTERED)
    for function, args in calls:
        if name_of(function) == name:
            torch.library.opcheck(function, args)


def test_x3_backward_on_another_thread():
    """As the autograd engine does for a CUDA device; and forward on a thread of its own."""
    prefix, gather = prefix_inputs(seed=6), gather_inputs(seed=6)
    where = prefix.token_ids_B_T, prefix.starts_B, prefix.horizon
    tensors = prefix.logits(), prefix.hidden_B_T_D, gather.hidden_N_D

    def forward() -> list[tuple[Tensor, Tensor, Tensor]]:
        logits, hidden, rows = (x.detach().clone().requires_grad_() for x in tensors)
        return [
            (prefix_logprobs(logits, *where).logprobs_B_K, logits, upstream_of(prefix)),
            (linear_prefix_logprobs(hidden, prefix.head, *where).logprobs_B_K, hidden, upstream_of(prefix)),
            (gather_logprobs(rows, gather.head, gather.token_ids_N_K), rows, upstream_of(gather)),
        ]

    def backward(calls: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        found.append([torch.autograd.grad(value, leaf, upstream)[0] for value, leaf, upstream in calls])

    found = []
    backward(forward())
    threads = [
        threading.Thread(target=backward, args=(forward(),)),
        threading.Thread(target=lambda: backward(forward())),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(found) == 3
    for gradients in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients, found[0], strict=True))


@pytest.mark.parametrize(
    ("op", "workspace"), [("prefix", "keep"), *((op, w) for op in OPS[1:] for w in WORKSPACES)], ids=str
)
def test_x4_autocast_changes_nothing(op, workspace):
    """An autocast region would project, and so store the logits, in 16 bits."""
    expected = evaluate(op, workspace, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16 if workspace == "keep" else torch.float16):
        assert_same(evaluate(op, workspace, dtype=torch.float32), expected)


def arguments_of(op: str, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict:
    ids, hidden = (torch.zeros(shape, device=device) for shape in ((2, 5), (2, 5, 4)))
    ids, hidden, weight = ids.long(), hidden.to(dtype), torch.zeros(7, 4, device=device)
    if op == "gather_logprobs":
        return {"hidden_N_D": hidden[:, 0], "head": weight, "token_ids_N_K": ids}
    where = {"token_ids_B_T": ids, "starts_B": torch.tensor([1, 3], device=device), "horizon": 3}
    if op == "prefix_logprobs":
        return {"logits_B_T_V": hidden, **where}
    return {"hidden_B_T_D": hidden, "head": weight, **where}


FUNCTIONS = {f.__name__: f for f in (prefix_logprobs, linear_prefix_logprobs, gather_logprobs)}
FLOAT64 = torch.float64
HIDDEN64, WEIGHT64 = (torch.zeros(shape, dtype=FLOAT64, device=DEVICE) for shape in ((2, 5, 4), (7, 4)))
BIAS64 = {"head": OutputHead(WEIGHT64.float(), WEIGHT64[:, 0])}
MANY_IDS = {"token_ids_N_K": torch.zeros(2, 1025, dtype=torch.int64, device=DEVICE)}


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        ("prefix_logprobs", {"logits_B_T_V": HIDDEN64}, TypeError, "logits_B_T_V must .*float64"),
        ("linear_prefix_logprobs", {"hidden_B_T_D": HIDDEN64}, TypeError, "hidden_B_T_D must .*float64"),
        ("linear_prefix_logprobs", {"head": WEIGHT64}, TypeError, r"head\.weight must .*float64"),
        ("gather_logprobs", {"hidden_N_D": HIDDEN64[:, 0]}, TypeError, "hidden_N_D must .*float64"),
        ("gather_logprobs", BIAS64, TypeError, r"head\.bias must .*float64"),
        ("gather_logprobs", MANY_IDS, ValueError, r"token_ids_N_K must have at most 1024 ids per row .* got 1025; .*REFERENCE"),
        ("linear_prefix_logprobs", {"logits": "bfloat16"}, ValueError, "logits must be one of .*, got 'bfloat16'"),
        ("linear_prefix_logprobs", {"workspace_bytes": 0}, ValueError, "workspace_bytes must be > 0 or None, got 0"),
        ("gather_logprobs", {"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be an int > 0 or None, got float"),
        ("gather_logprobs", {"logits": 16}, ValueError, "logits must be one of .*, got 16"),
    ],
)  # fmt: skip
def test_fused_refuses(op, changed, error, message):
    with pytest.raises(error, match=f"^{op}: {message}"):
        FUNCTIONS[op](**{**arguments_of(op), **changed})


@pytest.mark.parametrize("op", ["linear_prefix_logprobs", "gather_logprobs"])
def test_a_workspace_below_one_row_is_refused_with_the_least_that_would_do(op):
    """One side: 128 float32 logits; and with this many bytes it runs."""
    arguments = arguments_of(op)
    with pytest.raises(ValueError, match=f"^{op}: workspace_bytes must be at least 512, .* one row of 7 ids, got 511"):
        FUNCTIONS[op](**arguments, logits="float32", workspace_bytes=511)
    result = FUNCTIONS[op](**arguments, logits="float32", workspace_bytes=512)
    logprobs = result if op == "gather_logprobs" else result.logprobs_B_K[result.mask_B_K]
    torch.testing.assert_close(logprobs, -torch.log(torch.full_like(logprobs, 7.0)))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_what_fused_lacks_is_named(monkeypatch, op):
    monkeypatch.setattr("esr_kernels.impl.find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=rf"^{op}: .*needs Triton.* impl=Impl\.REFERENCE"):
        FUNCTIONS[op](**arguments_of(op))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match=f"^{op}: .*needs tensors on a CUDA device, got cpu"):
        FUNCTIONS[op](**arguments_of(op, device="cpu"))
    FUNCTIONS[op](**arguments_of(op, FLOAT64), impl=Impl.REFERENCE)
