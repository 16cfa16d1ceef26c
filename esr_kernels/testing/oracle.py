"""The float64 oracle: the op's reference on the same low-precision inputs promoted to float64, values and gradients.

Inputs are made in the dtype under test and then promoted, so that a difference to the oracle is arithmetic and not the
rounding of the inputs. `evaluate_*` runs one implementation and names its results; `*_oracle` does the same in float64
and says beside each result how far float32 arithmetic may be from it.

Those bounds are 4 eps (eps = 2^-23, so 4.8e-7) times the size of what is summed, not of the sum, because a divergence
and its gradient are small differences: at a divergence of 5e-4 nats float32 has no six digits left in either.

    divergence, entropies   1 + H(p) + H(q) + |D|      each term p log p carries an error of eps p (1 + |log p|)
    log-probabilities       1 + |log p|
    top-1 agreement         0: it must be equal
    gradient of logits      G + the gradient itself, with G = |upstream| (p + q) / T
    of hidden, weight, bias G |W|, G^T |X| and the column sums of G
    of a 16-bit head        these and 2e-3 of the gradient, for d(logits) kept in 16 bits between two matrix products

Logits stored as TILE_RELATIVE_FP16 have 11 bits of their distance to a tile's maximum. A log-probability then takes
2^-11 of its size in place of 4 eps, and the other values 2^-14: the errors of many columns average.
"""

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.impl import Impl
from esr_kernels.linear_divergence import linear_divergence
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.testing.inputs import LinearInputs, LogitPair
from esr_kernels.token_divergence import token_divergence

Inputs = TypeVar("Inputs", bound=tuple)  # a named tuple of tensors and output heads

# Results by name: the fields of DivergenceOutput, then the gradients ("grad_" and the name of the student's tensor).
Results = dict[str, Tensor]

FLOAT32_BOUND = 4 * torch.finfo(torch.float32).eps
TILE_RELATIVE_BOUND = 2.0**-14
TILE_RELATIVE_LOGPROB_BOUND = 2.0**-11
GRADIENT_BOUND_16_BIT = 2e-3


class Oracle(NamedTuple):
    values: Results  # float64
    bounds: Results  # what float32 arithmetic may add to PyTorch's own error, one per element


def evaluate_token_divergence(
    inputs: LogitPair, divergence: Divergence, upstream_N: Tensor, *, impl: Impl, **options
) -> Results:
    """Output and `grad_student_logits` of one call; strides of the inputs are kept."""
    student = inputs.student_N_V.detach().requires_grad_()
    output = token_divergence(student, inputs.teacher_N_V, divergence, impl=impl, **options)
    return _results(output, {"student_logits": student}, upstream_N)


def evaluate_linear_divergence(
    inputs: LinearInputs,
    divergence: Divergence,
    upstream_N: Tensor,
    *,
    impl: Impl,
    trained: tuple[str, ...] = ("student_hidden", "student_weight", "student_bias"),
    **options,
) -> Results:
    """Output and the gradients of those tensors named in `trained` that exist; the others are frozen."""
    head = inputs.student_head
    tensors = {"student_hidden": inputs.student_hidden_N_D, "student_weight": head.weight, "student_bias": head.bias}
    tensors = {name: None if t is None else t.detach().requires_grad_(name in trained) for name, t in tensors.items()}
    student_head = replace(head, weight=tensors["student_weight"], bias=tensors["student_bias"])
    output = linear_divergence(
        tensors["student_hidden"],
        student_head,
        inputs.teacher_hidden_N_E,
        inputs.teacher_head,
        divergence,
        impl=impl,
        **options,
    )
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    return _results(output, leaves, upstream_N)


def token_divergence_oracle(
    inputs: LogitPair, divergence: Divergence, upstream_N: Tensor, *, vocab_size: int | None = None, **options
) -> Oracle:
    """`evaluate_token_divergence` by the reference in float64, with its bounds."""
    exact = converted(inputs, torch.float64)
    values = evaluate_token_divergence(
        exact, divergence, upstream_N, impl=Impl.REFERENCE, vocab_size=vocab_size, **options
    )
    size_N_V = _size_of_logit_gradient(exact, upstream_N, vocab_size, options.get("loss_temperature", 1.0))
    gradient = values["grad_student_logits"]
    size_N_V = gradient.abs() + torch.nn.functional.pad(size_N_V, (0, gradient.shape[-1] - size_N_V.shape[-1]))
    return Oracle(values, {**_bounds_of_output(values), "grad_student_logits": FLOAT32_BOUND * size_N_V})


def linear_divergence_oracle(
    inputs: LinearInputs, divergence: Divergence, upstream_N: Tensor, *, vocab_size: int | None = None, **options
) -> Oracle:
    """`evaluate_linear_divergence` by the reference in float64, with its bounds."""
    exact = converted(inputs, torch.float64)
    values = evaluate_linear_divergence(
        exact, divergence, upstream_N, impl=Impl.REFERENCE, vocab_size=vocab_size, **options
    )
    head = exact.student_head
    logits = LogitPair(head.logits(exact.student_hidden_N_D), exact.teacher_head.logits(exact.teacher_hidden_N_E))
    size_N_V = _size_of_logit_gradient(logits, upstream_N, vocab_size, options.get("loss_temperature", 1.0))
    size_N_V = head.logit_scale * torch.nn.functional.pad(size_N_V, (0, head.vocab_size - size_N_V.shape[-1]))
    sizes = {
        "grad_student_hidden": size_N_V @ head.weight.abs(),
        "grad_student_weight": size_N_V.T @ exact.student_hidden_N_D.abs(),
        "grad_student_bias": size_N_V.sum(dim=0),
    }
    is_16_bit = inputs.student_head.weight.dtype.itemsize == 2
    is_tile_relative = options.get("logits") == LogitStorage.TILE_RELATIVE_FP16
    bounds = _bounds_of_output(values, is_tile_relative)
    for name in sizes.keys() & values.keys():
        bounds[name] = FLOAT32_BOUND * sizes[name] + is_16_bit * GRADIENT_BOUND_16_BIT * values[name].abs()
    return Oracle(values, bounds)


def _size_of_logit_gradient(
    exact: LogitPair, upstream_N: Tensor, vocab_size: int | None, loss_temperature: float
) -> Tensor:
    """|upstream| (p + q) / T, 0 in rows without a distribution."""
    p, q = (torch.softmax(logits[:, :vocab_size] / loss_temperature, dim=-1).nan_to_num(0.0) for logits in exact)
    return upstream_N.double().abs()[:, None] * (p + q) / loss_temperature


def _bounds_of_output(values: Results, is_tile_relative: bool = False) -> Results:
    bound = TILE_RELATIVE_BOUND if is_tile_relative else FLOAT32_BOUND
    logprob_bound = TILE_RELATIVE_LOGPROB_BOUND if is_tile_relative else FLOAT32_BOUND
    size = 1 + values["student_entropy"].abs() + values["teacher_entropy"].abs() + values["divergence"].abs()
    bounds = {name: bound * size for name in ("divergence", "student_entropy", "teacher_entropy")}
    bounds |= {name: logprob_bound * (1 + values[name].abs()) for name in ("student_logprob", "teacher_logprob")}
    # Where a value is not finite it must be met exactly.
    bounds = {name: tensor.nan_to_num(0.0, posinf=0.0) for name, tensor in bounds.items()}
    return bounds | {"top1_agreement": torch.zeros_like(values["top1_agreement"])}


def converted(inputs: Inputs, target: torch.dtype | str) -> Inputs:
    """The same inputs in another float dtype (integer tensors stay as they are), or on another device."""

    def convert(field: Tensor | OutputHead | int) -> Tensor | OutputHead | int:
        if isinstance(field, OutputHead):
            bias = None if field.bias is None else field.bias.to(target)
            return replace(field, weight=field.weight.to(target), bias=bias)
        if not isinstance(field, Tensor) or (isinstance(target, torch.dtype) and not field.is_floating_point()):
            return field
        return field.to(target)

    return type(inputs)(*map(convert, inputs))


def _results(output: DivergenceOutput, leaves: dict[str, Tensor], upstream_N: Tensor) -> Results:
    results = {name.removesuffix("_N"): field.detach() for name, field in output._asdict().items()}
    if leaves:
        upstream_N = upstream_N.to(output.divergence_N.dtype)
        gradients = torch.autograd.grad(output.divergence_N, list(leaves.values()), upstream_N)
        results.update({f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)})
    return results
