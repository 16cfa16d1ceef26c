"""Linear ops as torch.library ops: forward, and backward from kept or from recomputed d(logits).

The arguments of every linear op begin with those of `COMMON_INPUTS`; what is the op's own follows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.output_projection.gradients import Needs, backward_of_kept
from esr_kernels.output_projection.linear_op import LinearOp
from esr_kernels.output_projection.plan import LinearPlan, Schedule
from esr_kernels.output_projection.schedules import LinearForward, backward_by_recomputing, run_forward

BACKWARD_OF_KEPT = "esr_kernels::linear_backward_of_kept"
COMMON_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float? softcap, SymInt vocab_size, "
    "str schedule, str storage, SymInt chunk_rows"
)


class CommonInputs(NamedTuple):
    hidden_N_D: Tensor
    weight_V_D: Tensor
    bias_V: Tensor | None
    logit_scale: float
    softcap: float | None
    vocab_size: int
    schedule: str
    storage: str
    chunk_rows: int

    @classmethod
    def of(cls, hidden_N_D: Tensor, head: OutputHead, vocab_size: int, plan: LinearPlan) -> "CommonInputs":
        schedule, storage = plan.schedule.value, plan.storage.value
        head_inputs = head.weight, head.bias, head.logit_scale, head.softcap
        return cls(hidden_N_D, *head_inputs, vocab_size, schedule, storage, plan.chunk_rows)

    def head(self) -> OutputHead:
        return OutputHead(self.weight_V_D, self.bias_V, self.logit_scale, self.softcap)

    def plan(self) -> LinearPlan:
        return LinearPlan(Schedule(self.schedule), LogitStorage(self.storage), self.chunk_rows)


NUM_COMMON = len(CommonInputs._fields)


def define_linear_op(name: str, own_inputs: str, num_outputs: int, op_of: Callable[..., LinearOp]) -> None:
    """Register `esr_kernels::{name}_forward` and `esr_kernels::{name}_backward_by_recomputing`.

    Args:
        own_inputs: schema of the arguments after the common ones.
        num_outputs: tensors of `LinearOp.allocate_outputs`; forward returns them, then the other fields of `LinearForward`.
            The backward returns the gradients of hidden states, weight and bias, empty where not needed.
        op_of: (hidden states, head, vocabulary size, *own arguments) to the op.
    """
    forward, backward = f"esr_kernels::{name}_forward", f"esr_kernels::{name}_backward_by_recomputing"
    inputs = f"{COMMON_INPUTS}, {own_inputs}"
    torch.library.define(forward, f"({inputs}) -> ({', '.join(['Tensor'] * (num_outputs + 3))})")
    torch.library.define(
        backward, f"(Tensor upstream, Tensor gradient_unit, bool[] needs, {inputs}) -> (Tensor, Tensor, Tensor)"
    )

    def op_and_plan(arguments: tuple) -> tuple[LinearOp, LinearPlan]:
        common = CommonInputs(*arguments[:NUM_COMMON])
        return op_of(common.hidden_N_D, common.head(), common.vocab_size, *arguments[NUM_COMMON:]), common.plan()

    @torch.library.impl(forward, ("CPU", "CUDA"))
    def _forward(*arguments) -> tuple[Tensor, ...]:
        # An enclosing autocast region would cast the operands, and so store the logits in 16 bits.
        with torch.autocast(arguments[0].device.type, enabled=False):
            outputs, *left = run_forward(*op_and_plan(arguments))
        return *outputs, *left

    @torch.library.register_fake(forward)
    def _fake_forward(*arguments) -> tuple[Tensor, ...]:
        op, plan = op_and_plan(arguments)
        outputs, *left = LinearForward.allocate(op, plan.schedule)
        return *outputs, *left

    @torch.library.impl(backward, ("CPU", "CUDA"))
    def _backward(upstream, unit, needs, *arguments) -> tuple[Tensor, ...]:
        with torch.autocast(upstream.device.type, enabled=False):
            gradients = backward_by_recomputing(upstream, unit, *op_and_plan(arguments), Needs(*needs))
        return empty_for_none(upstream, gradients)

    @torch.library.register_fake(backward)
    def _fake_backward(upstream, unit, needs, *arguments) -> tuple[Tensor, ...]:
        return fake_gradients(upstream, arguments[:3], needs)


torch.library.define(
    BACKWARD_OF_KEPT,
    "(Tensor upstream, Tensor gradient_logits, Tensor gradient_unit, Tensor hidden, Tensor weight, Tensor? bias, "
    "SymInt vocab_size, bool[] needs) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl(BACKWARD_OF_KEPT, ("CPU", "CUDA"))
def _backward_of_kept(upstream, logits, unit, hidden, weight, bias, vocab_size, needs) -> tuple[Tensor, ...]:
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = backward_of_kept(upstream, logits, unit, hidden, weight, bias, vocab_size, Needs(*needs))
    return empty_for_none(upstream, gradients)


@torch.library.register_fake(BACKWARD_OF_KEPT)
def _fake_backward_of_kept(upstream, logits, unit, hidden, weight, bias, vocab_size, needs) -> tuple[Tensor, ...]:
    return fake_gradients(upstream, (hidden, weight, bias), needs)


def empty_for_none(like: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_gradients(upstream: Tensor, parameters: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    gradients = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format) if is_needed else None
        for parameter, is_needed in zip(parameters, needs, strict=True)
    )
    return empty_for_none(upstream, tuple(gradients))
