"""exp(x) - 1, log(1 + x), log(a / b) and tanh(x) in float32 without cancellation near their zeros.

Triton has no expm1 or log1p outside CUDA's libdevice, which the interpreter cannot run. With an exact exp the relative error
stays below 6e-7, checked against float64 in tests/kernels/test_elementary_functions.py.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    # Below 0.35 the Taylor series, whose ninth term is 1e-9 of the first; above, at most 2 bits cancel.
    series = 1.0 + x * (1.0 / 8.0)
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * 0.5 * series
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p_small(x):
    """log(1 + x) for |x| <= 0.5, as 2 atanh(x / (2 + x))."""
    y = x / (2.0 + x)
    z = y * y
    series = 1.0 / 13.0
    series = 1.0 / 11.0 + z * series
    series = 1.0 / 9.0 + z * series
    series = 1.0 / 7.0 + z * series
    series = 1.0 / 5.0 + z * series
    series = 1.0 / 3.0 + z * series
    return 2.0 * y * (1.0 + z * series)


@triton.jit
def log_quotient(a, b, difference):
    """log(a / b) for b > 0, given a - b computed without cancellation; -inf where a = 0."""
    x = difference / b
    is_near = tl.abs(x) < 0.5
    return tl.where(is_near, log1p_small(tl.where(is_near, x, 0.0)), tl.log(a / b))


@triton.jit
def tanh(x):
    decay = expm1(-2.0 * tl.abs(x))
    magnitude = -decay / (2.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)
