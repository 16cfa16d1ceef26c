"""Are the log-prob ops' gradients exact for any upstream, any second call, and for exactly the tensors that ask for one?

python -m pytest tests/kernels/test_fused_logprob_gradients.py
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from esr_kernels import Impl, OutputHead, gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.logprob_inputs import GatherInputs, PrefixInputs, make_gather_inputs, make_prefix_inputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_gather_logprobs,
    evaluate_linear_prefix_logprobs,
    evaluate_prefix_logprobs,
    gather_logprobs_oracle,
    linear_prefix_logprobs_oracle,
    prefix_logprobs_oracle,
)
from esr_kernels.testing.oracle import converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
ALL = ("hidden", "weight", "bias")
VOCAB, SIZE = 300, 16
# What each schedule of the linear ops needs; 3300 bytes hold two float32 rows, or one of any other storage.
SCHEDULES = {
    "frozen head": {"trained": ("hidden",)},
    "keep": {"trained": ALL},
    "recompute": {"trained": ALL, "workspace_bytes": 3300},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_path = pytest.mark.parametrize(
    ("dtype", "schedule"), [(torch.float32, "keep"), *((torch.bfloat16, schedule) for schedule in SCHEDULES)], ids=str
)
both_linear_ops = pytest.mark.parametrize("op", ["linear_prefix", "gather"])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def prefix_inputs(seed: int, **options) -> PrefixInputs:
    """Five valid slots of six."""
    inputs = make_prefix_inputs(2, 5, VOCAB, SIZE, horizon=3, seed=seed, has_bias=True, **options)
    return converted(inputs._replace(starts_B=torch.tensor([2, 1]), lengths_B=torch.tensor([2, 4])), DEVICE)


def gather_inputs(seed: int, **options) -> GatherInputs:
    """Three ids a row, a repeated one, a row of padding and a slot of padding in another row."""
    inputs = make_gather_inputs(Shape(5, VOCAB, SIZE, SIZE + 1), 3, seed=seed, has_bias=True, **options)
    inputs.token_ids_N_K[3, 1] = -1
    return converted(inputs, DEVICE)


def make_inputs(op: str, seed: int, **options) -> PrefixInputs | GatherInputs:
    return gather_inputs(seed, **options) if op == "gather" else prefix_inputs(seed, **options)


def normal_upstream(op: str, seed: int = 0) -> Tensor:
    shape = (5, 3) if op == "gather" else (2, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def evaluation(op: str) -> Callable:
    return evaluate_gather_logprobs if op == "gather" else evaluate_linear_prefix_logprobs


def fused(op: str, inputs: PrefixInputs | GatherInputs, upstream: Tensor, **options) -> dict[str, Tensor]:
    return evaluation(op)(inputs, upstream, impl=Impl.FUSED, **options)


def value_of(op: str, inputs: PrefixInputs | GatherInputs, leaves: list[Tensor], **options) -> Tensor:
    """Log-probs of these hidden states, this weight and this bias."""
    hidden, *head = leaves
    if op == "gather":
        return gather_logprobs(hidden, OutputHead(*head), inputs.token_ids_N_K, **options)
    where = inputs.token_ids_B_T, inputs.starts_B, inputs.horizon
    return linear_prefix_logprobs(hidden, OutputHead(*head), *where, lengths_B=inputs.lengths_B, **options).logprobs_B_K


def leaves_of(inputs: PrefixInputs | GatherInputs, trained: tuple[str, ...] = ALL) -> list[Tensor]:
    tensors = zip(ALL, (inputs[0], inputs.head.weight, inputs.head.bias), strict=True)
    return [tensor.clone().requires_grad_(name in trained) for name, tensor in tensors]


# One value per slot, in the order of the slots; the sixth of the prefix is not valid.
UPSTREAMS = {
    "mixed signs and sizes": [1e-4, -2.0, 0.0, 30.0, -0.01],
    "all zero": [0.0] * 5,
    "large": [3e4, -1e4, 2e4, 5e3, -6e4],
    "tiny": [3e-6, -1e-6, 2e-7, 5e-6, -6e-6],
}


def upstream_of(op: str, name: str) -> Tensor:
    first = torch.tensor(UPSTREAMS[name], device=DEVICE)
    if op != "gather":
        return torch.stack([first[[0, 1, 4]], first[[2, 3, 4]]])
    upstream = torch.stack([first, -first.roll(2), first.roll(1) * 1e-2], dim=1)  # of several sizes in one row
    upstream[2] = 0.0
    return upstream


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_g1_any_upstream_gradient_of_logits(upstream):
    inputs, upstream_B_K = prefix_inputs(1), upstream_of("prefix", upstream)
    results = check_against(prefix_logprobs_oracle, evaluate_prefix_logprobs, inputs.logits(), inputs, upstream_B_K)
    predicting = results["grad_logits"][0, 1:3]  # of the first two slots
    assert (predicting[upstream_B_K[0, :2] == 0] == 0).all()


@every_schedule
@pytest.mark.parametrize("upstream", UPSTREAMS)
@both_linear_ops
def test_g1_any_upstream_gradient_of_hidden_states_and_head(op, upstream, schedule):
    """d(logits) and the upstream gradient meet in 16 bits: as in a mean over 3200 rows, or with a loss scale of 2^16."""
    inputs, upstream_gradient = make_inputs(op, 2, dtype=torch.bfloat16), upstream_of(op, upstream)
    oracle_of = gather_logprobs_oracle if op == "gather" else linear_prefix_logprobs_oracle
    options = dict(SCHEDULES[schedule])
    trained = options.pop("trained")
    oracle_of = functools.partial(oracle_of, trained=trained)
    evaluate = functools.partial(evaluation(op), trained=trained)
    results = check_against(oracle_of, evaluate, inputs, upstream_gradient, **options)
    if upstream == "all zero":
        assert all((results[f"grad_{name}"] == 0).all() for name in trained)
    elif op == "gather":
        assert (results["grad_hidden"][(upstream_gradient == 0).all(-1)] == 0).all()


@every_schedule
@both_linear_ops
def test_g1_an_upstream_near_the_smallest_number(op, schedule):
    """bfloat16 loses its last bits there and PyTorch's gradient with them; finite, and as near as that. In the first row it
    is the smallest number that there is, of which the temperature leaves nothing."""
    inputs, upstream = make_inputs(op, 3, dtype=torch.bfloat16), 1e-38 * normal_upstream(op)
    upstream[0, 1:], upstream[0, 0] = 0.0, 1.4e-45
    trained = SCHEDULES[schedule]["trained"]
    results = fused(op, inputs, upstream, temperature=3.0, **SCHEDULES[schedule])
    in_torch, exact = (
        evaluation(op)(x, upstream, impl=Impl.REFERENCE, temperature=3.0, trained=trained)
        for x in (inputs, converted(inputs, torch.float64))
    )
    for name in (f"grad_{name}" for name in trained):
        assert results[name].isfinite().all(), name
        error, of_torch = (relative_error_in_norm(x[name], exact[name]) for x in (results, in_torch))
        assert error < 1.2 * of_torch + 0.01, name


@both_linear_ops
def test_g1_the_upstream_gradient_may_come_from_any_expression(op):
    """A loss in which every slot has another weight, and one has none; the mask of the prefix ops is not asked."""
    inputs, leaves = make_inputs(op, 4), leaves_of(make_inputs(op, 4))
    weights = normal_upstream(op, seed=1)
    weights[1, 1] = 0.0
    logprobs = value_of(op, inputs, leaves)
    (logprobs.exp() * weights).sum().backward()
    upstream = logprobs.detach().exp() * weights
    expected = fused(op, inputs, upstream)
    for name, leaf in zip(ALL, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[f"grad_{name}"], rtol=1e-6, atol=1e-8)


def test_g2_second_backward_of_logits():
    inputs, upstream = prefix_inputs(5), normal_upstream("prefix")
    logits = inputs.logits().requires_grad_()
    logprobs = prefix_logprobs(logits, *inputs[2:4], inputs.horizon, lengths_B=inputs.lengths_B).logprobs_B_K
    (first,) = torch.autograd.grad(logprobs, logits, upstream, retain_graph=True)
    (other,) = torch.autograd.grad(logprobs, logits, -4.0 * upstream, retain_graph=True)
    (second,) = torch.autograd.grad(logprobs, logits, upstream)
    assert torch.equal(first, second) and first.abs().sum() > 0
    assert torch.equal(other, -4.0 * first)  # a power of two: exact


@every_path
@both_linear_ops
def test_g2_second_backward_of_hidden_states_and_head(op, dtype, schedule):
    """What was kept must not be scaled or overwritten by the first backward."""
    inputs, upstream, options = make_inputs(op, 6, dtype=dtype), normal_upstream(op), dict(SCHEDULES[schedule])
    leaves = leaves_of(inputs, options.pop("trained"))
    logprobs = value_of(op, inputs, leaves, **options)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    first = torch.autograd.grad(logprobs, trained, upstream, retain_graph=True)
    other = torch.autograd.grad(logprobs, trained, -4.0 * upstream, retain_graph=True)
    second = torch.autograd.grad(logprobs, trained, upstream)
    for one, scaled, again in zip(first, other, second, strict=True):
        assert torch.equal(one, again) and one.abs().sum() > 0
        assert torch.equal(scaled, -4.0 * one)


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_g2_micro_batches_accumulate_to_one_batch(schedule):
    """Rows of ids in parts, and rollouts one by one."""
    options = {"workspace_bytes": SCHEDULES[schedule].get("workspace_bytes")}
    inputs, upstream = gather_inputs(7), normal_upstream("gather")
    whole, leaves = fused("gather", inputs, upstream, **options), leaves_of(inputs)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = inputs._replace(token_ids_N_K=inputs.token_ids_N_K[rows])
        value_of("gather", part, [leaves[0][rows], *leaves[1:]], **options).backward(upstream[rows])
    for name, leaf in zip(ALL, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, whole[f"grad_{name}"], rtol=1e-5, atol=1e-6)

    inputs, upstream = prefix_inputs(7), normal_upstream("prefix")
    whole, leaves = fused("prefix", inputs, upstream, **options), leaves_of(inputs)
    for row in range(2):
        part = inputs._replace(**{name: getattr(inputs, name)[row : row + 1] for name in inputs._fields[2:5]})
        value_of("prefix", part, [leaves[0][row : row + 1], *leaves[1:]], **options).backward(upstream[row : row + 1])
    for name, leaf in zip(ALL, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, whole[f"grad_{name}"], rtol=1e-5, atol=1e-6)


SUBSETS = {
    "weight": None,
    "hidden and bias": None,
    "none": None,
    "bias": 3300,  # a workspace, with which backward makes d(logits) again
    "hidden and weight": 3300,
    "weight and bias": 3300,
}


@functools.cache
def all_gradients(op: str, workspace_bytes: int | None) -> dict[str, Tensor]:
    inputs = make_inputs(op, 8, dtype=torch.bfloat16)
    return fused(op, inputs, normal_upstream(op), workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("subset", SUBSETS)
@both_linear_ops
def test_g3_every_subset_of_gradients(op, subset):
    """Each gradient that is asked for, bit by bit as when all are, and no other one."""
    everything, trained = all_gradients(op, SUBSETS[subset]), tuple(name for name in ALL if name in subset)
    inputs, upstream = make_inputs(op, 8, dtype=torch.bfloat16), normal_upstream(op)
    results = fused(op, inputs, upstream, trained=trained, workspace_bytes=SUBSETS[subset])
    assert [name for name in results if name.startswith("grad_")] == [f"grad_{name}" for name in trained]
    for name, value in results.items():
        assert torch.equal(value, everything[name]), name


def largest_allocation(function) -> int:
    """Bytes of the largest tensor that `function` allocates."""
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, DEVICE.upper())}
    with torch.profiler.profile(activities=activities, profile_memory=True) as run:
        function()
    return max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in run.events())


@both_linear_ops
def test_g3_a_frozen_head_allocates_no_weight_gradient(op):
    """Nothing of the head's size is allocated in forward or backward, where logits and hidden states are far smaller."""
    shape = Shape(2, 640, 64, 65)
    if op == "gather":
        inputs = make_gather_inputs(shape, 2, seed=9)
    else:
        inputs = make_prefix_inputs(1, 3, shape.vocab_size, shape.student_size, horizon=2, seed=9)
    inputs, upstream = converted(inputs, DEVICE), torch.ones(2 if op == "gather" else 1, 2, device=DEVICE)
    weight_bytes = 4 * shape.vocab_size * shape.student_size
    assert largest_allocation(lambda: fused(op, inputs, upstream, trained=("hidden",))) < weight_bytes / 2
    assert largest_allocation(lambda: fused(op, inputs, upstream, trained=("hidden", "weight"))) >= weight_bytes


def test_g3_logits_that_need_no_gradient_get_none():
    inputs = prefix_inputs(10)
    result = prefix_logprobs(inputs.logits(), *inputs[2:4], inputs.horizon, lengths_B=inputs.lengths_B)
    assert not any(field.requires_grad for field in result)


@pytest.mark.parametrize("op", ["prefix", "linear_prefix"])
def test_g3_only_the_log_probs_are_differentiable(op):
    inputs = prefix_inputs(11)
    where = inputs.token_ids_B_T, inputs.starts_B, inputs.horizon
    if op == "prefix":
        result = prefix_logprobs(inputs.logits().requires_grad_(), *where, lengths_B=inputs.lengths_B)
    else:
        head = OutputHead(inputs.head.weight.requires_grad_(), inputs.head.bias)
        result = linear_prefix_logprobs(inputs.hidden_B_T_D, head, *where, lengths_B=inputs.lengths_B)
    assert [name for name, field in result._asdict().items() if field.requires_grad] == ["logprobs_B_K"]


# Of a sum the upstream gradient needs none itself, of squares it does.
SECOND_DERIVATIVES = [
    ("prefix", "keep", "sum"),
    ("prefix", "keep", "square"),
    ("linear_prefix", "frozen head", "square"),
    ("linear_prefix", "keep", "sum"),
    ("linear_prefix", "recompute", "square"),
    ("gather", "keep", "square"),
    ("gather", "recompute", "sum"),
]


@pytest.mark.parametrize(("op", "schedule", "loss"), SECOND_DERIVATIVES)
def test_a_second_derivative_is_refused(op, schedule, loss):
    """The kernels have none: asking for one is an error, never a number that leaves half of it out."""
    inputs, options = make_inputs(op, 12), dict(SCHEDULES[schedule])
    leaves = leaves_of(inputs, options.pop("trained"))
    if op == "prefix":
        leaves = [inputs.logits().requires_grad_()]
        where = inputs.token_ids_B_T, inputs.starts_B, inputs.horizon
        logprobs = prefix_logprobs(leaves[0], *where, lengths_B=inputs.lengths_B).logprobs_B_K
    else:
        logprobs = value_of(op, inputs, leaves, **options)
    value = (logprobs if loss == "sum" else logprobs.square()).sum()
    with pytest.raises(RuntimeError, match=rf"^{op}_logprobs: .*FUSED has no second derivative.*create_graph=True"):
        torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], create_graph=True)


def in_inference_mode(x: Tensor) -> Tensor:
    """As a forward pass or a rollout under torch.inference_mode gives it; autograd may not save it."""
    with torch.inference_mode():
        return x.clone()


# What is made in inference mode and what is trained.
MADE_THERE = {
    "ids and a frozen head": (("ids", "weight", "bias"), ("hidden",)),
    "hidden states of a frozen model": (("ids", "hidden"), ("weight", "bias")),
    "all but a bias": (("ids", "hidden", "weight"), ("bias",)),
}


@pytest.mark.parametrize("workspace_bytes", [None, 3300], ids=["keep", "recompute"])
@pytest.mark.parametrize("what", MADE_THERE)
@both_linear_ops
def test_tensors_made_in_inference_mode(op, what, workspace_bytes):
    made_there, trained = MADE_THERE[what]
    inputs, upstream = make_inputs(op, 13), normal_upstream(op)
    expected = fused(op, inputs, upstream, trained=trained, workspace_bytes=workspace_bytes)
    if op == "gather":
        inputs = inputs._replace(token_ids_N_K=in_inference_mode(inputs.token_ids_N_K))
    else:
        inputs = inputs._replace(**{name: in_inference_mode(getattr(inputs, name)) for name in inputs._fields[2:5]})
    leaves = [
        in_inference_mode(leaf) if name in made_there else leaf
        for name, leaf in zip(ALL, leaves_of(inputs, trained), strict=True)
    ]
    value = value_of(op, inputs, leaves, workspace_bytes=workspace_bytes)
    value.backward(upstream)
    for name, leaf in zip(ALL, leaves, strict=True):
        if name in trained:
            assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


def test_logits_made_with_grad_and_ids_made_in_inference_mode():
    inputs, upstream = prefix_inputs(14), normal_upstream("prefix")
    expected = evaluate_prefix_logprobs(inputs.logits(), inputs, upstream, impl=Impl.FUSED)
    inputs = inputs._replace(**{name: in_inference_mode(getattr(inputs, name)) for name in inputs._fields[2:5]})
    results = evaluate_prefix_logprobs(inputs.logits(), inputs, upstream, impl=Impl.FUSED)
    assert torch.equal(results["grad_logits"], expected["grad_logits"])
