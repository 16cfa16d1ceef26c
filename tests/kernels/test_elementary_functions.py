"""Do expm1, log1p, tanh and log(a / b) of the kernels keep their digits? `pytest tests/kernels/test_elementary_functions.py`"""

import pytest
import torch
import triton
import triton.language as tl

from esr_kernels.elementary_kernel import expm1, log1p_small, log_quotient, tanh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# exp and log of a GPU are good to about 2 units in the last place, and the argument of exp is rounded once more.
MAX_RELATIVE_ERROR = 2e-6 if DEVICE == "cuda" else 6e-7


@triton.jit
def _apply_kernel(x_ptr, y_ptr, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    slots = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + slots, mask=slots < size, other=0.0)
    tl.store(y_ptr + slots, FUNCTION(x), mask=slots < size)


@triton.jit
def _log_quotient_kernel(a_ptr, b_ptr, y_ptr, size, BLOCK: tl.constexpr):
    slots = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + slots, mask=slots < size, other=1.0)
    b = tl.load(b_ptr + slots, mask=slots < size, other=1.0)
    tl.store(y_ptr + slots, log_quotient(a, b, a - b), mask=slots < size)


def arguments(smallest: float, largest: float) -> torch.Tensor:
    """Both signs from 1e-30 up, evenly in the exponent, and evenly in the value."""
    powers = 10 ** torch.linspace(-30, torch.tensor(min(-smallest, largest)).log10().item() - 1e-6, 1500)
    return torch.cat([powers, -powers, torch.linspace(smallest, largest, 2000)]).to(DEVICE)


@pytest.mark.parametrize(
    "function, exact, smallest, largest",
    [
        (expm1, torch.expm1, -80.0, 80.0),
        (log1p_small, torch.log1p, -0.5, 0.5),
        (tanh, torch.tanh, -30.0, 30.0),
    ],
)
def test_every_digit_counts_near_zero_too(function, exact, smallest, largest):
    x = arguments(smallest, largest)
    y = torch.full_like(x, float("nan"))
    _apply_kernel[(1,)](x, y, len(x), function, BLOCK=8192)
    expected = exact(x.double())
    error = ((y - expected).abs() / expected.abs().clamp_min(1e-300)).max().item()
    assert error <= MAX_RELATIVE_ERROR


def test_log_of_a_quotient_near_one_and_far_from_it():
    step = 10 ** torch.linspace(-7, 0, 1000)
    a = torch.cat([1 + step, 1 - step / 2, step, torch.tensor([0.0, 1.0])])
    b = torch.cat([torch.ones(2000), torch.full((1000,), 2e-3), torch.tensor([0.5, 1.0])])
    a, b = a.to(DEVICE), b.to(DEVICE)
    y = torch.full_like(a, float("nan"))
    _log_quotient_kernel[(1,)](a, b, y, len(a), BLOCK=4096)
    expected = (a.double() / b.double()).log()
    assert y[-2].item() == -float("inf") and y[-1].item() == 0
    error = ((y - expected).abs() / expected.abs())[:-2].max().item()
    assert error <= MAX_RELATIVE_ERROR
