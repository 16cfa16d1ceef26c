"""Kernels that are in no library: one that is in order, and violations that tests/kernels/test_compiled_kernels.py finds."""

import torch
import triton
import triton.language as tl
from compiled_kernels import KernelVariant, launched


@triton.jit
def scaled(x, scale):
    return x * scale


@triton.jit
def softmax_kernel(
    x_ptr, bias_ptr, y_ptr, num_columns, row_stride, column_stride, scale,
    TRANSFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < num_columns
    x = tl.load(x_ptr + row * row_stride + columns * column_stride, mask=is_inside, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=is_inside, other=0.0)
    e = tl.exp(TRANSFORM(x, scale) - tl.max(x))
    tl.store(y_ptr + row * row_stride + columns, (e / tl.sum(e)).to(y_ptr.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize_on_alignment=["x_ptr", "y_ptr"])
def scale_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, scaled(tl.load(x_ptr + columns), scale))


@triton.jit
def unfinished_kernel(x_ptr):
    tl.store(x_ptr, no_such_name)  # noqa: F821


@triton.jit
def matmul_kernel(x_ptr, BLOCK: tl.constexpr):
    # The tiles pass through shared memory, num_stages of them in flight.
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(8):
        x = tl.load(x_ptr + step * BLOCK * BLOCK + offsets)
        product += tl.dot(x, tl.trans(x))
    tl.store(x_ptr + offsets, product.to(tl.float16))


SOFTMAX = {
    "x_ptr": "*bf16", "bias_ptr": None, "y_ptr": "*bf16", "num_columns": 1024, "row_stride": 1024, "column_stride": 1,
    "scale": 0.5, "TRANSFORM": scaled, "BLOCK": 1024,
}  # fmt: skip


def launch(first_column: int = 0, is_scaled: bool = False) -> None:
    x = torch.empty(37, 1040, dtype=torch.bfloat16, device="meta")[:, first_column:]
    softmax_kernel[(37,)](x, None, x, 1024, *x.stride(), 0.5, TRANSFORM=scaled, BLOCK=1024, num_warps=4)
    if is_scaled:
        scale_kernel[(37,)](x, x, 0.5, BLOCK=1024)


VARIANTS = [
    KernelVariant("in order", softmax_kernel, SOFTMAX),
    KernelVariant("unaligned", softmax_kernel, SOFTMAX, unaligned=("x_ptr",)),
    KernelVariant("odd row", softmax_kernel, SOFTMAX | {"row_stride": 1037}),
    KernelVariant("strided columns", softmax_kernel, SOFTMAX | {"column_stride": 2}),
    KernelVariant("alignment unknown", scale_kernel, {"x_ptr": "*bf16", "y_ptr": "*bf16", "scale": 0.5, "BLOCK": 1024}),
    *launched("launched", launch),
    *launched("launched unaligned", launch, first_column=1),
    *launched("launched twice", launch, is_scaled=True),
    KernelVariant("spilling", softmax_kernel, SOFTMAX | {"BLOCK": 4096, "num_columns": 4096}, num_warps=2, maxnreg=32),
    KernelVariant("large tiles", matmul_kernel, {"x_ptr": "*fp16", "BLOCK": 128}, num_warps=8, num_stages=9),
    KernelVariant("unfinished", unfinished_kernel, {"x_ptr": "*fp32"}),
    KernelVariant("misspelt", softmax_kernel, {"x": "*bf16"}),
    KernelVariant("not jitted", launch, {}),
    KernelVariant("wrong value", softmax_kernel, SOFTMAX | {"scale": (1, 2)}),
]
