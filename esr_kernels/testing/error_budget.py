"""One rule for every numeric test and benchmark gate, against a float64 oracle on the same low-precision inputs:

    error of the kernel  <=  error of PyTorch at the same dtype  +  a stated bound,

on the maximum and on the mean over the tensor, because either alone can hide a fault: one wrong element does not move
the mean, and a small bias of all elements does not move the maximum. PyTorch at the same dtype is the op's reference
(float32 arithmetic, results rounded to their dtype); the bounds are those of `esr_kernels.testing.oracle`.

16-bit gradients have a second bar, in norm: 2e-3. Rounding a gradient to bfloat16 costs 1.3e-3 to 1.9e-3 of its norm and
next to nothing may add to that; 16-bit logits alone cost ten to a thousand times as much. Where a few elements hold the
norm, their rounding alone may cost 2e-3; then 1e-3 of independent error may join what it costs PyTorch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from esr_kernels.divergence import Divergence
from esr_kernels.impl import Impl
from esr_kernels.testing.inputs import LinearInputs, LogitPair
from esr_kernels.testing.oracle import (
    Oracle,
    Results,
    evaluate_linear_divergence,
    evaluate_token_divergence,
    linear_divergence_oracle,
    token_divergence_oracle,
)

# ||actual - oracle|| / ||oracle|| of a float16 or bfloat16 gradient.
NORM_ERROR_16_BIT = 2e-3


def check_token_divergence(inputs: LogitPair, divergence: Divergence, upstream_N: Tensor, **options) -> Results:
    """Run FUSED, PyTorch and the oracle on `inputs`; check every result and return those of FUSED.

    Raises:
        AssertionError: as `check_results`.
    """
    actual = evaluate_token_divergence(inputs, divergence, upstream_N, impl=Impl.FUSED, **options)
    same_dtype = evaluate_token_divergence(inputs, divergence, upstream_N, impl=Impl.REFERENCE, **options)
    oracle = token_divergence_oracle(inputs, divergence, upstream_N, **options)
    check_results(actual, oracle=oracle, same_dtype=same_dtype)
    return actual


def check_linear_divergence(inputs: LinearInputs, divergence: Divergence, upstream_N: Tensor, **options) -> Results:
    """The same for `linear_divergence`; `trained` among the options names the student's tensors that get a gradient.

    Raises:
        AssertionError: as `check_results`.
    """
    actual = evaluate_linear_divergence(inputs, divergence, upstream_N, impl=Impl.FUSED, **options)
    same_dtype = evaluate_linear_divergence(inputs, divergence, upstream_N, impl=Impl.REFERENCE, **options)
    oracle = linear_divergence_oracle(inputs, divergence, upstream_N, **options)
    check_results(actual, oracle=oracle, same_dtype=same_dtype)
    return actual


def check_against(oracle_of: Callable[..., Oracle], evaluate: Callable[..., Results], *arguments, **options) -> Results:
    """Run FUSED, PyTorch and the oracle on the same arguments; check every result and return those of FUSED.

    Raises:
        AssertionError: as `check_results`.
    """
    actual, same_dtype = (evaluate(*arguments, impl=impl, **options) for impl in (Impl.FUSED, Impl.REFERENCE))
    check_results(actual, oracle=oracle_of(*arguments, **options), same_dtype=same_dtype)
    return actual


def check_results(actual: Results, *, oracle: Oracle, same_dtype: Results) -> None:
    """Check every result of one call by name: the error budget, and the bar in norm for 16-bit gradients.

    Raises:
        AssertionError: names differ, or a tensor exceeds its budget; the message names tensor, index and values.
    """
    assert set(actual) == set(oracle.values) == set(same_dtype), (
        f"results differ in name: actual {sorted(actual)}, oracle {sorted(oracle.values)}, PyTorch {sorted(same_dtype)}"
    )
    for name, value in actual.items():
        check_error(name, value, oracle=oracle.values[name], same_dtype=same_dtype[name], bound=oracle.bounds[name])
        if name.startswith("grad_") and value.dtype.itemsize == 2:
            error, of_torch = (relative_error_in_norm(x[name], oracle.values[name]) for x in (actual, same_dtype))
            allowed = max(NORM_ERROR_16_BIT, math.hypot(of_torch, NORM_ERROR_16_BIT / 2))
            assert error <= allowed, (
                f"{name}: relative error in norm {error:.3g} exceeds {allowed:.3g} for {value.dtype} "
                f"(PyTorch: {of_torch:.3g})"
            )


def check_error(name: str, actual: Tensor, *, oracle: Tensor, same_dtype: Tensor, bound: Tensor | float) -> None:
    """Check that `actual` is as close to `oracle` as `same_dtype` is, plus `bound`, on the maximum and on the mean.

    `bound` is absolute, one number or one per element; its maximum and its mean are what they allow. Where the oracle is
    infinite or NaN, `actual` must be the same; where only `same_dtype` is, its error counts as 0.

    Raises:
        AssertionError: shapes or dtypes differ, or a budget is exceeded.
    """
    assert actual.shape == oracle.shape == same_dtype.shape, (
        f"{name}: shape {tuple(actual.shape)}, oracle {tuple(oracle.shape)}, PyTorch {tuple(same_dtype.shape)}"
    )
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, PyTorch gives {same_dtype.dtype}"
    if actual.numel() == 0:
        return
    actual, oracle, same_dtype = actual.double(), oracle.double(), same_dtype.double()
    bound = torch.as_tensor(bound, dtype=torch.float64, device=oracle.device)

    finite = oracle.isfinite()
    is_equal = (actual == oracle) | (actual.isnan() & oracle.isnan())
    error = torch.where(finite & actual.isfinite(), (actual - oracle).abs(), math.inf).masked_fill(is_equal, 0.0)
    torch_error = (same_dtype - oracle).abs().masked_fill(~(finite & same_dtype.isfinite()), 0.0)
    for statistic in ("amax", "mean"):
        # The mean of the errors is infinite as soon as one is, as it should be.
        measured, of_torch, allowed = (getattr(x, statistic)().item() for x in (error, torch_error, bound))
        if not measured <= of_torch + allowed:
            worst = int(error.argmax())
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
            raise AssertionError(
                f"{name}: {'largest' if statistic == 'amax' else 'mean'} error {measured:.3g} exceeds the budget "
                f"{of_torch + allowed:.3g} = {of_torch:.3g} (PyTorch at the same dtype) + {allowed:.3g} (bound); "
                f"at {index}: actual {actual[index].item():.9g}, oracle {oracle[index].item():.9g}, "
                f"PyTorch {same_dtype[index].item():.9g}"
            )


def relative_error_in_norm(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle||, Frobenius, in float64; for an oracle of 0, 0 when equal and else inf."""
    actual, oracle = actual.double(), oracle.double()
    error, size = (actual - oracle).norm().item(), oracle.norm().item()
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size
