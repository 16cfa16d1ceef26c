"""Do the fused ops run the same way every time: repeated, compiled, under autocast, on another thread?

python -m pytest tests/kernels/test_fused_execution.py
"""

import math
import re
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import esr_kernels
from esr_kernels import GeneralizedJSD, Impl, LogitStorage, OutputHead, ReverseKL, linear_divergence, token_divergence
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.inputs import LinearInputs, LogitPair, make_linear_inputs, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import converted, evaluate_linear_divergence, evaluate_token_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
SHAPE = Shape(rows=4, vocab_size=300, student_size=16, teacher_size=24)
WORKSPACES = {"keep": None, "recompute": 6000}
OPS = {
    "token_divergence_forward",
    "token_divergence_backward",
    "linear_divergence_forward",
    "linear_backward_of_kept",
    "linear_divergence_backward_by_recomputing",
}


def logit_pair(rows: int = 4, **options) -> LogitPair:
    return converted(make_logit_pair(rows, 300, **options), DEVICE)


def linear_inputs(rows: int = 4, **options) -> LinearInputs:
    shape = Shape(rows, SHAPE.vocab_size, SHAPE.student_size, SHAPE.teacher_size)
    return converted(make_linear_inputs(shape, **options), DEVICE)


def upstream_of(inputs: LogitPair | LinearInputs) -> torch.Tensor:
    return make_upstream(len(inputs[0]), device=DEVICE)


def assert_same(first: dict, second: dict) -> None:
    """Bit by bit, NaN included."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd_0.5"])
def test_x5_two_runs_of_token_divergence_agree_bit_by_bit(name, dtype):
    pair = logit_pair(seed=1, dtype=dtype)
    runs = [evaluate_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), impl=Impl.FUSED) for _ in range(2)]
    assert_same(*runs)


@pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_x5_two_runs_of_linear_divergence_agree_bit_by_bit(workspace, storage):
    inputs = linear_inputs(seed=2, dtype=torch.bfloat16, has_bias=True)
    options = {"impl": Impl.FUSED, "logits": storage, "workspace_bytes": WORKSPACES[workspace]}
    runs = [evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), **options) for _ in range(2)]
    assert_same(*runs)


def test_x5_no_kernel_uses_atomics():
    """A sum of floats by atomics depends on the order in which programs arrive."""
    kernels = list(Path(esr_kernels.__file__).parent.rglob("*_kernel.py"))
    assert len(kernels) >= 5
    for path in kernels:
        assert not re.search(r"\batomic_", path.read_text()), path


def test_x2_token_divergence_compiles_to_one_graph():
    """Forward and backward of one compiled function, for two batch sizes; Python floats stay float32 in the kernels."""

    def loss(student, teacher, ids, temperature):
        output = token_divergence(
            student, teacher, GeneralizedJSD(0.5), loss_temperature=temperature, token_ids_N=ids, stop_ids=(2, 7)
        )
        return output.divergence_N * 3.0 + output.student_logprob_N.nan_to_num(), output.top1_agreement_N

    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    for rows in (4, 6):
        pair = logit_pair(rows, seed=rows)
        upstream, ids = upstream_of(pair), torch.arange(rows, device=DEVICE)
        results = []
        for function in (loss, compiled):
            student = pair.student_N_V.detach().requires_grad_()
            value, agreement = function(student, pair.teacher_N_V, ids, 0.7)
            results.append((value, agreement, torch.autograd.grad(value, student, upstream)[0]))
        for eager, traced in zip(*results, strict=True):
            assert traced.dtype == torch.float32
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_x2_linear_divergence_compiles_to_one_graph(workspace):
    """The head and its projection in one graph with the layer below, which gets its gradient."""

    def loss(inputs_N_D, layer, weight, bias, teacher_hidden, teacher_weight):
        head = OutputHead(weight, bias, logit_scale=0.5, softcap=8.0)
        output = linear_divergence(
            inputs_N_D @ layer,
            head,
            teacher_hidden,
            teacher_weight,
            ReverseKL(),
            stop_ids=(2, 7),
            workspace_bytes=WORKSPACES[workspace],
        )
        return output.divergence_N, output.student_entropy_N

    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    layer = torch.eye(SHAPE.student_size, device=DEVICE) + 0.1
    for rows in (5, 7):
        inputs = linear_inputs(rows, seed=rows, has_bias=True)
        results = []
        for function in (loss, compiled):
            leaves = [layer, inputs.student_head.weight, inputs.student_head.bias]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            divergence_N, entropy_N = function(
                inputs.student_hidden_N_D, *leaves, inputs.teacher_hidden_N_E, inputs.teacher_head.weight
            )
            gradients = torch.autograd.grad(divergence_N, leaves, upstream_of(inputs))
            results.append((divergence_N, entropy_N, *gradients))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


class RecordedCalls(TorchDispatchMode):
    """Every call of an op of this library, with its arguments, detached as autograd passes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "esr_kernels":
            self.calls.append((function, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
        return function(*args, **(kwargs or {}))


def recorded_calls() -> list:
    pair = logit_pair(3, seed=3, dtype=torch.bfloat16)
    # Whole tiles and ids inside the vocabulary: opcheck takes the padding of kept d(logits), and NaN, for a difference.
    inputs = converted(make_linear_inputs(Shape(3, 384, 16, 24), seed=3, dtype=torch.bfloat16, has_bias=True), DEVICE)
    ids = torch.tensor([1, 2, 299], device=DEVICE)
    options = {"impl": Impl.FUSED, "stop_ids": (3, 9), "token_ids_N": ids}
    with RecordedCalls() as recorded:
        evaluate_token_divergence(pair, GeneralizedJSD(0.5), upstream_of(pair), **options)
        for workspace in WORKSPACES.values():
            for trained in (
                ("student_hidden",),
                ("student_weight", "student_bias"),
                ("student_hidden", "student_weight"),
            ):
                evaluate_linear_divergence(
                    inputs, ReverseKL(), upstream_of(inputs), trained=trained, workspace_bytes=workspace, **options
                )
        with torch.no_grad():
            linear_divergence(*inputs, logits=LogitStorage.TILE_RELATIVE_FP16, token_ids_N=ids)
    return recorded.calls


def test_x2_every_registered_op_passes_opcheck():
    """Schema (nothing is written to or aliased), fake against real results, tracing with symbolic sizes."""
    calls = recorded_calls()
    assert {function.name().removeprefix("esr_kernels::").split(".")[0] for function, _ in calls} == OPS
    for function, args in calls:
        torch.library.opcheck(function, args)


def test_x3_backward_on_another_thread():
    """As the autograd engine does for a CUDA device; and forward on a thread of its own."""
    pair, inputs = logit_pair(seed=4), linear_inputs(seed=4)

    def run():
        student, hidden = (
            pair.student_N_V.detach().requires_grad_(),
            inputs.student_hidden_N_D.detach().requires_grad_(),
        )
        first = token_divergence(student, pair.teacher_N_V, GeneralizedJSD(0.5)).divergence_N
        second = linear_divergence(hidden, *inputs[1:]).divergence_N
        return first, second, student, hidden

    def backward(first, second, student, hidden):
        gradients.append(torch.autograd.grad(first, student, upstream_of(pair))[0])
        gradients.append(torch.autograd.grad(second, hidden, upstream_of(inputs))[0])

    gradients = []
    backward(*run())
    threads = [
        threading.Thread(target=backward, args=run()),
        threading.Thread(target=lambda: backward(*run())),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(gradients) == 6
    for position in (2, 4):
        assert torch.equal(gradients[position], gradients[0]) and torch.equal(gradients[position + 1], gradients[1])


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_x4_autocast_changes_nothing(workspace, autocast_dtype):
    """An autocast region would project, and so store the logits, in 16 bits."""
    inputs, pair = linear_inputs(seed=5, has_bias=True), logit_pair(seed=5)
    options = {"impl": Impl.FUSED, "workspace_bytes": WORKSPACES[workspace]}
    expected = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
    expected_token = evaluate_token_divergence(pair, ReverseKL(), upstream_of(pair), impl=Impl.FUSED)
    with torch.autocast(DEVICE, dtype=autocast_dtype):
        actual = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
        actual_token = evaluate_token_divergence(pair, ReverseKL(), upstream_of(pair), impl=Impl.FUSED)
    assert_same(actual, expected)
    assert_same(actual_token, expected_token)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd_0.5"])
def test_stop_ids_may_come_in_any_order_and_number(name):
    """One id changes nothing; the same set in another order is the same event; all ids but one is a legal event."""
    pair = logit_pair(3, seed=6)

    def run(stop_ids):
        return evaluate_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), impl=Impl.FUSED, stop_ids=stop_ids)

    assert_same(run((7,)), run(()))
    assert_same(run((9, 2, 200, 2)), run([2, 9, 200]))
    many = run(range(1, 40))
    assert many["divergence"].isfinite().all() and many["grad_student_logits"].isfinite().all()
    assert (many["divergence"] <= run(())["divergence"] + 1e-6).all()


def test_results_do_not_depend_on_what_ran_before():
    """Another vocabulary, dtype and head in between: no buffer or table of a call outlives it."""
    inputs = linear_inputs(seed=7, dtype=torch.bfloat16)
    first = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), impl=Impl.FUSED, stop_ids=(1, 2))
    other = converted(make_linear_inputs(Shape(3, 517, 9, 11), seed=8, has_bias=True, softcap=3.0), DEVICE)
    evaluate_linear_divergence(other, GeneralizedJSD(0.1), upstream_of(other), impl=Impl.FUSED, stop_ids=(500, 3))
    again = evaluate_linear_divergence(inputs, ReverseKL(), upstream_of(inputs), impl=Impl.FUSED, stop_ids=(1, 2))
    assert_same(first, again)
    assert not math.isnan(first["divergence"].sum().item())
