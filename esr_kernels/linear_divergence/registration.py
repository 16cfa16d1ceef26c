"""`linear_divergence` as torch.library ops: forward, and backward from kept or from recomputed d(logits)."""

import torch
from torch import Tensor

from esr_kernels.linear_divergence.backward import Needs, backward_of_kept
from esr_kernels.linear_divergence.forward import LinearForward, LinearInputs, run_forward
from esr_kernels.linear_divergence.plan import LinearPlan, Schedule
from esr_kernels.linear_divergence.recompute import backward_by_recomputing
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead

FORWARD = "esr_kernels::linear_divergence_forward"
BACKWARD_OF_KEPT = "esr_kernels::linear_divergence_backward_of_kept"
BACKWARD_BY_RECOMPUTING = "esr_kernels::linear_divergence_backward_by_recomputing"

_HEAD = "Tensor {0}_hidden, Tensor {0}_weight, Tensor? {0}_bias, float {0}_scale, float? {0}_softcap"
_INPUTS = (
    f"{_HEAD.format('student')}, {_HEAD.format('teacher')}, str divergence, float parameter, float loss_temperature, "
    "Tensor? token_ids, int[] stop_ids, SymInt vocab_size, str schedule, str storage, SymInt chunk_rows"
)
# Results of forward: the six fields of DivergenceOutput, then those of LinearForward. Of the backwards: the gradients of
# hidden states, weight and bias, empty where not needed.
torch.library.define(FORWARD, f"({_INPUTS}) -> ({', '.join(['Tensor'] * 9)})")
torch.library.define(
    BACKWARD_OF_KEPT,
    "(Tensor upstream, Tensor gradient_logits, Tensor gradient_unit, Tensor hidden, Tensor weight, Tensor? bias, "
    "SymInt vocab_size, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    BACKWARD_BY_RECOMPUTING,
    f"(Tensor upstream, Tensor gradient_unit, bool[] needs, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)


def _inputs_and_plan(*arguments) -> tuple[LinearInputs, LinearPlan]:
    student_hidden, *student_head = arguments[:5]
    teacher_hidden, *teacher_head = arguments[5:10]
    name, parameter, loss_temperature, token_ids, stop_ids, vocab_size, schedule, storage, chunk_rows = arguments[10:]
    inputs = LinearInputs(
        student_hidden,
        OutputHead(*student_head),
        teacher_hidden,
        OutputHead(*teacher_head),
        (name, parameter),
        loss_temperature,
        token_ids,
        tuple(stop_ids),
        vocab_size,
    )
    return inputs, LinearPlan(Schedule(schedule), LogitStorage(storage), chunk_rows)


def _empty_for_none(like: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.impl(FORWARD, ("CPU", "CUDA"))
def _forward(*arguments) -> tuple[Tensor, ...]:
    # An enclosing autocast region would cast the operands, and so store the logits in 16 bits.
    with torch.autocast(arguments[0].device.type, enabled=False):
        outputs, *rest = run_forward(*_inputs_and_plan(*arguments))
    return *outputs, *rest


@torch.library.register_fake(FORWARD)
def _fake_forward(*arguments) -> tuple[Tensor, ...]:
    inputs, plan = _inputs_and_plan(*arguments)
    outputs, *rest = LinearForward.allocate(inputs, plan.schedule)
    return *outputs, *rest


@torch.library.impl(BACKWARD_OF_KEPT, ("CPU", "CUDA"))
def _backward_of_kept(upstream, logits, unit, hidden, weight, bias, vocab_size, needs) -> tuple[Tensor, ...]:
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = backward_of_kept(upstream, logits, unit, hidden, weight, bias, vocab_size, Needs(*needs))
    return _empty_for_none(upstream, gradients)


@torch.library.register_fake(BACKWARD_OF_KEPT)
def _fake_backward_of_kept(upstream, logits, unit, hidden, weight, bias, vocab_size, needs) -> tuple[Tensor, ...]:
    return _fake_gradients(upstream, (hidden, weight, bias), needs)


@torch.library.impl(BACKWARD_BY_RECOMPUTING, ("CPU", "CUDA"))
def _backward_by_recomputing(upstream, unit, needs, *arguments) -> tuple[Tensor, ...]:
    with torch.autocast(upstream.device.type, enabled=False):
        gradients = backward_by_recomputing(upstream, unit, *_inputs_and_plan(*arguments), Needs(*needs))
    return _empty_for_none(upstream, gradients)


@torch.library.register_fake(BACKWARD_BY_RECOMPUTING)
def _fake_backward_by_recomputing(upstream, unit, needs, *arguments) -> tuple[Tensor, ...]:
    return _fake_gradients(upstream, arguments[:3], needs)


def _fake_gradients(upstream: Tensor, parameters: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    gradients = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format) if is_needed else None
        for parameter, is_needed in zip(parameters, needs, strict=True)
    )
    return _empty_for_none(upstream, tuple(gradients))
