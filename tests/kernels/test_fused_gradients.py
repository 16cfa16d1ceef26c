"""Are the kernels' gradients exact for any upstream, any second call, and exactly those tensors that ask for one?

python -m pytest tests/kernels/test_fused_gradients.py
"""

import math

import pytest
import torch

from esr_kernels import (
    ForwardKL,
    GeneralizedJSD,
    Impl,
    LogitStorage,
    OutputHead,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    linear_divergence,
    token_divergence,
)
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.error_budget import check_linear_divergence, check_token_divergence
from esr_kernels.testing.inputs import LinearInputs, LogitPair, make_linear_inputs, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import converted, evaluate_linear_divergence, evaluate_token_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Shape(rows=5, vocab_size=300, student_size=16, teacher_size=24)
# One for each schedule of the linear op: d(logits) kept, or one row of logits at a time, recomputed in backward.
WORKSPACES = {"keep": None, "recompute": 6000}
every_workspace = pytest.mark.parametrize("workspace", WORKSPACES)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def logit_pair(rows: int, seed: int, **options) -> LogitPair:
    return converted(make_logit_pair(rows, 300, seed=seed, **options), DEVICE)


def linear_inputs(seed: int, **options) -> LinearInputs:
    return converted(make_linear_inputs(SMALL, seed=seed, **options), DEVICE)


UPSTREAMS = {
    "mixed signs and sizes": [1e-4, -2.0, 30.0, 0.7, -0.01],
    "one row of five": [0.0, 0.0, -3.0, 0.0, 0.0],
    "all zero": [0.0] * 5,
    "large": [3e4, -1e4, 2e4, 5e3, -6e4],
    "tiny": [3e-6, -1e-6, 2e-7, 5e-6, -6e-6],
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("name", ["forward_kl", "jsd_0.5"])
def test_g1_any_upstream_gradient_of_logits(name, upstream):
    pair, upstream_N = logit_pair(5, seed=1), torch.tensor(UPSTREAMS[upstream], device=DEVICE)
    results = check_token_divergence(pair, DIVERGENCES[name], upstream_N)
    assert (results["grad_student_logits"][upstream_N == 0] == 0).all()


@every_workspace
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_g1_any_upstream_gradient_of_hidden_and_head(upstream, dtype, workspace):
    """Also where d(logits) and the upstream gradient meet in 16 bits: a mean over 3200 rows or a loss scale of 2^16."""
    inputs, upstream_N = linear_inputs(seed=2, dtype=dtype), torch.tensor(UPSTREAMS[upstream], device=DEVICE)
    results = check_linear_divergence(inputs, ReverseKL(), upstream_N, workspace_bytes=WORKSPACES[workspace])
    assert (results["grad_student_hidden"][upstream_N == 0] == 0).all()
    assert upstream != "all zero" or (results["grad_student_weight"] == 0).all()


def test_g1_the_upstream_gradient_may_come_from_any_expression():
    """A loss of which each row has another weight, and one row of the batch none at all."""
    pair, weights = logit_pair(5, seed=3), torch.tensor([0.5, -1.5, 2.0, 0.25], device=DEVICE)
    student = pair.student_N_V.requires_grad_()
    divergence_N = token_divergence(student, pair.teacher_N_V).divergence_N
    (divergence_N[:4].square() * weights).sum().backward()
    upstream = torch.cat([2 * divergence_N[:4].detach() * weights, weights.new_zeros(1)])
    expected = evaluate_token_divergence(pair, ReverseKL(), upstream, impl=Impl.FUSED)["grad_student_logits"]
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)
    assert (student.grad[4] == 0).all()


def test_g2_second_backward_of_logits():
    pair, upstream = logit_pair(5, seed=4), make_upstream(5, device=DEVICE)
    student = pair.student_N_V.requires_grad_()
    divergence_N = token_divergence(student, pair.teacher_N_V, GeneralizedJSD(0.5)).divergence_N
    (first,) = torch.autograd.grad(divergence_N, student, upstream, retain_graph=True)
    (other,) = torch.autograd.grad(divergence_N, student, -3.0 * upstream, retain_graph=True)
    (second,) = torch.autograd.grad(divergence_N, student, upstream)
    assert torch.equal(first, second) and first.abs().sum() > 0
    torch.testing.assert_close(other, -3.0 * first, rtol=1e-6, atol=1e-9)


@every_workspace
@pytest.mark.parametrize("trained", ["all", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_g2_second_backward_of_hidden_and_head(dtype, trained, workspace):
    """Kept d(logits) must not be scaled in place by the first backward."""
    inputs, upstream = linear_inputs(seed=5, dtype=dtype), make_upstream(5, device=DEVICE)
    hidden, weight = inputs.student_hidden_N_D.requires_grad_(), inputs.student_head.weight
    leaves = [hidden, weight.requires_grad_()] if trained == "all" else [hidden]
    divergence_N = linear_divergence(
        hidden,
        weight,
        inputs.teacher_hidden_N_E,
        inputs.teacher_head,
        workspace_bytes=WORKSPACES[workspace],
    ).divergence_N
    first = torch.autograd.grad(divergence_N, leaves, upstream, retain_graph=True)
    other = torch.autograd.grad(divergence_N, leaves, -4.0 * upstream, retain_graph=True)
    second = torch.autograd.grad(divergence_N, leaves, upstream)
    for one, scaled, again in zip(first, other, second, strict=True):
        assert torch.equal(one, again) and one.abs().sum() > 0
        assert torch.equal(scaled, -4.0 * one)  # a power of two: exact


@every_workspace
def test_g2_micro_batches_accumulate_to_one_batch(workspace):
    inputs, upstream = linear_inputs(seed=6, has_bias=True), make_upstream(5, device=DEVICE)
    options = {"impl": Impl.FUSED, "workspace_bytes": WORKSPACES[workspace]}
    whole = evaluate_linear_divergence(inputs, ForwardKL(), upstream, **options)
    weight, bias = (t.clone().requires_grad_() for t in (inputs.student_head.weight, inputs.student_head.bias))
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        divergence_N = linear_divergence(
            inputs.student_hidden_N_D[rows],
            OutputHead(weight, bias),
            inputs.teacher_hidden_N_E[rows],
            inputs.teacher_head,
            ForwardKL(),
            workspace_bytes=WORKSPACES[workspace],
        ).divergence_N
        divergence_N.backward(upstream[rows])
    torch.testing.assert_close(weight.grad, whole["grad_student_weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad, whole["grad_student_bias"], rtol=1e-5, atol=1e-6)


SUBSETS = {
    "hidden": ("student_hidden",),
    "weight": ("student_weight",),
    "bias": ("student_bias",),
    "hidden and weight": ("student_hidden", "student_weight"),
    "hidden and bias": ("student_hidden", "student_bias"),
    "weight and bias": ("student_weight", "student_bias"),
}


@every_workspace
@pytest.mark.parametrize("subset", SUBSETS)
def test_g3_every_subset_of_gradients(subset, workspace):
    inputs = linear_inputs(seed=7, dtype=torch.bfloat16, has_bias=True)
    results = check_linear_divergence(
        inputs,
        ReverseKL(),
        make_upstream(5, device=DEVICE),
        trained=SUBSETS[subset],
        logits=LogitStorage.TILE_RELATIVE_FP16,
        workspace_bytes=WORKSPACES[workspace],
    )
    assert [name for name in results if name.startswith("grad_")] == [f"grad_{name}" for name in SUBSETS[subset]]


def largest_allocation(function) -> int:
    """Bytes of the largest tensor that `function` allocates."""
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, DEVICE.upper())}
    with torch.profiler.profile(activities=activities, profile_memory=True) as run:
        function()
    return max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in run.events())


def test_g3_a_frozen_head_allocates_no_weight_gradient():
    """Nothing of the head's size is allocated in forward or backward, where logits and hidden states are far smaller."""
    shape = Shape(rows=2, vocab_size=640, student_size=64, teacher_size=65)
    inputs, upstream = converted(make_linear_inputs(shape, seed=8), DEVICE), make_upstream(2, device=DEVICE)

    def bytes_allocated(trained):
        return largest_allocation(
            lambda: evaluate_linear_divergence(inputs, ReverseKL(), upstream, impl=Impl.FUSED, trained=trained)
        )

    weight_bytes = 4 * shape.vocab_size * shape.student_size
    assert bytes_allocated(("student_hidden",)) < weight_bytes / 2
    assert bytes_allocated(("student_hidden", "student_weight")) >= weight_bytes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_g3_without_grad_mode_there_is_no_graph_and_the_same_value(mode):
    pair, inputs = logit_pair(3, seed=9), linear_inputs(seed=9)
    student = pair.student_N_V.requires_grad_()
    expected = token_divergence(student, pair.teacher_N_V)
    arguments = (inputs.student_hidden_N_D.requires_grad_(), *inputs[1:])
    expected_linear = linear_divergence(*arguments)
    with mode():
        output = token_divergence(student, pair.teacher_N_V)
        output_linear = linear_divergence(*arguments)
    assert not output.divergence_N.requires_grad and not output_linear.divergence_N.requires_grad
    assert torch.equal(output.divergence_N, expected.divergence_N.detach())
    torch.testing.assert_close(output_linear.divergence_N, expected_linear.divergence_N.detach(), rtol=1e-6, atol=1e-7)


def test_g3_only_the_divergence_is_differentiable():
    pair, inputs = logit_pair(3, seed=10), linear_inputs(seed=10)
    outputs = [
        token_divergence(pair.student_N_V.requires_grad_(), pair.teacher_N_V),
        linear_divergence(inputs.student_hidden_N_D.requires_grad_(), *inputs[1:]),
    ]
    for output in outputs:
        assert [field for field, value in output._asdict().items() if value.requires_grad] == ["divergence_N"]


def trl_generalized_jsd(student_logits, teacher_logits, beta):
    """TRL's convention as a formula, in probabilities: beta weighs the teacher; 0 and 1 are the two KLs."""
    p, q = student_logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    if beta == 0:
        return (q * (q / p).log()).sum(-1)
    if beta == 1:
        return (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_g5_generalized_jsd_follows_the_convention_of_trl(beta):
    pair, upstream = logit_pair(4, seed=11, gap=1.0), make_upstream(4, device=DEVICE)
    student = pair.student_N_V.double().requires_grad_()
    expected = trl_generalized_jsd(student, pair.teacher_N_V, beta)
    (gradient,) = torch.autograd.grad(expected, student, upstream.double())
    results = evaluate_token_divergence(pair, GeneralizedJSD(beta), upstream, impl=Impl.FUSED)
    torch.testing.assert_close(results["divergence"].double(), expected.detach(), rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(results["grad_student_logits"].double(), gradient, rtol=1e-4, atol=1e-6)


def value(pair, divergence):
    return token_divergence(*pair, divergence).divergence_N.double()


def test_g5_named_directions_and_ends():
    """forward_kl is KL(teacher || student); the ends of the families are exactly the KLs, without a silent clamp."""
    pair = logit_pair(4, seed=12, gap=1.5)
    p, q = (logits.double().softmax(-1) for logits in pair)
    forward, reverse = (q * (q / p).log()).sum(-1), (p * (p / q).log()).sum(-1)
    assert (forward - reverse).abs().min() > 1e-3
    for name in ("forward_kl", "jsd_0", "skew_forward_0", "alpha_1"):
        torch.testing.assert_close(value(pair, DIVERGENCES[name]), forward, rtol=3e-6, atol=1e-6)
    for name in ("reverse_kl", "jsd_1", "skew_reverse_0", "alpha_0"):
        torch.testing.assert_close(value(pair, DIVERGENCES[name]), reverse, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("small", [1e-3, 1e-5])
def test_g5_scaled_jsd_tends_to_the_kls_and_unscaled_jsd_to_zero(small):
    pair = logit_pair(4, seed=13, gap=1.0)
    forward, reverse = value(pair, ForwardKL()), value(pair, ReverseKL())
    close = {"rtol": 10 * small + 1e-3, "atol": 0}
    torch.testing.assert_close(value(pair, GeneralizedJSD(small)) / small, forward, **close)
    torch.testing.assert_close(value(pair, GeneralizedJSD(1 - small)) / small, reverse, **close)
    torch.testing.assert_close(value(pair, SkewForwardKL(small)), forward, rtol=30 * small, atol=1e-6)
    torch.testing.assert_close(value(pair, SkewReverseKL(small)), reverse, rtol=30 * small, atol=1e-6)
    assert (value(pair, GeneralizedJSD(small)) < 2 * small * forward).all()


@pytest.mark.parametrize("name", ["forward_kl", "skew_reverse_0.1", "alpha_0.5"])
def test_g6_linear_temperature_has_no_square(name):
    """logits / T on both sides: at T = 2 the value is that of heads with half the scale, and so is the gradient."""
    inputs, upstream = linear_inputs(seed=14), make_upstream(5, device=DEVICE)
    tempered = evaluate_linear_divergence(inputs, DIVERGENCES[name], upstream, impl=Impl.FUSED, loss_temperature=2.0)
    halved = inputs._replace(
        student_head=OutputHead(inputs.student_head.weight, logit_scale=0.5),
        teacher_head=OutputHead(inputs.teacher_head.weight, logit_scale=0.5),
    )
    expected = evaluate_linear_divergence(halved, DIVERGENCES[name], upstream, impl=Impl.FUSED)
    for field in expected:
        torch.testing.assert_close(tempered[field], expected[field], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_g7_the_teacher_gets_no_gradient_and_may_not_ask_for_one():
    pair, inputs = logit_pair(3, seed=15), linear_inputs(seed=15, has_bias=True)
    teacher = pair.teacher_N_V.requires_grad_()
    with pytest.raises(ValueError, match="token_divergence: teacher_logits_N_V must not require grad"):
        token_divergence(pair.student_N_V, teacher)
    weight, bias = inputs.teacher_head.weight, inputs.teacher_head.bias
    for changed, name in (
        ({"teacher_hidden_N_E": inputs.teacher_hidden_N_E.clone().requires_grad_()}, "teacher_hidden_N_E"),
        ({"teacher_head": OutputHead(weight.clone().requires_grad_(), bias)}, "teacher_head.weight"),
        ({"teacher_head": OutputHead(weight, bias.clone().requires_grad_())}, "teacher_head.bias"),
    ):
        with pytest.raises(ValueError, match=f"linear_divergence: {name} must not require grad"):
            linear_divergence(*inputs._replace(**changed))


def test_an_infinite_row_leaves_the_other_rows_gradients_alone():
    """Reverse KL is infinite in the row whose teacher excludes an id; its gradient is 0, that of the head the others'."""
    inputs, upstream = linear_inputs(seed=16), make_upstream(5, device=DEVICE)
    size = inputs.teacher_hidden_N_E.shape[1]
    # Column 0 of the teacher's hidden states is 0 but in row 2, where it makes the logit of id 7 -inf.
    hidden = torch.cat([inputs.teacher_hidden_N_E, torch.zeros(5, 1, device=DEVICE)], dim=1)
    hidden[2, size] = 1.0
    column = torch.zeros(SMALL.vocab_size, 1, device=DEVICE)
    column[7] = -torch.finfo(torch.float32).max
    teacher_weight = torch.cat([inputs.teacher_head.weight, column], dim=1)
    hidden[2, size] = 2.0
    changed = inputs._replace(teacher_hidden_N_E=hidden, teacher_head=OutputHead(teacher_weight))
    results = evaluate_linear_divergence(changed, ReverseKL(), upstream, impl=Impl.FUSED)
    assert results["divergence"].isposinf().tolist() == [False, False, True, False, False]
    assert (results["grad_student_hidden"][2] == 0).all()
    upstream[2] = 0.0
    expected = evaluate_linear_divergence(inputs, ReverseKL(), upstream, impl=Impl.FUSED)
    torch.testing.assert_close(results["grad_student_weight"], expected["grad_student_weight"], rtol=1e-5, atol=1e-6)


@every_workspace
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("trained", ["all", "hidden"])
def test_n8_a_nan_row_with_upstream_zero_does_not_poison_the_head(trained, side, workspace):
    """With weight 0 it adds exactly nothing, though 0 times NaN is NaN; any other weight shows the NaN in the head."""
    inputs, upstream = linear_inputs(seed=17), torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], device=DEVICE)
    names = ("student_hidden", "student_weight") if trained == "all" else ("student_hidden",)
    options = {"impl": Impl.FUSED, "trained": names, "workspace_bytes": WORKSPACES[workspace]}
    expected = evaluate_linear_divergence(inputs, ReverseKL(), upstream, **options)
    (inputs.student_hidden_N_D if side == "student" else inputs.teacher_hidden_N_E)[1, 3] = math.nan
    results = evaluate_linear_divergence(inputs, ReverseKL(), upstream, **options)
    assert results["divergence"].isnan().tolist() == [False, True, False, False, False]
    assert (results["grad_student_hidden"][1] == 0).all()
    for name in names:
        torch.testing.assert_close(results[f"grad_{name}"], expected[f"grad_{name}"], rtol=1e-6, atol=1e-7)
    upstream[1] = 0.25
    poisoned = evaluate_linear_divergence(inputs, ReverseKL(), upstream, **options)
    assert poisoned["grad_student_hidden"][1].isnan().any()
    assert poisoned["grad_student_hidden"][[0, 2, 3, 4]].isfinite().all()
    if trained == "all":
        assert poisoned["grad_student_weight"].isnan().any()
