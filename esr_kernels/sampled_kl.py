"""Losses from the log-probs of sampled tokens, each named by the gradient that it gives in expectation.

With p the student's and q the teacher's distribution at a position, y the token drawn there and
r = log q(y) - log p(y), the estimators of reverse KL, KL(student || teacher), are

    k1 = -r        k2 = r^2 / 2        k3 = e^r - 1 - r

For y drawn from p, k1 and k3 have the expectation KL(student || teacher); k2 agrees with it to second order in q / p - 1.
Their gradients are another matter, since y depends on p too (arXiv 2506.09477). In expectation they are

    estimator    backpropagated    as the cost of a policy gradient
    k1           0, pure noise     reverse KL
    k2           reverse KL        neither KL
    k3           forward KL        reverse KL minus forward KL

This file offers the cells that hold one KL and refuses the others. Gradients are those of each position given its
prefix, as in the full-vocabulary divergences: that a token also decides which prefixes come later is left out.

Rules that hold for every function:

- p is the distribution that the token was drawn from, sampling temperature and filters included. If it was drawn from
  another, only `reverse_kl_policy_gradient_loss` with `behaviour_logprobs` is right.
- One value per token, any shape, never reduced, in float32, or float64 where an input is float64.
- A student log-prob of -inf (a token that is never drawn, a fully masked row) gives 0, in value and gradient.
- Otherwise a teacher log-prob of -inf gives the value +inf. Mask with `where`: inf * 0 is NaN.
- Where the derivative with respect to the log-prob is not finite, the gradient is 0: a NaN would reach every weight.
- Padding, log-probs of 0 on every side (and baseline 0), gives 0 in value and gradient.
- The derivative is a constant to autograd: second derivatives are 0, not those of the formula.
"""

import math
from functools import reduce

import torch
from torch import Tensor

from esr_kernels.checks import FLOAT_DTYPES, check_positive, check_same_device

OPTIONAL = ("behaviour_logprobs", "baseline")
NOISE = "backpropagated, its expected gradient is 0: pure noise"
CONSTANT_COST = "of one sign, it does not depend on the token drawn, so as a cost its expected gradient is 0"
REFUSED_FOR_REVERSE_KL = {
    "k1": NOISE,
    "k3": "backpropagated, its expected gradient is that of forward KL: use sampled_forward_kl_loss for that",
}
REFUSED_FOR_FORWARD_KL = {
    "k1": NOISE,
    "k2": "backpropagated, its expected gradient is that of reverse KL: use sampled_reverse_kl_loss for that",
}
REFUSED_COSTS = {
    "k2": "as a cost its expected gradient is that of neither KL; sampled_reverse_kl_loss backpropagates k2",
    "k3": "as a cost its expected gradient is that of reverse KL minus forward KL",
    "kl": CONSTANT_COST,
    "topk_kl": CONSTANT_COST,
}


def reverse_kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    """Estimate of KL(student || teacher) per sampled token: a value to log, not a loss (J. Schulman, 2020).

    With r = teacher_logprobs - student_logprobs it is `-r` (k1: unbiased, either sign), `r**2 / 2` (k2: biased, little
    variance) or `expm1(r) - r` (k3: unbiased, not negative but for rounding, heavy tails where q >> p).

    Args:
        student_logprobs, teacher_logprobs: one shape, any, and one device; any float dtypes. The teacher's must not require
            grad, nor may the student's while grad is enabled.
        estimator: "k1", "k2" or "k3".

    Returns:
        The estimates, in the shape of the tokens, without gradient. k3 is +inf where e^r overflows (r > 88 in float32).

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or estimator; log-probs that require grad.
    """
    op = "reverse_kl_estimate"
    student, teacher = _prepared(op, student_logprobs, teacher_logprobs)
    _check_choice(op, "estimator", estimator, ["k1", "k2", "k3"], {})
    if student_logprobs.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: student_logprobs must not require grad, got requires_grad=True; detach it for the value. For the "
            "gradient of reverse KL use sampled_reverse_kl_loss or reverse_kl_policy_gradient_loss, for that of forward KL "
            "sampled_forward_kl_loss: backpropagated, k1 has expected gradient 0, k2 that of reverse KL, k3 that of forward KL"
        )
    k1 = student - teacher
    return {"k1": k1, "k2": 0.5 * k1**2, "k3": torch.expm1(-k1) + k1}[estimator]


def sampled_reverse_kl_loss(student_logprobs: Tensor, teacher_logprobs: Tensor, *, estimator: str = "k2") -> Tensor:
    """Loss per token drawn from the student whose expected gradient is that of KL(student || teacher).

    Equivalent to `(student_logprobs - teacher_logprobs) ** 2 / 2`. The gradient is k1 * grad log p(y), the same for each
    token as that of `reverse_kl_policy_gradient_loss` on policy.

    Args:
        student_logprobs, teacher_logprobs: one shape, any, and one device; any float dtypes. The teacher's without grad.
        estimator: "k2", the only one with this gradient.

    Returns:
        The losses, in the shape of the tokens. A teacher log-prob of -inf gives +inf with gradient 0.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or estimator; a teacher that requires grad.
    """
    op = "sampled_reverse_kl_loss"
    student, teacher = _prepared(op, student_logprobs, teacher_logprobs)
    _check_choice(op, "estimator", estimator, ["k2"], REFUSED_FOR_REVERSE_KL)
    k1 = student.detach() - teacher
    return _with_slope(0.5 * k1**2, k1, student)


def sampled_forward_kl_loss(student_logprobs: Tensor, teacher_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    """Loss per token drawn from the student whose expected gradient is that of KL(teacher || student).

    With r = teacher_logprobs - student_logprobs, equivalent to `expm1(r) - r`. The gradient is (1 - e^r) * grad log p(y),
    in expectation p - q over the logits, and keeps its digits near r = 0. **The value is an estimate of
    KL(student || teacher) all the same.** Where q >> p, e^r has heavy tails: few tokens carry the gradient, and the
    variance of its factor, sum(q^2 / p) - 1, has no bound.

    Args:
        student_logprobs, teacher_logprobs: one shape, any, and one device; any float dtypes. The teacher's without grad.
        estimator: "k3", the only one with this gradient.

    Returns:
        The losses, in the shape of the tokens. A teacher log-prob of -inf gives +inf with the gradient's limit,
        1 * grad log p(y), which is finite and keeps the expectation p - q. Where e^r overflows (r > 88 in float32) the
        value is +inf and the gradient 0.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or estimator; a teacher that requires grad.
    """
    op = "sampled_forward_kl_loss"
    student, teacher = _prepared(op, student_logprobs, teacher_logprobs)
    _check_choice(op, "estimator", estimator, ["k3"], REFUSED_FOR_FORWARD_KL)
    k1 = student.detach() - teacher
    return _with_slope(torch.expm1(-k1) + k1, -torch.expm1(-k1), student)


def reverse_kl_policy_gradient_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    cost: str = "k1",
    behaviour_logprobs: Tensor | None = None,
    baseline: Tensor | None = None,
    clip_range: tuple[float, float] | None = None,
    max_ratio: float | None = None,
) -> Tensor:
    """Surrogate per sampled token whose gradient is the policy gradient of KL(student || teacher).

    With c = (k1 - baseline).detach() and rho = exp(student_logprobs - behaviour_logprobs), equivalent to::

        c * student_logprobs                                        # drawn from the student
        c * rho                                                     # drawn with behaviour_logprobs
        c * rho.detach().clamp(max=max_ratio) * student_logprobs    # and max_ratio: truncated importance sampling
        torch.maximum(c * rho, c * rho.clamp(1 - low, 1 + high))    # and clip_range: PPO with advantage -c

    The first two have exactly the gradient of KL(student || teacher) in expectation, the second for any behaviour mu
    that is positive where p is, with a variance that grows with rho. Truncation is biased where rho > max_ratio: such a
    token counts too little. Clipping (arXiv 1707.06347) is biased too: the gradient is 0 once rho has left the range in
    the direction that lowers the loss. The value estimates nothing: log `reverse_kl_estimate`.

    Args:
        student_logprobs, teacher_logprobs: one shape, any, and one device; any float dtypes. The teacher's without grad.
        cost: "k1". "k2", "k3", "kl" and "topk_kl" are refused, each with its reason.
        behaviour_logprobs: log mu(y), if y was drawn from mu: same shape and device, any float dtype, without grad.
        baseline: broadcastable to the tokens, same device, any float dtype, without grad. It must not depend on the token
            drawn. Then it leaves the expectation of the first two forms, though not of the others. The exact KL of the
            position lowers the variance over all (vOPD, arXiv 2605.07865), if not where one token has most of p.
        clip_range: (low, high) with 0 <= low <= 1 and high >= 0; needs `behaviour_logprobs`.
        max_ratio: finite and > 0; needs `behaviour_logprobs`.

    Returns:
        The surrogates, in the shape of the tokens. A teacher log-prob of -inf gives +inf with gradient 0 in every form.
        A behaviour log-prob of -inf makes rho infinite.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, number or cost; another tensor than `student_logprobs`
            requires grad; `clip_range` and `max_ratio` together, or one of them without `behaviour_logprobs`.
    """
    op = "reverse_kl_policy_gradient_loss"
    tensors = student_logprobs, teacher_logprobs, behaviour_logprobs, baseline
    student, teacher, behaviour, baseline = _prepared(op, *tensors)
    _check_choice(op, "cost", cost, ["k1"], REFUSED_COSTS)
    _check_ratio_bounds(op, behaviour, clip_range, max_ratio)
    logprobs = student.detach()
    k1 = logprobs - teacher
    centred = k1 if baseline is None else k1 - baseline
    if behaviour is None:
        value, slope = centred * logprobs, centred
    else:
        ratio = (logprobs - behaviour).exp()
        value = slope = centred * ratio
        if max_ratio is not None:
            slope = centred * ratio.clamp(max=max_ratio)
            value = slope * logprobs
        if clip_range is not None:
            clipped = centred * ratio.clamp(1 - clip_range[0], 1 + clip_range[1])
            slope = slope.masked_fill(clipped > value, 0.0)
            value = torch.maximum(value, clipped)
    return _with_slope(value.masked_fill(k1 == math.inf, math.inf), slope, student)


def _with_slope(value: Tensor, slope: Tensor, student: Tensor) -> Tensor:
    """`value` with the derivative `slope` in `student`, 0 where it is not finite.

    Autograd of the formulas gives 0 * inf = NaN there, and computes the derivative of expm1 as expm1 + 1.
    """
    slope = slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return value + slope * (student - student.detach())


def _prepared(op: str, student: Tensor, teacher: Tensor, *optional: Tensor | None) -> list[Tensor | None]:
    """The tensors, checked, in the dtype of the computation and 0 where the student never draws the token."""
    tensors = {"student_logprobs": student, "teacher_logprobs": teacher}
    tensors |= {name: tensor for name, tensor in zip(OPTIONAL, optional, strict=False) if tensor is not None}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
            raise TypeError(f"{op}: {name} must have dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
        shape, tokens = tuple(tensor.shape), tuple(student.shape)
        if name == "baseline":
            sizes = zip(shape[::-1], tokens[::-1], strict=False)
            if len(shape) > len(tokens) or any(size not in (1, token_size) for size, token_size in sizes):
                raise ValueError(f"{op}: baseline must broadcast to student_logprobs, {tokens}, got {shape}")
        elif shape != tokens:
            raise ValueError(f"{op}: {name} must have the shape of student_logprobs, {tokens}, got {shape}")
        if tensor.requires_grad and name != "student_logprobs":
            raise ValueError(f"{op}: {name} must not require grad (a constant), got requires_grad=True; detach it")
    check_same_device(op, **tensors)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()), torch.float32)
    never_drawn = student == -math.inf
    return [t if t is None else t.to(dtype).masked_fill(never_drawn, 0.0) for t in (student, teacher, *optional)]


def _check_choice(op: str, name: str, choice: object, legal: list[str], refused: dict[str, str]) -> None:
    if choice not in legal:
        reason = f": {refused[choice]}" if isinstance(choice, str) and choice in refused else ""
        raise ValueError(f"{op}: {name} must be one of {legal}, got {choice!r}{reason}")


def _check_ratio_bounds(op: str, behaviour: Tensor | None, clip_range: object, max_ratio: object) -> None:
    got = f"got clip_range={clip_range!r} and max_ratio={max_ratio!r}"
    if clip_range is not None and max_ratio is not None:
        raise ValueError(f"{op}: clip_range and max_ratio must not both be given, {got}")
    if behaviour is None and (clip_range is not None or max_ratio is not None):
        raise ValueError(f"{op}: clip_range and max_ratio need behaviour_logprobs, whose ratio they bound, {got}")
    if max_ratio is not None:
        check_positive(op, "max_ratio", max_ratio)
    if clip_range is not None:
        low, high = clip_range if isinstance(clip_range, (tuple, list)) and len(clip_range) == 2 else (None, None)
        if any(type(x) not in (int, float) for x in (low, high)) or not (0 <= low <= 1 and high >= 0):
            raise ValueError(f"{op}: clip_range must be (low, high), 0 <= low <= 1 and high >= 0, got {clip_range!r}")
