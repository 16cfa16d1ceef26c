"""Matrix products with 16-bit operands and a float32 result, and float16 operands that lose nothing that matters."""

import math

import torch
from torch import Tensor

# Head weights are multiplied by this when they become float16: magnitudes from 1e-6 to 1000 keep 10 bits or more.
WEIGHT_FACTOR = 64.0


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which hidden states and weight are multiplied: theirs if it is one, else float32."""
    return hidden.dtype if hidden.dtype == weight.dtype else torch.float32


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of d(logits): float16 (scaled by row) where the operands have 16 bits, else float32.

    Not bfloat16, whose rounding alone costs 1.5e-3 of the gradient's norm, as much again as rounding the result.
    """
    return torch.float32 if product_dtype(hidden, weight) == torch.float32 else torch.float16


def matmul_float32(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; summed and returned in float32.

    PyTorch's settings apply: TF32 to float32 operands; `allow_fp16_accumulation`, off by default, must stay off.
    """
    if a.dtype == torch.float32 or a.device.type == "cpu":  # the CPU has no product of 16 bits into 32
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, beta=1 if accumulate else 0, out=out)
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def weight_as(dtype: torch.dtype, weight_M_D: Tensor) -> tuple[Tensor, float]:
    """Weight rows as operand for d(logits) of `dtype`: (operand, factor by which it was multiplied)."""
    if weight_M_D.dtype == dtype:
        return weight_M_D, 1.0
    if dtype == torch.float32:
        return weight_M_D.float(), 1.0
    return torch.mul(weight_M_D, WEIGHT_FACTOR, out=torch.empty_like(weight_M_D, dtype=dtype)), WEIGHT_FACTOR


def weighted_rows_as(dtype: torch.dtype, rows_N_D: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor | float]:
    """rows * weight as operand for d(logits) of `dtype`: (operand, unit in which it is given).

    The unit of float16 is a power of two that brings the largest entry to about 2^14. A row of weight 0 is 0 whatever it
    holds.
    """
    weighted_N_D = rows_N_D.float() * weight_N[:, None]
    weighted_N_D.masked_fill_(weight_N[:, None] == 0, 0.0)
    if dtype == torch.float32 or weighted_N_D.numel() == 0:
        return weighted_N_D.to(dtype), 1.0
    largest = torch.linalg.vector_norm(weighted_N_D, ord=math.inf)
    # 2^-126 is the smallest normal number; smaller entries, and a largest of 0, become 0.
    unit = torch.exp2((torch.ceil(torch.log2(largest)) - 14).clamp_min(-126))
    return weighted_N_D.div_(unit).to(dtype), unit
