"""Do the fused ops take any strides, second derivatives, names, inference tensors and numbers as the references do?

python -m pytest tests/kernels/test_fused_regressions.py
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from esr_kernels import (
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Impl,
    LogitStorage,
    OutputHead,
    linear_divergence,
    token_divergence,
)
from esr_kernels import ReverseKL as LibraryReverseKL
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import LinearInputs, LogitPair, make_linear_inputs, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import Results, converted, evaluate_linear_divergence, evaluate_token_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
SHAPE = Shape(rows=5, vocab_size=300, student_size=16, teacher_size=24)
ALL = ("student_hidden", "student_weight", "student_bias")
# What each schedule of linear_divergence needs to be chosen for SHAPE.
SCHEDULES = {
    "hidden": {"trained": ("student_hidden",)},
    "keep": {"trained": ALL},
    "recompute": {"trained": ALL, "workspace_bytes": 6200},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def logit_pair(seed: int, **options) -> LogitPair:
    return converted(make_logit_pair(SHAPE.rows, SHAPE.vocab_size, seed=seed, **options), DEVICE)


def linear_inputs(seed: int, **options) -> LinearInputs:
    return converted(make_linear_inputs(SHAPE, seed=seed, has_bias=True, **options), DEVICE)


def upstream() -> Tensor:
    return make_upstream(SHAPE.rows, device=DEVICE)


def assert_same(actual: Results, expected: Results) -> None:
    """Bit by bit, NaN included."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


def as_column(x: Tensor) -> Tensor:
    """The same values, every third element of a longer vector whose other elements are something else."""
    return torch.stack([x, x.flip(0), x.roll(1)], dim=1)[:, 0]


IDS = {
    "column": lambda: as_column(torch.tensor([3, 299, -100, 7, 150], device=DEVICE)),
    "int32 column": lambda: as_column(torch.tensor([3, 299, -100, 7, 150], device=DEVICE, dtype=torch.int32)),
    "expanded": lambda: torch.tensor(42, device=DEVICE).expand(SHAPE.rows),
}


@pytest.mark.parametrize("layout", IDS)
def test_token_ids_of_any_strides(layout):
    pair, inputs, ids = logit_pair(1), linear_inputs(1), IDS[layout]()
    assert not ids.is_contiguous()
    for evaluate, arguments in ((evaluate_token_divergence, pair), (evaluate_linear_divergence, inputs)):
        results, expected = (
            evaluate(arguments, ForwardKL(), upstream(), impl=Impl.FUSED, token_ids_N=x, stop_ids=(2, 7))
            for x in (ids, ids.contiguous())
        )
        assert expected["student_logprob"].isfinite().any()
        assert_same(results, expected)


@every_storage
@every_schedule
@pytest.mark.parametrize("layout", ["column", "expanded"])
@pytest.mark.parametrize("side", ["student_head", "teacher_head"])
def test_biases_of_any_strides(side, layout, schedule, storage):
    inputs = linear_inputs(2)
    head = getattr(inputs, side)
    bias = as_column(head.bias) if layout == "column" else head.bias[:1].expand(SHAPE.vocab_size)
    assert not bias.is_contiguous()
    options = {"impl": Impl.FUSED, "logits": storage, **SCHEDULES[schedule]}
    results, expected = (
        evaluate_linear_divergence(
            inputs._replace(**{side: replace(head, bias=x)}), LibraryReverseKL(), upstream(), **options
        )
        for x in (bias, bias.contiguous())
    )
    assert_same(results, expected)


def assert_has_no_second_derivative(divergence_N: Tensor, leaf: Tensor, loss: str, way: str) -> None:
    """The kernels have none: asking for one is an error, never a number that leaves half of it out."""
    value = (divergence_N if loss == "sum" else divergence_N.square()).sum()
    with pytest.raises(RuntimeError, match=r"FUSED has no second derivative.*create_graph=True"):
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        penalised = value + gradient.square().sum()
        penalised.backward() if way == "backward" else torch.autograd.grad(penalised, leaf)


every_loss = pytest.mark.parametrize("loss", ["square", "sum"])  # with an upstream that needs a gradient, and without
every_way = pytest.mark.parametrize("way", ["backward", "grad"])


@every_way
@every_loss
@pytest.mark.parametrize("divergence", [LibraryReverseKL(), GeneralizedJSD(0.5)], ids=repr)
def test_second_derivative_of_logits(divergence, loss, way):
    student, teacher = logit_pair(3)
    student.requires_grad_()
    assert_has_no_second_derivative(token_divergence(student, teacher, divergence).divergence_N, student, loss, way)


@every_way
@every_loss
@every_schedule
def test_second_derivative_of_hidden_states_and_head(schedule, loss, way):
    inputs, options = linear_inputs(4, dtype=torch.bfloat16), dict(SCHEDULES[schedule])
    head, trained = inputs.student_head, options.pop("trained")
    leaves = dict(zip(ALL, (inputs.student_hidden_N_D, head.weight, head.bias), strict=True))
    for name in trained:
        leaves[name].requires_grad_()
    for name in trained:
        divergence_N = linear_divergence(*inputs, **options).divergence_N
        assert_has_no_second_derivative(divergence_N, leaves[name], loss, way)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """A user's own, by the name of one of the library's: squared distance of the probabilities."""

    def terms(self, student_logprobs, teacher_logprobs):
        return (student_logprobs.exp() - teacher_logprobs.exp()).square()


# The same terms in a class derived from the library's of that name.
Derived = type("ReverseKL", (LibraryReverseKL,), {"terms": ReverseKL.terms})


@pytest.mark.parametrize("own", [ReverseKL(), Derived()], ids=["own", "derived"])
def test_a_kernel_belongs_to_a_class_and_not_to_its_name(own):
    pair, inputs = logit_pair(5), linear_inputs(5)
    expected = (pair.student_N_V.softmax(-1) - pair.teacher_N_V.softmax(-1)).square().sum(-1)
    values = token_divergence(*pair, own, impl=Impl.REFERENCE).divergence_N
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(NotImplementedError, match=r"token_divergence: .*ReverseKL has no kernel"):
        token_divergence(*pair, own)
    with pytest.raises(NotImplementedError, match=r"linear_divergence: .*ReverseKL has no kernel"):
        linear_divergence(*inputs, own)


def in_inference_mode(x: Tensor) -> Tensor:
    """As a teacher's forward or a rollout under torch.inference_mode gives it; autograd may not save it."""
    with torch.inference_mode():
        return x.clone()


def test_logits_and_ids_made_in_inference_mode():
    pair, ids = logit_pair(6), torch.arange(SHAPE.rows, device=DEVICE)
    options = {"impl": Impl.FUSED, "stop_ids": (2, 7)}
    expected = evaluate_token_divergence(pair, GeneralizedJSD(0.5), upstream(), token_ids_N=ids, **options)
    pair, ids = pair._replace(teacher_N_V=in_inference_mode(pair.teacher_N_V)), in_inference_mode(ids)
    results = evaluate_token_divergence(pair, GeneralizedJSD(0.5), upstream(), token_ids_N=ids, **options)
    assert_same(results, expected)


@pytest.mark.parametrize("schedule", ["value", *SCHEDULES])
@pytest.mark.parametrize("what", ["hidden states", "everything"])
def test_teacher_made_in_inference_mode(what, schedule):
    inputs, ids = linear_inputs(7), torch.arange(SHAPE.rows, device=DEVICE)
    options = {"impl": Impl.FUSED, **SCHEDULES.get(schedule, {"trained": ()})}
    expected = evaluate_linear_divergence(inputs, ForwardKL(), upstream(), token_ids_N=ids, **options)
    inputs = inputs._replace(teacher_hidden_N_E=in_inference_mode(inputs.teacher_hidden_N_E))
    if what == "everything":
        head = OutputHead(*map(in_inference_mode, (inputs.teacher_head.weight, inputs.teacher_head.bias)))
        inputs, ids = inputs._replace(teacher_head=head), in_inference_mode(ids)
    results = evaluate_linear_divergence(inputs, ForwardKL(), upstream(), token_ids_N=ids, **options)
    assert_same(results, expected)


def assert_compiled_is_eager(function, calls: list[tuple]) -> None:
    """Value and gradient of the first argument, in one graph, for calls that differ in their Python numbers.

    A second value of a number makes it a symbol for torch.compile.
    """
    compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
    for first, *others in calls:
        results = []
        for f in (function, compiled):
            leaf = first.detach().requires_grad_()
            value = f(leaf, *others)
            results.append((value, *torch.autograd.grad(value, leaf, upstream())))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def test_compiled_token_divergence_of_several_temperatures():
    def loss(student, teacher, temperature):
        return token_divergence(student, teacher, loss_temperature=temperature).divergence_N

    assert_compiled_is_eager(loss, [(*logit_pair(8), temperature) for temperature in (1.0, 0.9, 1.7)])


def test_compiled_linear_divergence_of_several_scales_and_temperatures():
    def loss(hidden, head, teacher_hidden, teacher_head, scale, temperature):
        heads = (OutputHead(h.weight, h.bias, logit_scale=scale) for h in (head, teacher_head))
        student_head, teacher_head = heads
        return linear_divergence(
            hidden, student_head, teacher_hidden, teacher_head, loss_temperature=temperature
        ).divergence_N

    numbers = ((1.0, 1.0), (0.5, 1.0), (0.25, 0.8), (2.0, 1.3))
    assert_compiled_is_eager(loss, [(*linear_inputs(9), scale, temperature) for scale, temperature in numbers])
