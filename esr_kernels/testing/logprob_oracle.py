"""The float64 oracle of the log-prob ops and of the top-k divergence, with the bounds of `esr_kernels.testing.oracle`.

    log-probabilities       4 eps (1 + |log p|)
    entropies               4 eps (1 + H), and for the top-k divergence its sizes
    mask, top-1             0: they must be equal
    gradient of logits      G + the gradient itself; G = |upstream| (1[id] + p) / T, for the top-k divergence
                            |upstream| (p + q) / T with q of the ids, and of the tail in proportion to p
    of hidden, weight, bias, and of a 16-bit head     as there

With TILE_RELATIVE_FP16 the logit of an id is exact all the same, and the error of the log-sum-exp averages over the row: values
take 2^-14 of their size in place of 4 eps.
"""

from dataclasses import replace

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.gather_logprobs import gather_logprobs
from esr_kernels.impl import Impl
from esr_kernels.linear_prefix_logprobs import linear_prefix_logprobs
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.prefix_logprobs import PrefixLogprobs, prefix_logprobs
from esr_kernels.testing.logprob_inputs import GatherInputs, PrefixInputs, TopkInputs
from esr_kernels.testing.oracle import (
    FLOAT32_BOUND,
    GRADIENT_BOUND_16_BIT,
    TILE_RELATIVE_BOUND,
    Oracle,
    Results,
    converted,
)
from esr_kernels.topk_divergence import topk_divergence

ALL = ("hidden", "weight", "bias")


def evaluate_prefix_logprobs(
    logits_B_T_V: Tensor, inputs: PrefixInputs, upstream_B_K: Tensor, *, impl: Impl, **options
) -> Results:
    """Results and `grad_logits` of one call; strides of the logits are kept."""
    logits = logits_B_T_V.detach().requires_grad_()
    output = prefix_logprobs(logits, *inputs[2:4], inputs.horizon, lengths_B=inputs.lengths_B, impl=impl, **options)
    return _prefix_results(output, {"logits": logits}, upstream_B_K)


def evaluate_linear_prefix_logprobs(
    inputs: PrefixInputs, upstream_B_K: Tensor, *, impl: Impl, trained: tuple[str, ...] = ALL, **options
) -> Results:
    """Results and the gradients of those tensors named in `trained` that exist; the others are frozen."""
    hidden, head, leaves = _with_leaves(inputs.hidden_B_T_D, inputs.head, trained)
    output = linear_prefix_logprobs(
        hidden, head, *inputs[2:4], inputs.horizon, lengths_B=inputs.lengths_B, impl=impl, **options
    )
    return _prefix_results(output, leaves, upstream_B_K)


def evaluate_gather_logprobs(
    inputs: GatherInputs, upstream_N_K: Tensor, *, impl: Impl, trained: tuple[str, ...] = ALL, **options
) -> Results:
    """`logprobs` and the gradients of those tensors named in `trained` that exist."""
    hidden, head, leaves = _with_leaves(inputs.hidden_N_D, inputs.head, trained)
    logprobs = gather_logprobs(hidden, head, inputs.token_ids_N_K, impl=impl, **options)
    return {"logprobs": logprobs.detach(), **_gradients(logprobs, leaves, upstream_N_K)}


def evaluate_topk_divergence(
    inputs: TopkInputs,
    divergence: Divergence,
    upstream_N: Tensor,
    *,
    impl: Impl,
    trained: tuple[str, ...] = ALL,
    **options,
) -> Results:
    """Output but for the log-probs, which are NaN, and the gradients of those tensors named in `trained` that exist."""
    hidden, head, leaves = _with_leaves(inputs.student_hidden_N_D, inputs.student_head, trained)
    teacher = inputs.teacher_ids_N_K, inputs.teacher_logprobs_N_K
    output = topk_divergence(hidden, head, *teacher, divergence, impl=impl, **options)
    names = ("divergence_N", "student_entropy_N", "teacher_entropy_N", "top1_agreement_N")
    results = {name.removesuffix("_N"): getattr(output, name).detach() for name in names}
    return results | _gradients(output.divergence_N, leaves, upstream_N)


def prefix_logprobs_oracle(logits_B_T_V: Tensor, inputs: PrefixInputs, upstream_B_K: Tensor, **options) -> Oracle:
    """`evaluate_prefix_logprobs` by the reference in float64, with its bounds."""
    exact = logits_B_T_V.double()
    values = evaluate_prefix_logprobs(exact, inputs, upstream_B_K, impl=Impl.REFERENCE, **options)
    size_B_T_V = _slot_gradient_size(exact, inputs, upstream_B_K, options.get("temperature", 1.0))
    gradient = {"grad_logits": FLOAT32_BOUND * (size_B_T_V + values["grad_logits"].abs())}
    return Oracle(values, _prefix_bounds(values, FLOAT32_BOUND) | gradient)


def linear_prefix_logprobs_oracle(inputs: PrefixInputs, upstream_B_K: Tensor, **options) -> Oracle:
    """`evaluate_linear_prefix_logprobs` by the reference in float64, with its bounds."""
    exact = converted(inputs, torch.float64)
    values = evaluate_linear_prefix_logprobs(exact, upstream_B_K, impl=Impl.REFERENCE, **options)
    logits = exact.head.logits(exact.hidden_B_T_D)
    size_B_T_V = _slot_gradient_size(logits, inputs, upstream_B_K, options.get("temperature", 1.0))
    bounds = _prefix_bounds(values, _value_bound(options))
    sizes = _gradient_sizes(exact.head, exact.hidden_B_T_D, size_B_T_V)
    return Oracle(values, bounds | _gradient_bounds(values, sizes, inputs.head))


def gather_logprobs_oracle(inputs: GatherInputs, upstream_N_K: Tensor, **options) -> Oracle:
    """`evaluate_gather_logprobs` by the reference in float64, with its bounds."""
    exact = converted(inputs, torch.float64)
    values = evaluate_gather_logprobs(exact, upstream_N_K, impl=Impl.REFERENCE, **options)
    temperature = options.get("temperature", 1.0)
    p_N_V = _probabilities(exact.head.logits(exact.hidden_N_D), temperature)
    is_id_N_K = inputs.token_ids_N_K >= 0
    upstream_N_K = upstream_N_K.double().abs().masked_fill(~is_id_N_K, 0.0)
    size_N_V = p_N_V * upstream_N_K.sum(-1, keepdim=True)
    size_N_V = size_N_V.scatter_add(-1, inputs.token_ids_N_K.clamp(min=0), upstream_N_K) / temperature
    bounds = {"logprobs": _value_bound(options) * (1 + _finite(values["logprobs"]).abs())}
    sizes = _gradient_sizes(exact.head, exact.hidden_N_D, size_N_V)
    return Oracle(values, bounds | _gradient_bounds(values, sizes, inputs.head))


def topk_divergence_oracle(inputs: TopkInputs, divergence: Divergence, upstream_N: Tensor, **options) -> Oracle:
    """`evaluate_topk_divergence` by the reference in float64, with its bounds."""
    exact = converted(inputs, torch.float64)
    values = evaluate_topk_divergence(exact, divergence, upstream_N, impl=Impl.REFERENCE, **options)
    temperature = options.get("loss_temperature", 1.0)
    p_N_V = _probabilities(exact.student_head.logits(exact.student_hidden_N_D), temperature)
    # The teacher's mass at its ids, and what is left in proportion to p
    is_id_N_K = (inputs.teacher_ids_N_K >= 0) & (inputs.teacher_ids_N_K < p_N_V.shape[-1])
    q_N_K = _finite(exact.teacher_logprobs_N_K.exp()).masked_fill(~is_id_N_K, 0.0)
    q_N_V = torch.zeros_like(p_N_V).scatter_add(-1, inputs.teacher_ids_N_K.long().masked_fill(~is_id_N_K, 0), q_N_K)
    size_N_V = upstream_N.double().abs()[:, None] * (2 * p_N_V + q_N_V) / temperature
    size_N = 1 + sum(_finite(values[name]).abs() for name in ("student_entropy", "teacher_entropy", "divergence"))
    bounds = {name: _value_bound(options) * size_N for name in ("divergence", "student_entropy", "teacher_entropy")}
    bounds["top1_agreement"] = torch.zeros_like(size_N)
    sizes = _gradient_sizes(exact.student_head, exact.student_hidden_N_D, size_N_V)
    return Oracle(values, bounds | _gradient_bounds(values, sizes, inputs.student_head))


def _with_leaves(
    hidden: Tensor, head: OutputHead, trained: tuple[str, ...]
) -> tuple[Tensor, OutputHead, dict[str, Tensor]]:
    tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    tensors = {name: None if t is None else t.detach().requires_grad_(name in trained) for name, t in tensors.items()}
    head = replace(head, weight=tensors["weight"], bias=tensors["bias"])
    return tensors["hidden"], head, {name: t for name, t in tensors.items() if t is not None and t.requires_grad}


def _prefix_results(output: PrefixLogprobs, leaves: dict[str, Tensor], upstream_B_K: Tensor) -> Results:
    results = {name.removesuffix("_B_K"): field.detach() for name, field in output._asdict().items()}
    return results | _gradients(output.logprobs_B_K, leaves, upstream_B_K)


def _gradients(value: Tensor, leaves: dict[str, Tensor], upstream: Tensor) -> Results:
    if not leaves:
        return {}
    gradients = torch.autograd.grad(value, list(leaves.values()), upstream.to(value.dtype))
    return {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _slot_gradient_size(logits: Tensor, inputs: PrefixInputs, upstream_B_K: Tensor, temperature: float) -> Tensor:
    """|upstream| (p + 1[token]) / T in the rows of valid slots, 0 elsewhere; (B, T, V)."""
    size_B_T_V = torch.zeros_like(logits)
    for b, (start, length) in enumerate(zip(inputs.starts_B.tolist(), inputs.lengths_B.tolist(), strict=True)):
        for t in range(min(inputs.horizon, length)):
            row = _probabilities(logits[b, start - 1 + t], temperature)
            row[inputs.token_ids_B_T[b, start + t]] += 1
            size_B_T_V[b, start - 1 + t] = upstream_B_K[b, t].double().abs() * row / temperature
    return size_B_T_V


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.double() / temperature, dim=-1).nan_to_num(0.0)


def _prefix_bounds(values: Results, bound: float) -> Results:
    bounds = {name: bound * (1 + _finite(values[name]).abs()) for name in ("logprobs", "entropy")}
    return bounds | {name: torch.zeros_like(values["entropy"]) for name in ("mask", "is_top1")}


def _gradient_sizes(head: OutputHead, hidden: Tensor, size: Tensor) -> Results:
    """Sizes of what is summed, from that of d(logits); leading axes are rows."""
    size_N_V, hidden_N_D = head.logit_scale * size.flatten(0, -2), hidden.flatten(0, -2)
    hidden_size = (size_N_V @ head.weight.abs()).view(hidden.shape)
    weight_size = size_N_V.T @ _finite(hidden_N_D).abs()
    return {"grad_hidden": hidden_size, "grad_weight": weight_size, "grad_bias": size_N_V.sum(dim=0)}


def _gradient_bounds(values: Results, sizes: Results, head: OutputHead) -> Results:
    of_storage = GRADIENT_BOUND_16_BIT if head.weight.dtype.itemsize == 2 else 0.0
    return {
        name: FLOAT32_BOUND * sizes[name] + of_storage * values[name].abs() for name in sizes.keys() & values.keys()
    }


def _value_bound(options: dict) -> float:
    is_tile_relative = options.get("logits") == LogitStorage.TILE_RELATIVE_FP16
    return TILE_RELATIVE_BOUND if is_tile_relative else FLOAT32_BOUND


def _finite(values: Tensor) -> Tensor:
    """Infinite values and NaN as 0: where a value is not finite it must be met exactly."""
    return values.nan_to_num(0.0, posinf=0.0, neginf=0.0)
